"""Exact arithmetic: gradients are those of ordinary backpropagation through the same chain, bit for bit."""

import pytest
import torch

from tests.mfx.engine.chains import WIDTH, block, gradients, make_root, make_steps, recurrence, run, weights_like

GAMMAS = [0.01, 0.1, 0.5, 0.9, 0.99]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("depth", [4, 64])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", ["residual", "map"])
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
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("velocity", [None, "residual", "given"])
@pytest.mark.parametrize("kind", ["residual", "map"])
def test_follows_the_recurrence(kind, velocity, gamma):
    root = make_root(32).double()
    steps = make_steps(root, kind)
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    v = torch.randn_like(x, requires_grad=True) if velocity == "given" else velocity
    inputs = [x, v] if velocity == "given" else [x]
    n = round(gamma * 100)  # digits popped from the store are below the numerator
    found, expected = (f(root, steps, x, gamma=gamma, velocity=v, taps=(5,)) for f in (run, recurrence))
    for a, b in ((found.x, expected.x), (found.taps[0], expected.taps[0])):
        assert torch.allclose(a, b, rtol=0, atol=32**1.5 * n * 2**-40)
        for g, h in zip(
            gradients((a * weights_like(a)).sum(), root, *inputs, retain_graph=True),
            gradients((b * weights_like(b)).sum(), root, *inputs, retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(g, h, rtol=1e-6, atol=1e-6)


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
