"""Correctness on a device: gradients bit for bit against kept activations, under what people train with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mfx
from examples.benchmarks.on_gpu import kernels
from examples.benchmarks.on_gpu.jobs import Job, Setting
from examples.benchmarks.on_gpu.models import Model, small_models, tokens

WIDTH = 32


class Dropping(nn.Module):
    """A residual step with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """(…, WIDTH) to the same."""
        return x + self.branch(x)


def _dropping() -> nn.Module:
    return nn.Sequential(*(Dropping() for _ in range(14)))


DROPOUT = Model("dropout", _dropping, partial(tokens, WIDTH, 2), 5, "tokens", torch.float32)


# --- one step, and what it left behind --------------------------------------------------------------------------------


@contextmanager
def reproducible() -> Iterator[None]:
    """Let torch choose algorithms that give the same bits at every run, where it has them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*determinis")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _measuring_algorithms() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype)


def trained(net: nn.Module, x: Tensor, around: AbstractContextManager[Any]) -> dict[str, Tensor]:
    """Make a step from the same random state; return the output, gradients and buffers."""
    torch.manual_seed(2)
    x = x.detach().requires_grad_()
    with around:
        y = net(x)
        loss = (y * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum()
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **gradients, **dict(net.named_buffers())}  # type: ignore[dict-item]


def scaled(net: nn.Module, x: Tensor, around: AbstractContextManager[Any]) -> dict[str, Tensor]:
    """Make two steps with a GradScaler and SGD; return the parameters."""
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**10)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(2):
        torch.manual_seed(2)
        optimizer.zero_grad()
        with around:
            loss = net(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return {"loss": loss.detach(), **{name: p.detach().clone() for name, p in net.named_parameters()}}


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """Return the largest difference of two steps, relative to each tensor's largest value, and where it is."""
    worst = 0.0, ""
    for name, tensor in expected.items():
        if torch.equal(found[name], tensor):
            continue
        a, b = found[name].double().cpu(), tensor.double().cpu()
        off = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        worst = max(worst, (off if off == off else float("inf"), name))
    return worst


@dataclass(frozen=True)
class Check:
    """Two nets that must agree.

    Attributes:
        name: of the check.
        model: what both are made of.
        expected: makes the net to compare with.
        found: makes the net that is checked.
        around: makes the context of the forward pass.
        train: the step.
        within: the relative difference allowed; 0 for bit for bit, but for what the net to compare with itself differs
            by from run to run.
        kernels: MFX_KERNELS for each of the two.
    """

    name: str
    model: Model
    expected: Callable[[nn.Module], nn.Module]
    found: Callable[[nn.Module], nn.Module]
    around: Callable[[torch.device], AbstractContextManager[Any]] = lambda device: nullcontext()
    train: Callable[[nn.Module, Tensor, AbstractContextManager[Any]], dict[str, Tensor]] = trained
    within: float = 0.0
    kernels: tuple[str, str] = ("auto", "auto")

    def run(self, found: dict[str, Any], setting: Setting) -> None:
        """Make the steps and compare."""
        device = setting.where
        if "triton" in self.kernels and (reason := kernels.refusal(device)) is not None:
            found["left out"] = reason
            return

        def result(make: Callable[[nn.Module], nn.Module], by: str) -> dict[str, Tensor]:
            net, x = make(self.model.built(device)), self.model.input(device)
            with kernels.kernels_by(by):
                return self.train(net, x, self.around(device))

        with reproducible():
            expected = result(self.expected, self.kernels[0])
            off, where = difference(result(self.found, self.kernels[1]), expected)
            found["off by"], allowed = off, self.within
            if off > allowed:  # a device's own algorithms may give other bits at every run
                found["noise"] = difference(result(self.expected, self.kernels[0]), expected)[0]
                allowed = max(allowed, 8 * found["noise"])
            found["right"] = off <= allowed
            if off > allowed:
                raise AssertionError(f"off by {off:.1e} in {where}, where {allowed:.0e} is allowed")


def _exact(model: nn.Module, **options: Any) -> nn.Module:
    return mfx.momentumize(model, **{"verify": "raise", **options})


def _kept(model: nn.Module) -> nn.Module:
    return mfx.momentumize(model, memory_budget=1.0)


def _float(model: nn.Module, **options: Any) -> nn.Module:
    return mfx.momentumize(model, arithmetic="float", **options)


def _compiled(model: nn.Module) -> nn.Module:
    net: Any = torch.compile(_exact(model))
    return net


def _itself(model: nn.Module) -> nn.Module:
    return model


def checks(setting: Setting) -> list[Check]:
    """The checks, by importance."""
    small = small_models()
    decoder, convolutions = small[0], small[1]
    everyday = small[:1] if setting.tiny else small
    narrow = small_models(torch.bfloat16)
    amp, half = partial(_autocast, torch.bfloat16), partial(_autocast, torch.float16)
    gamma_0 = partial(_exact, gamma=0.0)
    found = [
        *(Check(f"exact = kept: {model.name}", model, _kept, _exact) for model in everyday),
        Check("exact = kept: dropout", DROPOUT, _kept, _exact),
        *(Check(f"γ = 0 = plain: {model.name}", model, _itself, gamma_0) for model in (*everyday, DROPOUT)),
        *(Check(f"exact = kept, autocast bf16: {m.name}", m, _kept, _exact, amp) for m in (decoder, convolutions)),
        *(Check(f"exact = kept, bf16: {model.name}", model, _kept, _exact) for model in (narrow[0], narrow[2])),
        Check("exact = kept, GradScaler: Llama-like", decoder, _kept, _exact, half, scaled),
        Check(
            "exact = kept, cudnn.benchmark: ResNet",
            convolutions,
            _kept,
            _exact,
            lambda device: _measuring_algorithms(),
        ),
        *(
            Check(f"float ≈ kept: {m.name}", m, partial(_float, memory_budget=1.0), _float, within=1e-2)
            for m in (decoder, DROPOUT)
        ),
    ]
    by = ("torch", "triton")
    found[len(everyday) : len(everyday)] = [
        Check(f"kernels = operations: {model.name}", model, _exact, _exact, kernels=by)
        for model in (decoder, convolutions, DROPOUT)
    ]
    return found[:: 3 if setting.tiny else 1]


def compiled_agrees(found: dict[str, Any], setting: Setting) -> None:
    """Compare a compiled net with itself, not compiled; Inductor's roundings are its own."""
    model = small_models()[0]
    Check("", model, _exact, _compiled, within=1e-3).run(found, setting)


def captured_agrees(found: dict[str, Any], setting: Setting) -> None:
    """Capture a training step in a CUDA graph, and compare its replay with the step."""
    device = setting.where
    if device.type != "cuda":
        found["left out"] = "CUDA graphs are CUDA's"
        return
    model = small_models()[0]
    net, x = _exact(model.built(device), verify="warn"), model.input(device)
    expected = trained(_exact(model.built(device)), x, nullcontext())
    x = x.detach().requires_grad_()
    weights = torch.linspace(-1, 1, expected["output"].numel(), device=device).view_as(expected["output"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net(x).backward(weights)
    torch.cuda.current_stream().wait_stream(side)
    net.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(x).backward(weights)
    graph.replay()
    torch.cuda.synchronize()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    off, where = difference({**expected, "input": x.grad, **gradients}, expected)
    found["right"], found["off by"] = off == 0, off
    if off:
        raise AssertionError(f"off by {off:.1e} in {where}")


def jobs(setting: Setting) -> Sequence[Job]:
    """All checks, by importance; kernels first, for nets are made of them."""
    of_kernels, nets = kernels.jobs(setting), _net_jobs(setting)
    if setting.tiny:
        return [*of_kernels, *nets]
    half = len(of_kernels) // 2  # float32 and bfloat16
    whole = Job("kernels", "all tests, by pytest", lambda found: kernels.by_pytest(found, setting), 160)
    return [*of_kernels[:half], *nets, *of_kernels[half:], whole]


def _net_jobs(setting: Setting) -> list[Job]:
    def job(check: Check) -> Job:
        return Job("nets", check.name, lambda found: check.run(found, setting), 60)

    others = {"a captured graph = the step": captured_agrees}
    if not setting.tiny:
        others["compiled ≈ not compiled"] = compiled_agrees
    return [
        *map(job, checks(setting)),
        *(
            Job("nets", name, lambda found, run=run: run(found, setting), 120)  # type: ignore[misc]
            for name, run in others.items()
        ),
    ]
