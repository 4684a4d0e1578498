"""The call of one chain: runs it forward so that the backward pass can rebuild the activations it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfx.compat import has_float64, under_transform
from mfx.engine.arithmetic import FloatState, State
from mfx.engine.arithmetic.base import wide
from mfx.engine.arithmetic.choice import choose
from mfx.engine.flags import notice_overflow, read_pending, warn_once
from mfx.engine.memory.plan import ChainPlan, StepCost
from mfx.engine.memory.storage import choose_storage
from mfx.engine.recompute.layout import StateLayout
from mfx.engine.recompute.runners import FromInputs, FromTape, Ordinary, Runner
from mfx.engine.recompute.saved import tensors_in
from mfx.engine.scope import enclosing_is_recorded, enclosing_keeps, inside_chain
from mfx.engine.steps import ChainCache, ChainCall, ChainOutput, ChainSettings, StepFunction
from mfx.engine.update import Enter, Update, UpdateContext, velocity_dummy
from mfx.options.gamma import Gamma
from mfx_passes.errors import MfxError

_ZERO = Gamma(0, 1)


def run_chain(
    name: str,
    steps: Sequence[StepFunction],
    x: Tensor,
    captures: Sequence[Any],
    root: Any,
    settings: ChainSettings,
    *,
    v0: Tensor | None = None,
    taps: Sequence[int] = (),
    cache: ChainCache | None = None,
    costs: list[StepCost] | None = None,
) -> ChainOutput:
    """Run a chain of steps with momentum: v ← γ·v + (1−γ)·f(x), x ← x + v (Sander et al., ICML 2021).

    Inside torch.func transforms, and with forward-mode differentiation, the recurrence runs by ordinary operations,
    which these support, and nothing is recomputed.

    Args:
        name: the chain's name, for messages.
        steps: the steps, at least one.
        x: the stream's tensor before the first step, of any shape and floating dtype.
        captures: other values the steps read, tensors or not.
        root: object through which the steps find their modules and parameters, at every call.
        settings: how the chain runs. Inside a step of another chain its plan is that of the step: all or nothing kept.
        v0: v before the first step, like ``x``; it gets a gradient. None is zero, or what ``settings.velocity`` says.
        taps: numbers of steps 1 ≤ t < len(steps) after which x is returned, too.
        cache: the dictionary in which calls of this chain keep what later calls need; the caller owns it.
        costs: a list to which the measured cost of each step that may be recomputed is appended.

    Raises:
        MfxError: if a branch's value does not fit the stream, or values leave the range of exact arithmetic; in the
            backward pass, if a recomputation fails or differs from the forward pass.
    """
    cache = {} if cache is None else cache
    read_pending(cache)
    plan = _plan(settings, x.dtype, len(steps))
    call = ChainCall(name, steps, captures, root, settings, plan, v0, taps, cache, costs)
    with inside_chain(recorded := _decide_recorded(call, x), keeps=call.keeps_all):
        if settings.gamma.is_zero:
            return _run_original(call, x)
        return _run_recorded(call, x) if recorded else _run_plain(call, x)


def _plan(settings: ChainSettings, dtype: torch.dtype, steps: int) -> ChainPlan:
    keeps = enclosing_keeps()
    if keeps:
        return ChainPlan.keep_all(steps)
    if keeps is None and settings.plan is not None:
        return settings.plan
    storage = choose_storage(settings.arithmetic, settings.gamma, dtype, steps)
    return ChainPlan(frozenset(), storage.policy == "inputs")


class _Collector:
    """The output of a call as it comes in; of the stream it keeps the taps and the last value."""

    def __init__(self, taps: Sequence[int]) -> None:
        self._tap_steps = taps
        self._taps: dict[int, Tensor] = {}
        self._sides: list[tuple[Any, ...]] = []
        self.has_sides = False

    def add(self, x: Tensor, side: Sequence[Any]) -> None:
        self._x = x
        self._sides.append(tuple(side))
        self.has_sides = self.has_sides or bool(side)
        if len(self._sides) in self._tap_steps:
            self._taps[len(self._sides)] = x

    def finish(self) -> ChainOutput:
        return ChainOutput(self._x, tuple(self._taps[t] for t in self._tap_steps), tuple(self._sides))


def _decide_recorded(call: ChainCall, x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # torch.export: there is no backward pass to rebuild anything for
    if under_transform():
        if not call.keeps_all and _needs_grad(call, x):
            message = (
                f"chain {call.name}: inside torch.func transforms and forward-mode differentiation nothing is rebuilt; "
                "activations are kept as in ordinary backpropagation. Use memory_budget=1.0 if that is what you want"
            )
            warn_once("transform", message, call.cache)
        return False
    recorded = enclosing_is_recorded()
    return _needs_grad(call, x) if recorded is None else recorded


def _needs_grad(call: ChainCall, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(t.requires_grad for t in tensors_in((x, call.v0, tuple(call.captures)))):
        return True
    layouts = (StateLayout(call.root, step.targets, step.path) for step in call.steps)
    return any(tensor is not None and tensor.requires_grad for layout in layouts for tensor in layout.tensors())


def _run_original(call: ChainCall, x: Tensor) -> ChainOutput:
    recomputes = _recomputes(call)
    runner = FromInputs(call, x.device, original=True) if recomputes else Ordinary(call, original=True)
    out = _Collector(call.taps)
    for index, step in enumerate(call.steps):
        x, *side = runner.run(index, step, x, _ZERO)
        out.add(x, side)
    return out.finish()


def _run_plain(call: ChainCall, x: Tensor) -> ChainOutput:
    """Run the recurrence by ordinary operations: without a backward pass, or inside transforms."""
    runner = Ordinary(call, original=False)
    dtype, state = x.dtype, x.to(wide(x.dtype))
    v = None if call.v0 is None else call.v0.to(state.dtype)
    out = _Collector(call.taps)
    for index, (step, gamma) in enumerate(zip(call.steps, _gammas(call), strict=True)):
        y, *side = runner.run(index, step, x, gamma)
        _check_fits(call, step, x, y)
        f = y - state if step.kind == "map" else _as(state.dtype, y)
        v = f * gamma.complement if v is None else torch.add(v * gamma.value, f, alpha=gamma.complement)
        state = state + v
        x = _as(dtype, state)
        out.add(x, side)
    return out.finish()


def _run_recorded(call: ChainCall, x: Tensor) -> ChainOutput:
    """Run the recurrence in the chain's arithmetic, under autograd."""
    arithmetic = _arithmetic(call, x)
    runner = _choose_runner(call, x)
    tape, walked = (runner.tape, runner.walked) if isinstance(runner, FromTape) else (None, range(0))
    v, settings = call.v0, call.settings
    state = choose(arithmetic, x).start(x, v, reversible=tape is not None, kernels=settings.kernels)
    if state.rounds_input:
        x = Enter.apply(x, state)
    out = _Collector(call.taps)
    dummy = velocity_dummy(x)
    spacing = arithmetic.anchor_every(settings.gamma, x.dtype) or len(call.steps)
    on_cpu = x.device.type == "cpu"
    first: Tensor | None = None
    for index, (step, gamma) in enumerate(zip(call.steps, _gammas(call), strict=True)):
        if state.verifiable and index == walked.start > 0:
            state.remember_start()
        version = x._version
        y, *side = runner.run(index, step, x, gamma)
        _check_fits(call, step, x, y)
        if x._version != version:
            raise MfxError(
                f"chain {call.name}, step {step.path}: the branch writes into the stream, which is its input, so there "
                "is no telling what is to be added to what. Have it write into a copy (x.clone()), or leave this step "
                "out with skip="
            )
        is_end = index + 1 == walked.stop
        # With these, gradients arrive elsewhere too, when the last update may have been freed.
        on_tape = bool(call.taps or side) or out.has_sides
        last = tape if is_end and not on_tape else None
        context = UpdateContext(state, step.kind, gamma, settings.gamma, index > 0, dummy, last)
        x, v = Update.apply(x, v, y, context)
        if first is None and x.requires_grad:
            first = x  # all gradients of the chain come by it
        out.add(x, side)
        if (on_cpu or index == len(call.steps) - 1) and (overflowed := state.overflowed()) is not None:
            place = f"chain {call.name}, at or before step {step.path}"
            notice_overflow(place, overflowed, call.cache, first if settings.verify == "raise" else None)
        position = index + 1 - walked.start
        if tape is not None and index in walked and (is_end or position % spacing == 0):
            tape.store(position, state, f"{call.name}: the stream after step {step.path}")
    return out.finish()


def _choose_runner(call: ChainCall, x: Tensor) -> Runner:
    if not _recomputes(call):
        return Ordinary(call, original=False)
    if call.plan.from_inputs or not _walks_back(call, x):
        return FromInputs(call, x.device, original=False)
    return FromTape(call, x.device)


def _recomputes(call: ChainCall) -> bool:
    # Under no_grad in a branch of a recorded chain the arithmetic is the recorded one, but nothing is saved.
    return not call.keeps_all and torch.is_grad_enabled() and enclosing_is_recorded() is True


def _arithmetic(call: ChainCall, x: Tensor) -> type[State]:
    """Return the arithmetic of a chain; where inputs are kept in any case, the plain recurrence in a wide dtype.

    It does not depend on the plan, nor on whether the chain is inside another one: the function is the same.

    Raises:
        MfxError: the device cannot compute it.
    """
    arithmetic = call.settings.arithmetic if _walks_back(call, x) else FloatState
    if arithmetic.needs_float64 and not has_float64(x.device):
        raise MfxError(
            f"chain {call.name}: arithmetic='exact' computes with float64, which {x.device} does not have. Use "
            "arithmetic='float'"
        )
    return arithmetic


def _walks_back(call: ChainCall, x: Tensor) -> bool:
    settings = call.settings
    return settings.arithmetic.walks_back(settings.gamma, x.dtype, len(call.steps))


def _gammas(call: ChainCall) -> list[Gamma]:
    """Return γ of each step."""
    gamma = call.settings.gamma
    first = _ZERO if call.settings.velocity == "residual" else gamma
    return [first, *[gamma] * (len(call.steps) - 1)]


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _check_fits(call: ChainCall, step: StepFunction, x: Tensor, y: object) -> None:
    if not isinstance(y, Tensor):
        found = f"a {type(y).__name__}"
    elif y.shape != x.shape:
        found = f"a tensor of shape {tuple(y.shape)}"
    elif not y.is_floating_point() or (y.dtype is not x.dtype and torch.promote_types(x.dtype, y.dtype) != x.dtype):
        found = f"a tensor of dtype {y.dtype}"
    elif y.device != x.device:
        found = f"a tensor on {y.device}"
    else:
        return
    raise MfxError(
        f"chain {call.name}, step {step.path}: the branch gave {found}; it is to be added to a stream of shape "
        f"{tuple(x.shape)}, {x.dtype}, on {x.device}. Leave this step out with skip="
    )
