"""A model that enters a mode of its own for some of its operations: the net does too, whatever mode it is called in."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.attention
from torch import nn
from torch.nn import functional as F

import mfx
from mfx import compat
from mfx.compiler.backend import momentum
from tests.models.step import assert_bit_equal, train_step
from tests.sampling import grid, sampled

MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "kernel": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
}


class Block(nn.Module):
    def __init__(self, mode) -> None:
        super().__init__()
        self.fc, self.mode = nn.Linear(8, 8), mode

    def forward(self, x):
        with self.mode():
            y = self.fc(x)
            y = F.dropout(F.scaled_dot_product_attention(y, y, y), 0.5, self.training)
        return x + y.float()


class Model(nn.Module):
    def __init__(self, mode) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(mode) for _ in range(3))

    def forward(self, x):
        x = self.first(x).float()
        for block in self.blocks:
            x = block(x)
        return x


def model_of(mode):
    torch.manual_seed(0)
    return Model(mode), (torch.randn(2, 3, 8),)


@grid(len(MODES), mode=MODES, outside={"alone": nullcontext, "under autocast": MODES["autocast"]})
def test_a_mode_inside_of_a_branch(mode, outside):
    model, inputs = model_of(mode)
    net = mfx.momentumize(model, gamma=0.0)
    with outside():
        assert_bit_equal(train_step(net, inputs), train_step(model, inputs))
        assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]
        reversible, kept = (mfx.momentumize(model, gamma=0.9, memory_budget=b) for b in (0.0, 1.0))
        assert_bit_equal(train_step(reversible, inputs), train_step(kept, inputs))


def state() -> tuple:
    """Return the depth in autocast, and what a model may switch."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return depth, compat.modes()


@grid(4, mode=MODES, gamma=[0.0, 0.9])
def test_a_second_run_that_stops_early_leaves_no_mode_behind(mode, gamma):
    before = state()
    model, inputs = model_of(mode)
    for net in (mfx.momentumize(model, gamma=gamma), as_backend(model, gamma)):
        net(*inputs).sum().backward()
        assert state() == before


def as_backend(model, gamma, inner="eager"):
    torch.compiler.reset()
    return torch.compile(model, backend=momentum, options={"gamma": gamma, "inner": inner})


COMPILED = {name: mode for name, mode in MODES.items() if name != "inference_mode"}  # AOTAutograd has none


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks
@grid(4, name=list(COMPILED), gamma=[0.0, 0.9])
def test_branches_that_are_compiled(name, gamma):
    mode = COMPILED[name]
    before = state()
    model, inputs = model_of(mode)
    model.eval()  # compiled code may draw other masks
    net = mfx.momentumize(model, gamma=gamma)
    output = net(*inputs)
    expected = output.detach()
    grads = torch.autograd.grad(output.sum(), list(net.parameters()), allow_unused=True)
    ways = [lambda: as_backend(model, gamma, "aot_eager")]
    if name not in ("no_grad", "set_grad_enabled"):  # an MfxError
        ways.append(lambda: torch.compile(net, backend="aot_eager", fullgraph=True))
    for compile_it in ways:
        found = compile_it()(*inputs)
        # The same operations but for rounding to bfloat16, of a relative 2⁻⁸, which fused casts may leave out.
        assert torch.allclose(found, expected, rtol=0, atol=2**-8 * float(expected.abs().max()))
        for a, b in zip(
            torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True), grads, strict=True
        ):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=0, atol=2**-6 * max(float(b.abs().max()), 1.0))
        assert state() == before
        torch.compiler.reset()


@sampled("mode", MODES, 3)
def test_as_a_backend(mode):
    model, inputs = model_of(mode)
    found, expected = train_step(as_backend(model, 0.0), inputs), train_step(model, inputs)
    named = {f"_orig_mod.{name}": grad for name, grad in expected.grads.items()}
    buffers = {f"_orig_mod.{name}": value for name, value in expected.state.items()}
    assert_bit_equal(found, replace(expected, grads=named, state=buffers))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_symbolic_trace_says_that_it_would_lose_the_mode(mode):
    with pytest.raises(mfx.MfxError, match=r"computed in .*test_mode_regions.py:\d+"):
        mfx.momentumize(model_of(mode)[0], capture="symbolic")


def test_random_numbers_that_leave_no_trace():
    model, inputs = model_of(torch.random.fork_rng)
    net = mfx.momentumize(model, gamma=0.0)
    with pytest.warns(UserWarning, match="fork_rng|random"):
        found = train_step(net, inputs)
    assert_bit_equal(found, train_step(model, inputs))


def test_a_mode_in_which_nothing_is_computed_is_none():
    class Looking(Block):
        def forward(self, x):
            with torch.no_grad():
                width = 2.0 * 4
            return x + self.fc(x) / width

    model = nn.Sequential(*(Looking(nullcontext) for _ in range(3)))
    assert [len(chain.steps) for chain in mfx.explain(mfx.momentumize(model, capture="symbolic")).chains] == [3]


class Looking(nn.Module):
    """Looks numbers up in a mode of its own, which fails for numbers that are not there."""

    def __init__(self, mode) -> None:
        super().__init__()
        self.table, self.mode = nn.Embedding(4, 8), mode
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, numbers):
        for fc in self.fcs:
            with self.mode():
                y = fc(x) @ self.table(numbers).T
            x = x + y.float()
        return x


@sampled("mode", MODES, 3)
def test_a_call_that_fails_leaves_no_mode_behind(mode):
    net, x = mfx.momentumize(Looking(mode)), torch.randn(2, 8)
    net(x, torch.zeros(8, dtype=torch.int64))
    before = state()
    with pytest.raises(IndexError):
        net(x, torch.full((8,), 4))
    assert state() == before


def test_an_error_in_a_transform_leaves_it():
    @compat.modes_left()
    def fail():
        torch._C._functorch._jvp_increment_nesting()
        torch.autograd.forward_ad.enter_dual_level()
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        fail()
    assert not compat.under_transform()
