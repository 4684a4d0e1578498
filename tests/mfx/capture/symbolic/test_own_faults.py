"""Errors of mfx's own in a trace are seen: they do not read as "this model cannot be traced"."""

import pytest
import torch
from torch import nn

import mfx
from mfx.capture.symbolic import tracer
from mfx.net import routes
from mfx.program import shapes


class Block(nn.Module):
    def __init__(self, look=False):
        super().__init__()
        self.fc, self.look = nn.Linear(4, 4), look

    def forward(self, x):
        h = self.fc(x)
        a, b = h.split(2, -1)
        if self.look:  # which only a trace with leaves follows
            a = a * float(a.detach().sum().item() > 1e9)
        return x + torch.cat([a, b], -1)


def net(**how):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**how) for _ in range(3)))


@pytest.mark.parametrize("look", [False, True], ids=["traced", "with leaves"])
def test_an_instruction_of_ours_that_fails_is_an_error(monkeypatch, look):
    monkeypatch.setattr(tracer, "known_length", None)  # in the trace, an instruction of the tracer fails
    with pytest.raises(mfx.MfxError, match=r"error in mfx, not in the model.*capture='dynamo'"):
        mfx.momentumize(net(look=look), gamma=0.0)(torch.randn(2, 4))


@pytest.mark.parametrize("failing", ["refuse_lost_effects", "rewrite_captured"])
def test_so_is_one_behind_the_trace(monkeypatch, failing):
    def fails(*args, **kwargs):
        raise KeyError("not found")

    rewritten = mfx.momentumize(net(look=True), gamma=0.0)
    monkeypatch.setattr(routes, failing, fails)
    with pytest.raises(KeyError, match="not found"):
        rewritten(torch.randn(2, 4))


def test_so_is_one_where_shapes_are_found(monkeypatch):
    rewritten = mfx.momentumize(net(), gamma=0.0)
    monkeypatch.setattr(shapes, "undivided", None)
    with pytest.raises(mfx.MfxError, match="error in mfx, not in the model"):
        rewritten(torch.randn(2, 4))


class Raises(nn.Module):
    def forward(self, x):
        raise KeyError("of the model")


def test_what_the_model_raises_is_not_ours():
    rewritten = mfx.momentumize(nn.Sequential(Block(), Block(), Raises()), gamma=0.0)
    with pytest.raises(KeyError, match="of the model"):
        rewritten(torch.randn(2, 4))
