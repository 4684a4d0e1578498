"""Comparisons of Triton's kernels with torch's operations, on a device, for one choice of numbers each.

The tests draw the choices by hypothesis; ``examples/benchmarks/gpu.py`` draws them where there is none.
"""

import math
import random

import torch

from mfx.engine.arithmetic import BLOCK_KERNELS, ExactState, FloatState
from mfx.engine.arithmetic.digit_store import TOP_LIMIT, DigitStore, narrowest
from mfx.engine.arithmetic.gradients import UpdateGradients, gradients_of
from mfx.engine.arithmetic.range_check import LIMIT, RangeCheck
from mfx.engine.arithmetic.triton_states import TritonExactState, TritonFloatState
from tests.mfx.engine.arithmetic.kernels.states import MARK, any_bits, same_bits, whole

EXTREMES = [0, 1, -1, 2**40, -(2**40), 2**53 + 1, -(2**53) - 1, 2**60, -(2**60), 9, 10, -9, -10]


def state_at(cls, X, V, top, bound, dtype, device):
    """A state in the middle of a chain; its store's top is of the width that ``bound`` needs."""
    store = DigitStore()
    store.bound = bound
    if top is not None:
        store.top = (top if cls is ExactState else top.to(narrowest(bound))).to(device, copy=True)
    X, V = X.to(device, copy=True), V.to(device, copy=True)
    state = cls(X, V, store, dtype, RangeCheck(), BLOCK_KERNELS)
    state.range_check._admitted = math.inf
    state.steps, state.flags = 5, torch.zeros(2, dtype=torch.int64, device=device)
    return state


def integers(size, how):
    if how == "random":
        return torch.randint(-(2**61), 2**61, (size,)), torch.randint(-(2**60), 2**60, (size,))
    X, V = ([random.choice(EXTREMES) + random.randint(-20, 20) for _ in range(size)] for _ in range(2))
    return torch.tensor(X), torch.tensor(V)


def branch_values(size, dtype, how):
    """Numbers within the range: of any bits, or such that their product with 2⁴⁰ is half way between integers."""
    if how == "half way":
        y = ((torch.randint(-(2**20), 2**20, (size,)) + 0.5) / 2.0**40).to(dtype)
    else:
        y = any_bits(size, dtype)
    return torch.where(y.double().abs() < LIMIT / 8, y, torch.zeros_like(y))


def assert_alike(a, b):
    assert torch.equal(a.X, b.X)
    assert torch.equal(a.V, b.V)
    assert (a.store.top is None) == (b.store.top is None)
    if a.store.top is not None:
        assert torch.equal(whole(a.store.top), whole(b.store.top))
        assert b.store.top.dtype.itemsize >= narrowest(b.store.bound).itemsize
    assert a.store.bound == b.store.bound
    assert len(a.store.limbs) == len(b.store.limbs)
    assert all(map(torch.equal, a.store.limbs, b.store.limbs))


def one_step(device, gamma, dtype, kind, size, how, bits, seed):
    """One exact step there and back, from the middle of a chain."""
    torch.manual_seed(seed)
    random.seed(seed)
    X, V = integers(size, how)
    y = branch_values(size, dtype, how).to(device)
    bound = min(2**bits - 1, TOP_LIMIT - 1)  # with 2⁵⁰ a limb is filled first
    top = torch.randint(0, bound + 1, (size,)) if bits else None
    one, two = (state_at(cls, X, V, top, bound, dtype, device) for cls in (ExactState, TritonExactState))
    for state in (one, two):
        state.start_steps = 4  # so that the first is walked back by one launch, and x of a step before it by the same
    assert same_bits(two.advance(y, kind, gamma), one.advance(y, kind, gamma))
    assert_alike(one, two)
    assert same_bits(two.retreat_x(), one.retreat_x())
    assert torch.equal(one.X, two.X)
    one.retreat_v(y, kind, gamma)
    two.retreat_v(y, kind, gamma)
    before = one.retreat_x()
    assert_alike(one, two)
    assert same_bits(two.retreat_x(), before)
    assert torch.equal(two.V.cpu(), V)
    assert top is None or torch.equal(whole(two.store.top).cpu(), top)
    assert torch.equal(two.X.cpu(), X - V)


def chain(device, size, dtype, depth, scale, bad):
    """A stream and branches' values; some of them not finite or too large."""

    def values(is_bad):
        y = (scale * torch.randn(size)).to(dtype)
        if is_bad:
            for value in (math.nan, math.inf, -math.inf, 5e6, -3e6, 65504.0):
                y = torch.where(torch.rand(size) < 0.02, torch.tensor(value).to(dtype), y)
        return y.to(device)

    return [values(bad and i in (0, 3, depth // 2)) for i in range(depth + 1)]


def exact_chain(device, gamma, dtype, kind, size, depth, scale, bad, given_v, seed):
    """An exact chain there and back, and what its flags say."""
    torch.manual_seed(seed)
    x, *ys = chain(device, size, dtype, depth, scale, bad)
    v = chain(device, size, torch.float32, 0, scale, bad)[0] if given_v else None
    one, two = (cls.start(x, v, reversible=True) for cls in (ExactState, TritonExactState))
    seen = [[state.stream(), *(state.advance(y, kind, gamma) for y in ys)] for state in (one, two)]
    dead = torch.zeros_like(x, dtype=torch.bool) if one.range_check.poisoned is None else one.range_check.poisoned
    assert all(map(same_bits, *seen))
    assert torch.equal(two.X == MARK, dead)
    largest, said = (0.0 if (found := state.overflowed()) is None else found.item() for state in (one, two))
    assert (said >= LIMIT) == (largest >= LIMIT)
    assert said <= largest  # elements that are out of range once are not watched any more
    assert bool(two.flags[1]) == bool(dead.any())

    kept = [state.freeze() for state in (one, two)]
    assert [t.dtype for t in kept[1].tensors] == [t.dtype for t in kept[0].tensors]
    for a, b in zip(*(frozen.tensors for frozen in kept), strict=True):
        assert torch.equal(a[~dead], b[~dead])
    copies = [t.clone() for t in kept[1].tensors]
    one, two = (frozen.thaw(frozen.tensors) for frozen in kept)
    for y in reversed(ys):
        assert same_bits(two.retreat_x(), one.retreat_x())
        for state in (one, two):
            state.retreat_v(y, kind, gamma)
    for a, b in ((one.X, two.X), (one.V, two.V)):
        assert torch.equal(a[~dead], b[~dead])
    assert torch.equal(two.X == MARK, dead)
    assert two.is_start()
    assert all(map(torch.equal, kept[1].tensors, copies)), "the graph's copy was written into"
    again = kept[1].thaw(kept[1].tensors)  # once more from the same stored state, as with retain_graph
    assert same_bits(again.retreat_x()[~dead], seen[1][-2][~dead])


def assert_close(a, b):
    """Bit for bit; on a GPU torch multiplies by the rounded 1/γ, which is half a unit off, and walks carry that on."""
    if not a.is_cpu:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    else:
        assert same_bits(a, b)


def float_chain(device, gamma, dtype, kind, size, depth, given_v, bad, seed):
    """A chain of float arithmetic there and back."""
    torch.manual_seed(seed)
    x, *ys = (torch.randn(size).to(dtype).to(device) for _ in range(depth + 1))
    if bad:
        ys[0][0], ys[-1][-1] = math.nan, math.inf
    v = torch.randn(size, device=device, dtype=torch.bfloat16) if given_v else None
    states = one, two = [cls.start(x, v, reversible=True) for cls in (FloatState, TritonFloatState)]
    for y in ys:
        assert same_bits(two.advance(y, kind, gamma), one.advance(y, kind, gamma))
        assert same_bits(one.v, two.v)
    kept = [state.freeze() for state in states]
    copies = [t.clone() for t in kept[1].tensors]
    one, two = (frozen.thaw(frozen.tensors) for frozen in kept)
    for y in reversed(ys):
        assert_close(two.retreat_x(), one.retreat_x())
        one.retreat_v(y, kind, gamma)
        two.retreat_v(y, kind, gamma)
        assert_close(two.v, one.v)
    assert_close(two.x, one.x)
    assert all(map(same_bits, kept[1].tensors, copies)), "the graph's copy was written into"


def gradients(device, types, kind, gamma, later, follows, needs_v, which, size, all_bits, seed):
    """The backward pass of an update, rounded as torch rounds."""
    torch.manual_seed(seed)
    (x, v, y), wide = types
    v = wide if follows else v  # only the caller's own velocity is of another dtype
    update = UpdateGradients(kind, gamma, later, follows, (x, v, y), wide, needs_v)
    make = any_bits if all_bits else lambda size, dtype: torch.randn(size).to(dtype)
    gx = make(size, x).to(device) if which != "v" else None
    gv = make(size, wide).to(device) if which != "x" else None
    expected, found = gradients_of(update, gx, gv), None
    with torch.no_grad():  # as autograd runs it
        found = TritonExactState.gradients(update, gx, gv)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or same_bits(a, b)
    # What is one tensor, and the caller's own, stays so: less memory.
    assert (found[1] is found[2]) == (expected[1] is expected[2])
    assert (found[0] is gx) == (expected[0] is gx)
