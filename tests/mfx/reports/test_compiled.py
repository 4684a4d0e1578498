"""Reports on models that ``torch.compile`` wraps: they name the user's class, and are those of the model inside."""

import pytest
import torch

import mfx
from tests.mfx.models import Stack

OPTIONS = {"gamma": 0.5, "arithmetic": "float", "only": "blocks"}


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    model = torch.compile(Stack(), backend="mfx", options={**OPTIONS, "inner": "eager"})
    model(torch.randn(2, 8)).sum().backward()
    return model


def test_graphs_and_drawings_name_the_users_class(compiled):
    (graph,) = mfx.graphs(compiled).values()
    assert type(graph).__name__ == "Stack"
    assert "Stack" in mfx.draw(compiled).svg
    assert mfx.explain(compiled).verdict.startswith("Stack: 6 of 6 residual steps")


def test_a_profile_measures_the_model_inside_by_the_backends_options(compiled):
    x = torch.randn(2, 8)
    found, expected = (
        mfx.profile(model, x, repeats=1, progress=False, options=options)
        for model, options in ((compiled, None), (compiled._orig_mod, OPTIONS))
    )
    assert found.model == "Stack"
    assert "gamma 0.5, float arithmetic" in found.rows[-1].note
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert (row.name, row.kept_bytes, row.peak_bytes, row.flops, row.note) == (
            other.name,
            other.kept_bytes,
            other.peak_bytes,
            other.flops,
            other.note,
        )
    own = mfx.profile(compiled, x, against="momentum", options={"gamma": 0.25}, repeats=1, progress=False)
    assert "gamma 0.25, exact arithmetic" in own.rows[0].note


def test_a_compiled_net_is_measured_as_the_net():
    torch.manual_seed(0)
    net = torch.compile(mfx.momentumize(Stack(), gamma=0.5), backend="eager")
    found = mfx.profile(net, torch.randn(2, 8), against="momentum", repeats=1, progress=False)
    assert found.model == "Stack"
    assert "gamma 0.5, exact arithmetic" in found.rows[0].note


def test_before_its_first_call_a_compiled_model_has_no_graphs():
    model = torch.compile(Stack(), backend="mfx")
    for report in (mfx.graphs, mfx.draw, mfx.explain, lambda m: mfx.profile(m, torch.randn(2, 8))):
        with pytest.raises(mfx.MfxError, match="no graph of this compiled Stack is known: it was not called yet"):
            report(model)
