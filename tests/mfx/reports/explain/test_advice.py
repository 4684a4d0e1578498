"""Advice in explanations."""

import pytest

import mfx
from mfx.reports.explain.advice import advise_on_output, advise_on_weights
from mfx.reports.explain.explain import branch_weights
from tests.mfx.models import Stack


@pytest.mark.parametrize("steps", range(2, 40))
def test_the_gamma_that_is_recommended_is_the_largest(steps):
    def half_count(gamma):
        return 2 * sum(weight >= 0.5 for weight in branch_weights(steps, gamma)) >= steps

    advice = advise_on_weights(branch_weights(steps, 0.99), 0.99)
    recommended = float(advice.partition("at gamma=")[2].split()[0])
    assert half_count(recommended)
    assert not half_count(recommended + 0.01)
    assert advise_on_weights(branch_weights(steps, recommended), recommended) == ""


def test_nothing_is_said_where_branches_count():
    assert advise_on_weights(branch_weights(2, 0.0), 0.0) == ""
    assert advise_on_weights(branch_weights(24, 0.9), 0.9) == ""
    assert mfx.explain(mfx.momentumize(Stack(), gamma=0.5)).advice == ()


def test_small_weights_in_an_explanation():
    explanation = mfx.explain(Stack(depth=2))
    about_chain, about_training = explanation.advice
    assert about_chain.startswith("blocks: 4 of 4 branches count for less than half of what they did, the last for 0.1")
    assert "mfx.GammaScheduler" in about_training
    text = " ".join(str(explanation).split())
    assert about_chain in text
    assert explanation.to_dict()["advice"] == list(explanation.advice)
    assert explanation.to_dict()["chains"][0]["advice"] in about_chain


def test_outputs():
    assert advise_on_output({"past_key_values": 12 * 2**20, "attentions": 0}) == [
        "the output's past_key_values escapes the chains: pass use_cache=False to save another 12.0 MiB"
    ]
