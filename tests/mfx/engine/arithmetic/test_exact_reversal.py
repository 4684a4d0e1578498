"""Exact arithmetic in the engine: every state is rebuilt bit for bit, and follows the recurrence of real numbers."""

from fractions import Fraction

import torch

from mfx.engine import StepFunction
from mfx.engine.arithmetic import ExactState
from mfx.options.gamma import Gamma
from tests.mfx.engine.chains import run
from tests.sampling import grid

GAMMAS = [1e-3, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CHAINS = [("residual", 4), ("map", 16), ("residual", 64), ("map", 256), ("residual", 1000)]
BITS = 120  # of the oracle's fractions


class Spy:
    """A chain of steps that log what they read and gave, and the states at which it starts and ends its walk back."""

    def __init__(self, monkeypatch, kind, depth, sizes):
        self.reads, self.gave = [[] for _ in range(depth)], [None] * depth
        self.sizes, self.starts, self.ends = sizes, [], []
        self.steps = [StepFunction(f"{i}", (kind,), self.branch(i), None, (), ()) for i in range(depth)]
        start, is_start = ExactState.start.__func__, ExactState.is_start

        def spied_start(cls, x, v, **options):
            state = start(cls, x, v, **options)
            self.starts.append((whole(state.X), whole(state.V)))
            return state

        def spied_is_start(state):
            self.ends.append((whole(state.X), whole(state.V), bool(state.store.is_empty())))
            return is_start(state)

        monkeypatch.setattr(ExactState, "start", classmethod(spied_start))
        monkeypatch.setattr(ExactState, "is_start", spied_is_start)
        # Whatever is cheaper: it is the walk that is tested.
        monkeypatch.setattr(ExactState, "walks_back", staticmethod(lambda *_: True))

    def branch(self, i):
        def f(root, x):
            self.reads[i].append(x.detach().clone())
            # A spring and a wave, another one at every step: of either sign, and at every depth x and gradients are
            # bounded, as the slope is between −3/4 and −1/4.
            y = self.sizes * torch.sin(x / self.sizes / 4 + i) - x / 2
            if self.steps[i].kinds == ("map",):
                y = x + y
            self.gave[i] = y.detach().clone()
            return (y,)

        return f


def given(dtype):
    """Sizes, and x and v of these sizes and either sign."""
    largest = min(1e6, torch.finfo(dtype).max / 16)
    sizes = torch.tensor([1e-9, 1e-6, 1e-3, 1.0, 30.0, 1e3, largest / 10, largest], dtype=torch.float64)
    sizes = sizes.repeat_interleave(2).to(dtype).clamp_min(torch.finfo(dtype).tiny)
    return sizes, sizes * torch.tensor([1, -1] * 8).to(dtype), sizes * torch.tensor([-0.01, 0.02] * 8).to(dtype)


def whole(t):
    return t.to(torch.int64, copy=True)


def fixed(t):
    return [(n << BITS) // d for n, d in map(float.as_integer_ratio, t.tolist())]


def recurrence(spy, kind, gamma):
    """The last x in fixed point of 120 bits, from the first state and what the branches gave; elements one by one."""
    n, d = gamma.numerator, gamma.denominator
    X, V = ([e << BITS - 40 for e in t.tolist()] for t in spy.starts[0])
    for y in spy.gave:
        F = [a - b for a, b in zip(fixed(y), X, strict=True)] if kind == "map" else fixed(y)
        V = [(n * v + (d - n) * f) // d for v, f in zip(V, F, strict=True)]
        X = [a + b for a, b in zip(X, V, strict=True)]
    return X


@grid(20, gamma=GAMMAS, chain=CHAINS, dtype=DTYPES)
def test_every_state_is_rebuilt(monkeypatch, gamma, chain, dtype):
    kind, depth = chain
    sizes, x, v = given(dtype)
    spy = Spy(monkeypatch, kind, depth, sizes)
    fraction = Gamma.of(gamma)
    ends = []
    advance = ExactState.advance
    monkeypatch.setattr(ExactState, "advance", lambda state, *a: (advance(state, *a), ends.append(whole(state.X)))[0])
    out = run(None, spy.steps, x.requires_grad_(), gamma=gamma, velocity=v).x
    real = recurrence(spy, kind, fraction)
    (out * torch.linspace(-1, 1, out.numel(), dtype=dtype)).sum().backward()
    assert torch.isfinite(x.grad).all()

    for forward, back in spy.reads:
        assert torch.equal(forward, back)
    [(X, V)], [(X_end, V_end, is_empty)] = spy.starts, spy.ends
    assert torch.equal(X_end, X)
    assert torch.equal(V_end, V)
    assert is_empty

    # Multiplying by n/d is off by less than n units of 2⁻⁴⁰ at every step; forming (1−γ)·f in float64 by two roundings.
    for found, expected, size in zip(ends[-1].tolist(), real, sizes.tolist(), strict=True):
        unit = fraction.numerator * 2.0**-40 + 4 * size * 2.0**-52
        assert abs(Fraction(int(found), 2**40) - Fraction(expected, 2**BITS)) <= unit * depth**1.5
