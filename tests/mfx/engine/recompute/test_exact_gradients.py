"""Exact arithmetic: gradients are those of ordinary backpropagation through the same chain, bit for bit."""

import pytest
import torch
from torch import nn

from mfx.engine import StepFunction
from mfx.engine.arithmetic import ExactState
from mfx.options.gamma import Gamma
from tests.mfx.engine.chains import WIDTH, block, gradients, make_root, make_steps, recurrence, run, weights_like
from tests.sampling import grid

GAMMAS = [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@grid(32, kind=["residual", "map"], gamma=GAMMAS, depth=[4, 64], dtype=DTYPES)
def test_bit_equal_to_backpropagation(kind, gamma, depth, dtype):
    root = make_root(depth).to(dtype)
    steps = make_steps(root, kind)
    x = torch.randn(3, WIDTH, dtype=dtype, requires_grad=True)
    results = []
    for budget in (0.0, 1.0):
        out = run(root, steps, x, gamma=gamma, memory_budget=budget).x
        assert out.dtype == dtype
        results.append([out, *gradients((out * weights_like(out)).sum(), root, x)])
    assert all(map(torch.equal, *results))


# Fixed point rounds by 2^-41 = 4.5e-13 per step, and multiplying by n/d loses less than n units of 2^-40: at γ = 9/10
# and depth 32 that is below 32^1.5 * 10 * 2^-40 = 1.7e-9, which branches of Lipschitz constant about 1 keep so.
@grid(24, kind=["residual", "map"], velocity=[None, "residual", "given"], gamma=GAMMAS)
def test_follows_the_recurrence(kind, velocity, gamma):
    root = make_root(32).double()
    steps = make_steps(root, kind)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x, requires_grad=True) if velocity == "given" else velocity
    inputs = [x, v] if velocity == "given" else [x]
    fraction = Gamma.of(gamma)
    n = fraction.numerator  # digits popped from the store are below it
    found = run(root, steps, x, gamma=gamma, velocity=v, taps=(5,))
    expected = recurrence(root, steps, x, gamma=fraction.value, velocity=v, taps=(5,))
    for a, b in ((found.x, expected.x), (found.taps[0], expected.taps[0])):
        bound = 32**1.5 * n * 2**-40
        assert torch.allclose(a, b, rtol=0, atol=bound)
        for g, h in zip(
            gradients((a * weights_like(a)).sum(), root, *inputs, retain_graph=True),
            gradients((b * weights_like(b)).sum(), root, *inputs, retain_graph=True),
            strict=True,
        ):
            # Derivatives of tanh layers of order 1 at points that differ by so much, in 32 steps one after the other.
            assert (g - h).abs().max() <= 32 * bound * max(h.abs().max(), 1)


def shared(depth):
    """One module in every step."""
    root = make_root(depth)
    root.blocks = nn.ModuleList([root.blocks[0]] * depth)
    return root, make_steps(root), ()


def reading_captures_twice(depth):
    """Every branch reads the same two captures, one of them two times."""
    root = make_root(depth)
    captures = (torch.randn(3, WIDTH, requires_grad=True), torch.randn(WIDTH, requires_grad=True))
    steps = make_steps(root, "map", lambda f, x, a, b: x + f(x * torch.sigmoid(a)) + a * b, (0, 1))
    return root, steps, captures


def nested(depth):
    """Every branch runs a chain of its own."""
    root = make_root(depth)
    root.inner = nn.ModuleList([make_root(12, seed=i) for i in range(depth)])

    def step(i):
        def branch(r, x):
            return (run(r.inner[i], make_steps(r.inner[i]), r.blocks[i](x), gamma=0.5).x,)

        return StepFunction(f"{i}", ("residual",), branch, branch, (), (f"blocks.{i}", f"inner.{i}"))

    return root, [step(i) for i in range(depth)], ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [(), (3, 9)])
@pytest.mark.parametrize("build", [shared, reading_captures_twice, nested])
def test_bit_equal_however_the_chain_is_woven(monkeypatch, build, taps, dtype):
    monkeypatch.setattr(ExactState, "walks_back", staticmethod(lambda *_: True))  # walked back at any depth
    root, steps, captures = build(12)
    root, captures = root.to(dtype), [c.detach().to(dtype).requires_grad_() for c in captures]
    x = torch.randn(3, WIDTH, dtype=dtype, requires_grad=True)
    results = []
    for budget in (0.0, 1.0):
        out = run(root, steps, x, captures, taps=taps, memory_budget=budget)
        loss = sum((t * weights_like(t)).sum() for t in (out.x, *out.taps))
        results.append([out.x, *out.taps, *gradients(loss, root, x, *captures)])
    assert all(map(torch.equal, *results))
    assert all(t.abs().sum() > 0 for t in results[0])


@pytest.mark.filterwarnings("ignore:mfx. chain blocks. the backward pass of one graph")  # one for every element
@pytest.mark.parametrize("kind", ["residual", "map"])
@pytest.mark.parametrize("gamma", [0.1, 0.9])
def test_gradcheck(monkeypatch, gamma, kind):
    monkeypatch.setattr(ExactState, "walks_back", staticmethod(lambda *_: True))
    root = make_root(5, lambda: block(2)).double()
    x, v = (torch.randn(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    steps, parameters = make_steps(root, kind), list(root.parameters())[:4]

    def f(x, v, *parameters):
        out = run(root, steps, x, gamma=gamma, velocity=v, taps=(2,))
        return out.x, out.taps[0]

    # The function has steps of 2⁻⁴⁰ = 9e-13: differences over 1e-4 see slopes to 1e-8 for every one of n·T units.
    assert torch.autograd.gradcheck(f, (x, v, *parameters), eps=1e-4, atol=1e-5, rtol=1e-4)


def test_block_sees_the_very_same_input_again():
    root = make_root(20).bfloat16()
    seen = [[] for _ in root.blocks]
    for f, log in zip(root.blocks, seen, strict=True):
        f.register_forward_pre_hook(lambda _, args, log=log: log.append(args[0].detach().clone()))
    x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
    run(root, make_steps(root), x).x.sum().backward()
    for first, second in seen:
        assert torch.equal(first, second)


def test_block_is_not_trivial():
    x = torch.randn(3, WIDTH)
    assert not torch.allclose(block()(x), torch.zeros(3, WIDTH), atol=0.1)
