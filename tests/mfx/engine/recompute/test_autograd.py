"""The chain as a part of ordinary autograd graphs, in both arithmetics and however its branches are provided for."""

import pytest
import torch
from torch import nn

from mfx.engine import StepFunction
from tests.mfx.engine.chains import WIDTH, error, gradients, make_root, make_steps, recurrence, run, weights_like

ARITHMETICS = ["exact", "float"]
# 16 float64 steps: exact errs by fixed point (see test_exact_gradients), float by eps·γ^-16, both far below.
CLOSE = 1e-7


@pytest.fixture(params=ARITHMETICS)
def arithmetic(request):
    return request.param


def chain(depth=16, call=None, captures=(), kind="residual"):
    root = make_root(depth).double()
    return root, make_steps(root, kind, call, captures), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)


def compare(loss, root, steps, x, *inputs, captures=(), arithmetic, **kw):
    found = gradients(loss(run(root, steps, x, captures, arithmetic=arithmetic, **kw)), root, x, *inputs)
    expected = gradients(loss(recurrence(root, steps, x, captures, **kw)), root, x, *inputs)
    assert error(found, expected) < CLOSE
    assert max(g.abs().max() for g in expected) > 1e-3


def total(out):
    return (out.x * weights_like(out.x)).sum()


def test_shared_parameters(arithmetic):
    root, _, x = chain(2)
    root.blocks = nn.ModuleList([root.blocks[i % 2] for i in range(16)])
    root.runs = [0] * 16
    compare(total, root, make_steps(root), x, arithmetic=arithmetic)


def test_captures_read_twice_get_gradients(arithmetic):
    root, steps, x = chain(call=lambda f, x, c, pair: f(x * c) + c.tanh() + pair["b"] * pair["n"], captures=(1, 0))
    b, c = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(2))
    compare(total, root, steps, x, b, c, captures=({"b": b + 0, "n": 2}, c + 0), arithmetic=arithmetic)


def test_taps_and_output(arithmetic):
    root, steps, x = chain()
    compare(
        lambda o: total(o) + o.taps[0].sin().sum() * o.taps[1].mean(),
        root,
        steps,
        x,
        taps=(3, 9),
        arithmetic=arithmetic,
    )


def test_tap_alone_with_the_output_dropped(arithmetic):
    root, steps, x = chain()
    compare(lambda o: o.taps[0].sin().sum(), root, steps, x, taps=(5,), arithmetic=arithmetic)


def test_side_outputs(arithmetic):
    root, steps, x = chain(call=lambda f, x: (f(x), x.sin(), "a string"))
    compare(lambda o: o.sides[4][0].sum() + total(o), root, steps, x, arithmetic=arithmetic)
    compare(lambda o: o.sides[4][0].sum(), root, steps, x, arithmetic=arithmetic)
    assert run(root, steps, x, arithmetic=arithmetic).sides[3][1] == "a string"


@pytest.mark.parametrize("velocity", ["residual", "given"])
@pytest.mark.parametrize("kind", ["residual", "map"])
def test_velocities(arithmetic, velocity, kind):
    root, steps, x = chain(kind=kind)
    v = torch.randn_like(x, requires_grad=True)
    if velocity == "given":
        compare(total, root, steps, x, v, velocity=v, arithmetic=arithmetic)
    else:
        compare(total, root, steps, x, velocity="residual", arithmetic=arithmetic)


def test_input_without_gradient(arithmetic):
    root, steps, x = chain()
    x = x.detach()
    found = gradients(total(run(root, steps, x, arithmetic=arithmetic)), root)
    assert error(found, gradients(total(recurrence(root, steps, x)), root)) < CLOSE


def test_frozen_parameters(arithmetic):
    root, steps, x = chain()
    for f in list(root.blocks)[::2]:
        f.requires_grad_(False)
    compare(total, root, steps, x, arithmetic=arithmetic)
    root.requires_grad_(False)
    compare(total, root, steps, x, arithmetic=arithmetic)
    out = run(root, steps, x.detach(), arithmetic=arithmetic).x
    assert not out.requires_grad


def test_retained_graph_gives_the_same_gradients_again(arithmetic):
    root, steps, x = chain()
    loss = total(run(root, steps, x, arithmetic=arithmetic))
    first = gradients(loss, root, x, retain_graph=True)
    second = gradients(loss, root, x, retain_graph=True)
    last = gradients(loss, root, x)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, last, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(loss, root, x)


def test_gradient_of_the_input_alone(arithmetic):
    root, steps, x = chain()
    (found,) = torch.autograd.grad(total(run(root, steps, x, arithmetic=arithmetic)), x)
    assert error([found], [torch.autograd.grad(total(recurrence(root, steps, x)), x)[0]]) < CLOSE


@pytest.mark.parametrize("taps", [(), (3,)])
def test_double_backward_with_the_output_dropped(arithmetic, taps):
    root, steps, x = chain(14)
    results = []
    for f in (
        lambda: run(root, steps, x, arithmetic=arithmetic, taps=taps),
        lambda: recurrence(root, steps, x, taps=taps),
    ):
        out = f()
        loss = out.x.sum() + sum(t.sum() for t in out.taps)
        del out
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        del loss
        results.append([g, *gradients(g.pow(2).sum(), root, x)])
    assert error(*results) < CLOSE


@pytest.mark.filterwarnings("ignore:mfx. chain blocks. the backward pass of one graph")  # one for every element
def test_gradgradcheck(arithmetic):
    # Finite differences of step 1e-6 see fixed point's steps of 2^-40 as slopes of 1e-6: hence the tolerance.
    root, steps, x = chain(9)
    x = x[:1, :]
    f = lambda x: run(root, steps, x, arithmetic=arithmetic).x  # noqa: E731
    assert torch.autograd.gradcheck(f, x, eps=1e-4, atol=1e-5)
    assert torch.autograd.gradgradcheck(f, x, eps=1e-4, atol=1e-5)


def test_two_calls_in_one_graph(arithmetic):
    root, steps, x = chain()
    found = run(root, steps, x, arithmetic=arithmetic).x ** 2 + run(root, steps, x, arithmetic=arithmetic).x ** 3
    y = recurrence(root, steps, x).x
    weights = weights_like(y)
    pair = [gradients((z * weights).sum(), root, x) for z in (found, y**2 + y**3)]
    assert error(*pair) < CLOSE


@pytest.mark.parametrize("outer_gamma", [0.0, 0.9])
@pytest.mark.parametrize("taps", [(), (2,)])
def test_nested_chains(arithmetic, outer_gamma, taps):
    inner = [make_root(8, seed=i).double() for i in range(9)]
    root = make_root(9).double()
    root.inner = nn.ModuleList(inner)

    def steps(call):
        def step(i):
            def branch(r, x):
                out = call(r.inner[i], make_steps(r.inner[i]), r.blocks[i](x))
                return (out.x + sum(out.taps),)

            return StepFunction(
                f"{i}", ("residual",), branch, lambda r, x: (x + branch(r, x)[0],), (), (f"blocks.{i}", f"inner.{i}")
            )

        return [step(i) for i in range(9)]

    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    ours = lambda r, s, x: run(r, s, x, arithmetic=arithmetic, taps=taps)  # noqa: E731
    plain = lambda r, s, x: recurrence(r, s, x, taps=taps)  # noqa: E731
    found = gradients(total(run(root, steps(ours), x, arithmetic=arithmetic, gamma=outer_gamma)), root, x)
    expected = gradients(total(recurrence(root, steps(plain), x, gamma=outer_gamma)), root, x)
    assert error(found, expected) < 1e-6
    if arithmetic == "exact":
        ordinary = lambda r, s, x: run(r, s, x, memory_budget=1.0, taps=taps)  # noqa: E731
        expected = gradients(total(run(root, steps(ordinary), x, memory_budget=1.0, gamma=outer_gamma)), root, x)
        assert all(map(torch.equal, found, expected))


def test_inside_checkpoint(arithmetic):
    root, steps, x = chain()
    y = torch.utils.checkpoint.checkpoint(
        lambda x: run(root, steps, x * 1, arithmetic=arithmetic).x, x, use_reentrant=False
    )
    weights = weights_like(y)
    expected = gradients((recurrence(root, steps, x).x * weights).sum(), root, x)
    assert error(gradients((y * weights).sum(), root, x), expected) < CLOSE


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_autograd_inside_a_branch(arithmetic, gamma):
    def call(f, x):
        x = x * 1
        if not x.requires_grad:
            x.requires_grad_()
        energy = f(x).pow(2).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0] * 0.1

    root, steps, x = chain(10, call)
    compare(total, root, steps, x, arithmetic=arithmetic, gamma=gamma)


@pytest.mark.parametrize("gamma, budget", [(0.9, 0.0), (0.9, 1.0), (0.0, 0.0), (0.0, 1.0)])
def test_number_of_runs(arithmetic, gamma, budget):
    root, steps, x = chain()
    out = run(root, steps, x, gamma=gamma, memory_budget=budget, arithmetic=arithmetic).x
    out.sum().backward()
    assert root.runs == [2 if budget == 0 else 1] * 16
    with torch.no_grad():
        run(root, steps, x, gamma=gamma, memory_budget=budget, arithmetic=arithmetic)
    assert root.runs == [3 if budget == 0 else 2] * 16


@pytest.mark.parametrize("budget", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["residual", "map"])
def test_gamma_zero_is_the_original_network(arithmetic, budget, dtype, kind):
    root = make_root(7).to(dtype)
    steps = make_steps(root, kind, lambda f, x, c: f(x) + x.sin() * c, captures=(0,))
    x, c = (torch.randn(3, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
    out = run(root, steps, x, (c,), gamma=0.0, memory_budget=budget, arithmetic=arithmetic, taps=(4,))
    y = x
    for t, step in enumerate(steps):
        y = step.original(root, y, c)[0]
        tap = y if t == 3 else tap if t > 3 else None  # noqa: F821
    found, expected = (
        gradients((a * weights_like(a)).sum() + b.sum(), root, x, c) for a, b in ((out.x, out.taps[0]), (y, tap))
    )
    assert torch.equal(out.x, y)
    assert all(map(torch.equal, found, expected))


def test_without_gradients_the_float_recurrence_runs():
    root, steps, x = chain()
    with torch.no_grad():
        exact = run(root, steps, x).x
        assert torch.equal(exact, run(root, steps, x, arithmetic="float").x)
    assert torch.allclose(exact, recurrence(root, steps, x).x, rtol=0, atol=1e-12)


# A step back divides the velocity's error by γ; anchors are set so that it stays below 6e-6, and 1e-10 in float64. The
# gradients' error is a small multiple of that; 17 and 10 times as much is allowed.
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-9)], ids=str)
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["residual", "map"])
def test_float_error_is_bounded_at_depth_64(kind, gamma, dtype, bound):
    root = make_root(64).to(dtype)
    steps = make_steps(root, kind)
    x = torch.randn(4, WIDTH, dtype=dtype, requires_grad=True)
    found, expected = (
        gradients(total(run(root, steps, x, gamma=gamma, arithmetic="float", memory_budget=b)), root, x)
        for b in (0.0, 1.0)
    )
    assert error(found, expected) < bound
