"""What every model has to pass, whoever wrote it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

import mfx
from mfx.meter import ActivationMeter
from mfx_passes import Rejection
from tests import sampling
from tests.oracles import Grads, assert_close_grads, residual_adds


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


# --- one training step ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a forward and a backward pass leave behind."""

    outputs: list[Tensor]
    grads: Grads
    state: dict[str, Tensor]
    rng: Tensor


def train_step(net: nn.Module, inputs: Sequence[Tensor]) -> Outcome:
    """One forward and backward pass from a fixed random state. The net's buffers and gradients are put back."""
    before = deepcopy(net.state_dict())
    parameters = dict(net.named_parameters())
    torch.manual_seed(2)
    with deterministic():
        outputs = tensors_in(net(*inputs))
        loss_of(outputs).backward()
    rng = torch.get_rng_state()
    outcome = Outcome(
        [output.detach() for output in outputs],
        {name: p.grad for name, p in parameters.items()},
        {name: value.clone() for name, value in net.state_dict().items()},
        rng,
    )
    net.load_state_dict(before)
    for p in parameters.values():
        p.grad = None
    return outcome


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """A number on which every output has a say of its own: a sum or a square is blind to what a final norm returns."""
    generator = torch.Generator().manual_seed(3)
    return sum((x * torch.randn(x.shape, generator=generator).to(x)).mean() for x in outputs)


@contextmanager
def deterministic():
    """The gradient of an indexed table (swin's position bias) is otherwise summed in whatever order threads finish."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_bit_equal(actual: Outcome, expected: Outcome) -> None:
    assert len(actual.outputs) == len(expected.outputs)
    assert all(map(torch.equal, actual.outputs, expected.outputs)), "outputs differ"
    assert actual.grads.keys() == expected.grads.keys()
    different = [name for name, grad in actual.grads.items() if not _equal(grad, expected.grads[name])]
    assert not different, f"gradients differ: {different}"
    different = [name for name, value in actual.state.items() if not torch.equal(value, expected.state[name])]
    assert not different, f"buffers differ after the step: {different}"
    assert torch.equal(actual.rng, expected.rng), "the random state differs after the step"


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


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


def identity_adds(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    inputs = [x.clone().requires_grad_() for x in inputs]
    before = deepcopy(model.state_dict())
    count = len(residual_adds(loss_of(tensors_in(model(*inputs)))))
    model.load_state_dict(before)
    return count


# Sums that stay as they were and that nobody would call x + f(x) with f and x of one shape.
_NO_IDENTITY = re.compile("both sides of the sum are computed|the skip is scaled or subtracted|is broadcast over")


def is_identity(rejection: Rejection) -> bool:
    subtracts = getattr(rejection.node.target, "__name__", rejection.node.target) in ("sub", "isub", "subtract")
    return not subtracts and not _NO_IDENTITY.search(rejection.reason)  # the oracle counts additions


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


class Memory(NamedTuple):
    """Bytes of activations alive."""

    kept: int  # between forward and backward
    peak: int


def measure(net: nn.Module, inputs: Sequence[Tensor]) -> Memory:
    """A training step's activations. Gradients are freed as they come, as an optimizer fused into backward does."""
    parameters = list(net.parameters())
    hooks = [p.register_post_accumulate_grad_hook(_free_grad) for p in parameters if p.requires_grad]
    loss_of(tensors_in(net(*inputs))).backward()  # what happens at the first call only
    with ActivationMeter(exclude=parameters) as meter:
        loss = loss_of(tensors_in(net(*inputs)))
        kept = meter.live
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Memory(kept, meter.peak)


def _free_grad(parameter: Tensor) -> None:
    parameter.grad = None


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

    Every case that is judged by default is judged by the first verdict, and by two of the others, other ones every day.

    Args:
        cases: judged always.
        zoo: judged with ``-m zoo``.
        sample: how many of ``zoo`` are judged by default, others every day.
    """
    every_day, *others = VERDICTS
    by_default = [*cases, *(sampling.sample(zoo, sample) if zoo else ())]
    chosen = {(case.name, every_day) for case in by_default}
    for i, case in enumerate(by_default):
        chosen |= {(case.name, verdict) for verdict in sampling.sample(others, 2, offset=i)}
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
