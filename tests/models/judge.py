"""The tests that every model has to pass, of whatever library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests import sampling
from tests.models.step import assert_bit_equal, identity_adds, is_identity, measure, tensors_in, train_step
from tests.oracles import assert_close_grads


@dataclass(frozen=True)
class Case:
    """A model to judge.

    Args:
        name: in the test's id.
        make: makes the model; weights are drawn after `torch.manual_seed`.
        shapes: of its inputs.
        chains: how many steps each chain has, in the order of ``explain``; None to leave that open.
        rejected: how many identity residual adds stay as they are.
        opaque: how many identity residual adds lie inside modules that cannot be traced and are called as they are.
        saves: whether its chains are so long, at this size, that the peak falls.
        warns: what momentumize warns of, here rightly.
        fails: verdicts known not to be met, and why.
    """

    name: str
    make: Callable[[], nn.Module]
    shapes: Sequence[tuple[int, ...]]
    chains: Sequence[int] | None = None
    rejected: int = 0
    opaque: int = 0
    saves: bool = True
    warns: str | None = None
    fails: Mapping[str, str] = field(default_factory=dict)

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for p in model.parameters():
                if (
                    p.abs().max() < 1e-3
                ):  # heads that begin at 0 and layer scales at 1e-6 would hide what is behind them
                    p.normal_(std=0.1)
        return model.to(dtype).train()

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in self.shapes)


# --- the verdicts -----------------------------------------------------------------------------------------------------


def assert_captured(case: Case) -> None:
    """Without names or inputs; the right chains, every identity add accounted for, checkpoints load both ways."""
    model = case.model()
    keys = list(model.state_dict())
    net = mfx.momentumize(model)
    assert type(net) is type(model)
    assert list(net.state_dict()) == keys == list(model.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))
    model.load_state_dict(net.state_dict(), strict=True)
    net.load_state_dict(model.state_dict(), strict=True)

    inputs = case.inputs()
    found = mfx.explain(model, *inputs)
    lengths = [len(chain.steps) for chain in found.chains]
    at_run_time = identity_adds(model, inputs)
    rejected = [str(rejection) for rejection in found.rejections if is_identity(rejection)]
    table = f"{at_run_time} identity adds at run time, chains {lengths}, rejected:\n" + "\n".join(rejected)
    assert sum(lengths) + len(rejected) + case.opaque == at_run_time, table
    if case.chains is not None:
        assert (lengths, len(rejected)) == (list(case.chains), case.rejected), table


def assert_gamma_zero_is_the_model(case: Case) -> None:
    """Outputs, gradients, buffers and random state, bit for bit; at γ = 0.9 it is another function."""
    model, inputs = case.model(), case.inputs()
    plain = train_step(model, inputs)
    assert_bit_equal(train_step(mfx.momentumize(model, gamma=0.0), inputs), plain)


def assert_exact_gradients(case: Case) -> None:
    """Bit for bit those of ordinary backpropagation through the same momentum network, which is not the model."""
    model, inputs = case.model(), case.inputs()
    reversible = train_step(mfx.momentumize(model, verify="raise"), inputs)
    assert_bit_equal(reversible, train_step(mfx.momentumize(model, memory_budget=1.0), inputs))
    with torch.no_grad():
        model.eval()
        plain, momentum = tensors_in(model(*inputs)), tensors_in(mfx.momentumize(model)(*inputs))
    assert not all(map(torch.equal, plain, momentum)), "at γ = 0.9 the network computes what it did before"


TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}


def assert_float_gradients(case: Case, dtype: torch.dtype) -> None:
    """Those of ordinary backpropagation through the same network, but for the rounding of the rebuilt states.

    The tolerance is relative to each parameter's own gradient, but no finer than one eps of the largest gradient in the
    network: ``|Δp| ≤ max(tolerance·|gp|, eps·max|gq|)``. For some gradients are sums of large terms that cancel: the
    bias in front of a BatchNorm has gradient 0, and so has a BatchNorm's own bias where a 1×1 convolution and another
    BatchNorm follow (every linear bottleneck of mobilenet, mnasnet and efficientnet). What is computed for them is the
    rounding error of the terms, by plain backpropagation too. Measured on these models: such gradients are below 1e-4
    of the largest one and differ by up to 0.25 eps of it; all others by less than 1e-5 relative (1e-13 in float64).
    """
    model, inputs = case.model(dtype), case.inputs(dtype)
    reversible = train_step(mfx.momentumize(model, arithmetic="float"), inputs)
    ordinary = train_step(mfx.momentumize(model, arithmetic="float", memory_budget=1.0), inputs)
    assert all(map(torch.equal, reversible.outputs, ordinary.outputs)), "forward passes differ"
    tolerance = TOLERANCES[dtype]
    assert_close_grads(reversible.grads, ordinary.grads, tolerance, noise=torch.finfo(dtype).eps / tolerance)


def assert_float32_gradients(case: Case) -> None:
    """With smooth activations: a rebuilt state that is off by 1e-6 puts one in a million ReLUs on the other side of 0.

    That is no error that a tolerance could describe. The network with its own activations is judged in float64.
    """
    assert_float_gradients(replace(case, make=lambda: smoothed(case.make())), torch.float32)


def smoothed(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.ReLU6 | nn.Hardswish):
                setattr(module, name, nn.GELU())
            elif isinstance(child, nn.Hardsigmoid):
                setattr(module, name, nn.Sigmoid())
    return model


def assert_float64_gradients(case: Case) -> None:
    assert_float_gradients(case, torch.float64)


def assert_saves_memory(case: Case) -> None:
    """Both what is kept between forward and backward, and the peak of the two, are below plain backpropagation's."""
    model, inputs = case.model(), case.inputs()
    plain, reversible = measure(model, inputs), measure(mfx.momentumize(model), inputs)
    assert reversible.kept < plain.kept
    assert reversible.peak < plain.peak


Verdict: TypeAlias = Callable[[Case], None]
VERDICTS: dict[str, Verdict] = {
    "captured": assert_captured,
    "gamma0": assert_gamma_zero_is_the_model,
    "exact": assert_exact_gradients,
    "float32": assert_float32_gradients,
    "float64": assert_float64_gradients,
    "memory": assert_saves_memory,
}


# --- which models are judged by default -------------------------------------------------------------------------------


def judged(cases: Sequence[Case], *, zoo: Sequence[Case] = (), sample: int = 0) -> pytest.MarkDecorator:
    """Parametrizes a test with ``case`` and ``verdict``.

    Every case that is judged by default is judged by one verdict, another one every day.

    Args:
        cases: judged always.
        zoo: judged with ``-m zoo``.
        sample: how many of ``zoo`` are judged by default, others every day.
    """
    by_default = [*cases, *(sampling.sample(zoo, sample) if zoo else ())]
    chosen = {
        (case.name, verdict)
        for i, case in enumerate(by_default)
        for verdict in sampling.sample([v for v in VERDICTS if v != "memory" or case.saves], 1, offset=i)
    }
    params = [
        _param(case, verdict, is_chosen=(case.name, verdict) in chosen)
        for verdict in VERDICTS
        for case in (*cases, *zoo)
    ]
    return pytest.mark.parametrize("case, verdict", list(filter(None, params)))


def judge(case: Case, verdict: Verdict) -> None:
    """Let a case pass a verdict."""
    with warnings.catch_warnings():
        if case.warns:
            warnings.filterwarnings("ignore", message=f"mfx: .*{case.warns}")
        verdict(case)


def _param(case: Case, verdict: str, *, is_chosen: bool) -> Any:
    marks = [] if is_chosen else [pytest.mark.zoo]
    if verdict == "memory" and not case.saves:
        return None
    if verdict in case.fails:
        marks.append(pytest.mark.xfail(reason=case.fails[verdict], raises=AssertionError))
    name = f"{case.name}-{verdict}" + (f"-sample{sampling.number()}" if is_chosen else "")
    return pytest.param(case, VERDICTS[verdict], id=name, marks=marks)
