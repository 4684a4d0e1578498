"""Whole chains and nets by Triton's kernels are those by torch's operations, bit for bit."""

import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mfx
from mfx.engine import ChainPlan, StepFunction, chain
from mfx.engine.arithmetic import triton_states
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.chains import gradients, make_root, make_steps, run, weights_like
from tests.mfx.models import Stack, inputs

DEVICE = "cuda" if ON_GPU else "cpu"
DEPTH = 14


def both(monkeypatch, compute):
    """Return what ``compute`` returns by torch's operations and by kernels, of which there must have been some."""
    results = []
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("MFX_KERNELS", kernels)
        launched = launches(monkeypatch)
        results.append(compute())
        assert bool(launched) == (kernels == "triton")
    return results


def launches(monkeypatch, *, and_launch=True):
    """Count launches of kernels from now on, by kernel."""
    counted, launch = Counter(), triton_states._launch

    def counting(kernel, *args, **kwargs):
        counted[kernel.fn.__name__] += 1
        if and_launch:
            launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton_states, "_launch", counting)
    return counted


CASES = {
    "residual": {},
    "map": {"kind": "map"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "kind": "map"},
    "float64": {"dtype": torch.float64},
    "float": {"arithmetic": "float"},
    "float, bfloat16": {"arithmetic": "float", "dtype": torch.bfloat16, "kind": "map"},
    "float, anchors": {"arithmetic": "float", "gamma": 0.5, "depth": 20},
    "limbs": {"gamma": 1 / 64},
    "residual velocity": {"velocity": "residual"},
    "a velocity": {"velocity": torch.bfloat16},
    "taps": {"taps": (2, 9)},
    "all kept": {"memory_budget": 1.0},
    "some kept": {"memory_budget": ChainPlan(frozenset({0, 1, 5, 13}), from_inputs=False)},
    "inputs kept": {"memory_budget": ChainPlan(frozenset({3}), from_inputs=True)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chains(monkeypatch, case):
    case = dict(case)
    kind, dtype = case.pop("kind", "residual"), case.pop("dtype", torch.float32)
    depth, velocity = case.pop("depth", DEPTH), case.pop("velocity", None)
    root = make_root(depth).to(DEVICE, dtype)

    def compute():
        torch.manual_seed(0)
        x = torch.randn(5, 6).to(DEVICE, dtype).requires_grad_()
        v = velocity
        if isinstance(velocity, torch.dtype):
            v = torch.randn(5, 6).to(DEVICE, velocity).requires_grad_()
        out = run(root, make_steps(root, kind), x, velocity=v, **case)
        loss = sum((weights_like(t) * t).sum() for t in (out.x, *out.taps))
        wanted = [x, v] if isinstance(v, torch.Tensor) else [x]
        found = gradients(loss, root, *wanted, retain_graph=True)
        again = gradients(loss, root, *wanted)
        assert all(map(torch.equal, found, again))
        return [out.x.detach(), *found]

    plain, kernels = both(monkeypatch, compute)
    for a, b in zip(plain, kernels, strict=True):
        if ON_GPU and case.get("arithmetic") == "float":
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)  # torch multiplies by the rounded 1/γ
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("kind", ["residual", "map"])
def test_one_launch_a_step_forward_and_two_back(monkeypatch, arithmetic, kind):
    """Of torch's operations there are the branch's, here sin, cos and a product, and autograd's sum of gradients."""

    def count(depth):
        steps = [StepFunction(f"{i}", (kind,), lambda root, x: (x.sin(),), None, (), ()) for i in range(depth)]
        x = torch.randn(5, 6, device=DEVICE, requires_grad=True)
        monkeypatch.setattr(chain, "notice_overflow", lambda *_: None)  # a CPU looks at every step, others at the last
        # The interpreter, too, is made of operations.
        launched, operations = launches(monkeypatch, and_launch=False), Operations()
        with operations:
            out = run(None, steps, x, arithmetic=arithmetic, verify="off").x
            loss = out.sum()
            forward = operations.count, sum(launched.values())
            loss.backward()
        monkeypatch.undo()
        monkeypatch.setenv("MFX_KERNELS", "triton")
        return *forward, operations.count - forward[0], sum(launched.values()) - forward[1]

    shallow, deep = count(9), count(17)
    assert [(b - a) / 8 for a, b in zip(shallow, deep, strict=True)] == [1, 1, 4, 2]


class Operations(TorchDispatchMode):
    """Counts operations that launch something on a device; random states, which are compared, lie on the host."""

    _NO_LAUNCH = ("empty", "detach", "view", "as_strided", "expand", "alias", "slice", "select", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not any(name in str(func) for name in self._NO_LAUNCH)
        return func(*args, **(kwargs or {}))


class Convolutional(nn.Module):
    """Residual blocks with batch normalization, in channels_last."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Dropout(0.2))
            for _ in range(9)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


NETS = {
    "transformer": (lambda: Stack(9), inputs),
    "convolutions": (Convolutional, lambda: torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last)),
    "torch's own": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 5),
        lambda: torch.randn(3, 2, 8),
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("build, make", NETS.values(), ids=NETS)
def test_nets(monkeypatch, build, make, arithmetic):
    torch.manual_seed(0)
    model, x = build().to(DEVICE), make().to(DEVICE)

    def compute():
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        net = mfx.momentumize(model, arithmetic=arithmetic, verify="raise")
        net.zero_grad()
        out = net(x)
        (weights_like(out) * out).sum().backward()
        return [
            out.detach(),
            *(p.grad.clone() for p in net.parameters() if p.grad is not None),
            *(b.clone() for b in net.buffers()),
        ]

    plain, kernels = both(monkeypatch, compute)
    for a, b in zip(plain, kernels, strict=True):
        if ON_GPU and arithmetic == "float":
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(a, b)


def test_bfloat16_autocast(monkeypatch):
    torch.manual_seed(0)
    model, x = Stack(16).to(DEVICE), inputs().to(DEVICE)

    def compute():
        net = mfx.momentumize(model, verify="raise")
        net.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16):
            out = net(x)
        out.float().square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    assert all(map(torch.equal, *both(monkeypatch, compute)))


def test_what_is_out_of_range_and_not_reproducible_is_said():
    model = Stack(12).to(DEVICE)
    with torch.no_grad():
        model.blocks[1].mix.bias.fill_(-2.5e7)
    net = mfx.momentumize(model)
    if ON_GPU:
        net(inputs().to(DEVICE))  # there it is said at the next call
    with pytest.raises(mfx.MfxError, match=r"the largest 2\.5e\+07"):
        net(inputs().to(DEVICE))
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    noise = iter(range(100))
    steps = [
        StepFunction(f"{i}", ("residual",), lambda root, x: (x.sin() + next(noise),), None, (), ()) for i in range(9)
    ]
    with pytest.raises(mfx.MfxError, match="did not lead back"):
        run(None, steps, x, verify="raise").x.sum().backward()


def test_second_derivatives_and_vectorized_gradients(monkeypatch):
    root = make_root(9).to(DEVICE, torch.float64)

    def compute():
        torch.manual_seed(0)
        x = torch.randn(3, 6, dtype=torch.float64).to(DEVICE).requires_grad_()
        out = run(root, make_steps(root), x).x
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        out = run(root, make_steps(root), x).x.sum(1)
        (rows,) = torch.autograd.grad(out, x, torch.eye(3, dtype=x.dtype, device=DEVICE), is_grads_batched=True)
        return [first.detach(), second, rows]

    assert all(map(torch.equal, *both(monkeypatch, compute)))


def test_explain_rehearses_without_launching(monkeypatch):
    net = mfx.momentumize(Stack(16).to(DEVICE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = [both_kept.chains[0].memory.kept for both_kept in rehearsals(monkeypatch, net)]
    assert kept[1] - kept[0] == 16  # two numbers say what was out of range


def rehearsals(monkeypatch, net):
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("MFX_KERNELS", kernels)
        yield mfx.explain(net, inputs().to(DEVICE))
