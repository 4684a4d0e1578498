"""Options are the arguments of `mfx.momentumize`, checked by themselves."""

import inspect
from dataclasses import fields, replace

import pytest
from torch import nn

import mfx
from mfx.options.options import Options


def test_the_options_are_the_arguments_of_momentumize():
    _, *arguments = inspect.signature(mfx.momentumize).parameters.values()
    options = fields(Options)[: len(arguments)]
    assert [(argument.name, argument.default) for argument in arguments] == [(o.name, o.default) for o in options]


def test_a_copy_is_checked_like_the_first():
    options = Options(only="blocks*", memory_budget="24GiB")
    assert replace(options, within="encoder").selection.only == ("blocks*",)
    with pytest.raises(mfx.MfxError, match="min_steps=0"):
        replace(options, min_steps=0)


def test_what_the_caller_changes_later_changes_nothing():
    gamma, skip = {"*": 0.5}, ["head"]
    options = Options(gamma=gamma, skip=skip)
    gamma["*"], skip[0] = 2.0, "stem"
    assert options.gamma == {"*": 0.5}
    assert options.selection.skip == ("head",)


@pytest.mark.parametrize("inputs", [{"x": 1}, [1]], ids=["by name", "by position"])
def test_example_inputs_are_those_of_the_time(inputs):
    options = Options(example_inputs=inputs)
    before = options.example_calls
    inputs.clear()
    assert options.example_calls == before == [((), {"x": 1}) if before[0][1] else ((1,), {})]


def test_example_inputs_of_several_calls():
    assert Options(example_inputs=[(1,), {"x": 2}]).example_calls == [((1,), {}), ((), {"x": 2})]
    assert Options(example_inputs=[1, (2,)]).example_calls == [((1, (2,)), {})]
    assert Options(example_inputs=((1,), (2,))).example_calls == [(((1,), (2,)), {})]


def test_chains_of_their_own():
    assert Options(only=["a", ["b", "c"]]).selection.only == ("a", ("b", "c"))
    for wrong in ([["a", 1]], [["a", ["b"]]], [1]):
        with pytest.raises(mfx.MfxError, match="must be a chain name or module path"):
            Options(only=wrong)
    for empty in ([], [[]]):
        with pytest.raises(mfx.MfxError, match="only is empty"):
            Options(only=empty)
    with pytest.raises(mfx.MfxError, match="must be a chain name or module path"):
        Options(skip=[["a"]])


def test_each_argument_reaches_its_option(monkeypatch):
    given = {
        "gamma": 0.5,
        "velocity": "residual",
        "arithmetic": "float",
        "memory_budget": 0.25,
        "recompute": "all",
        "min_steps": 3,
        "only": ("encoder",),
        "skip": ("head",),
        "capture": "dynamo",
        "example_inputs": {"x": 1},
        "verify": "raise",
    }
    monkeypatch.setattr("mfx.api.build_net", lambda model, options: options)
    options = mfx.momentumize(nn.Identity(), **given)
    assert {name: getattr(options, name) for name in given} == given
    assert options.example_calls == [((), {"x": 1})]
