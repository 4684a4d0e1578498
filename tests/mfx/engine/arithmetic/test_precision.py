"""Autocast, gradient scaling and low-precision modules, against ordinary backpropagation through the same network."""

import pytest
import torch
from torch import nn

from mfx.modules.recomputing import recomputing
from tests.mfx.engine.chains import WIDTH, block, make_root, make_steps, run

DEPTH = 17  # more than exact arithmetic would keep the inputs of, in bfloat16 too
CASES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


@pytest.fixture(params=CASES, ids=str)
def how(request):
    arithmetic, gamma = request.param
    return {"arithmetic": arithmetic, "gamma": gamma}


def data(dtype=torch.float32):
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def assert_same(found, expected, how, dtype=torch.float32):
    """Bit for bit, but for float arithmetic, whose rebuilt inputs may round to a neighbour in the branch's dtype."""
    assert max(g.abs().max() for g in expected) > 1e-3
    for a, b in zip(found, expected, strict=True):
        if how["arithmetic"] == "exact":
            assert torch.equal(a, b)
        else:
            # A rounding to a neighbour in every step, as if all fell the same way.
            torch.testing.assert_close(a, b, rtol=0, atol=DEPTH * torch.finfo(dtype).eps * float(b.abs().max()))


def both(build, loss, how, dtype=torch.float32):
    """Gradients of ``loss(root, steps, x, budget)`` with nothing kept and with all kept."""
    results = []
    for budget in (0.0, 1.0):
        root, x = make_root(DEPTH, build).to(dtype), data(dtype)
        loss(root, x, budget).backward()
        results.append([x.grad, *(p.grad for p in root.parameters())])
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cache", [True, False])
def test_autocast(how, dtype, cache):
    seen = []

    def loss(root, x, budget):
        root.blocks[3].register_forward_hook(lambda m, a, y: seen.append((y.dtype, recomputing())))
        with torch.autocast("cpu", dtype, cache_enabled=cache):
            return run(root, make_steps(root), x, memory_budget=budget, **how).x.float().square().sum()

    assert_same(*both(block, loss, how), how, dtype)
    assert seen == [(dtype, False), (dtype, True), (dtype, False)]


class Island(nn.Module):
    """A part in float32 and a part in bfloat16, whatever is around."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(), nn.Linear(WIDTH, WIDTH)
        self.seen = []
        self.note = self.seen.append  # a recomputation puts the module's list back, not what a method is bound to

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            y = self.first(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            z = self.second(y)
        self.note((y.dtype, z.dtype, recomputing()))
        return z.to(x.dtype).sin()  # saves its input: a second run comes as far as this


@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16, None], ids=str)
def test_autocast_inside_a_branch(how, around):
    seen = []

    def loss(root, x, budget):
        with torch.autocast("cpu", around or torch.bfloat16, enabled=around is not None):
            y = run(root, make_steps(root), x, memory_budget=budget, **how).x
        seen.append(root.blocks[3].seen)
        return y.float().square().sum()

    assert_same(*both(Island, loss, how), how, torch.bfloat16)
    dtypes = torch.float32, torch.bfloat16
    assert seen == [[(*dtypes, False), (*dtypes, True)], [(*dtypes, False)]]


@pytest.mark.parametrize("later", [torch.bfloat16, torch.float16], ids=str)
def test_another_autocast_around_the_backward_pass(how, later):
    class Backward(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = block()

        def forward(self, x):
            assert not recomputing() or not torch.is_autocast_enabled("cpu")
            return self.net(x)

    def gradients(root, x, budget):
        return run(root, make_steps(root), x, memory_budget=budget, **how).x.square().sum()

    results = []
    for budget in (0.0, 1.0):
        root, x = make_root(DEPTH, Backward), data()
        loss = gradients(root, x, budget)
        with torch.autocast("cpu", later):
            loss.backward()
            assert torch.get_autocast_dtype("cpu") == later
        results.append([x.grad, *(p.grad for p in root.parameters())])
    assert_same(*results, how, later)  # autocast rounds what the backward pass itself multiplies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_modules_of_other_dtypes(how, dtype):
    def loss(root, x, budget):
        return run(root, make_steps(root), x, memory_budget=budget, **how).x.float().square().sum()

    assert_same(*both(block, loss, how, dtype), how, torch.float32 if dtype is torch.float64 else dtype)


def test_gradient_scaler_skips_what_overflows_and_goes_on(how):
    """The first scale is beyond float16: steps are skipped and the scale halved until gradients fit."""
    results = []
    for budget in (0.0, 1.0):
        root = make_root(DEPTH)
        optimizer = torch.optim.SGD(root.parameters(), 0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)
        scales = []
        for _ in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = run(root, make_steps(root), data(), memory_budget=budget, **how).x.float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append((scales, [p.detach() for p in root.parameters()]))
    assert results[0][0] == results[1][0]
    assert min(results[0][0]) < 2.0**18
    assert_same(results[0][1], results[1][1], how, torch.float16)
