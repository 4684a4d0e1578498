"""The momentum call: one chain, run forward so that its backward pass can rebuild what it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mfx.compat import under_transform
from mfx.engine.arithmetic import ARITHMETICS, BLOCK_KERNELS, Kernels, State
from mfx.engine.arithmetic.base import wide
from mfx.engine.flags import notice_overflow, read_pending, verify_chain, verify_step, warn_once
from mfx.engine.memory.plan import ChainPlan, StepCost
from mfx.engine.memory.storage import choose_storage
from mfx.engine.recompute.layout import StateLayout
from mfx.engine.recompute.runners import FromInputs, FromTape, Ordinary, Runner
from mfx.engine.recompute.saved import tensors_in
from mfx.engine.scope import enclosing_is_recorded, enclosing_keeps, inside_chain
from mfx.engine.steps import ChainCache, ChainOutput, StepFunction
from mfx.engine.update import Enter, Update, UpdateContext, velocity_dummy
from mfx.options.gamma import Gamma
from mfx_passes.errors import MfxError

Velocity = Literal["residual"] | Tensor | None
_ZERO = Gamma(0, 1)


@dataclass(frozen=True)
class _Call:
    """The arguments of one call."""

    name: str
    steps: Sequence[StepFunction]
    captures: Sequence[Any]
    root: Any
    gamma: Gamma
    arithmetic: type[State]
    plan: ChainPlan
    costs: list[StepCost] | None
    velocity: Velocity
    taps: Sequence[int]
    memory: ChainCache
    verify: str
    kernels: Kernels

    @property
    def keeps_all(self) -> bool:
        return len(self.plan.kept) >= len(self.steps)


def run_chain(
    name: str,
    steps: Sequence[StepFunction],
    x: Tensor,
    captures: Sequence[Any],
    root: Any,
    *,
    gamma: Gamma,
    arithmetic: str = "exact",
    memory_budget: float | ChainPlan = 0.0,
    velocity: Velocity = None,
    taps: Sequence[int] = (),
    memory: ChainCache | None = None,
    verify: str = "warn",
    costs: list[StepCost] | None = None,
    kernels: Kernels = BLOCK_KERNELS,
) -> ChainOutput:
    """Run a chain of steps with momentum: v ← γ·v + (1−γ)·f(x), x ← x + v (Sander et al., ICML 2021).

    Inside torch.func transforms, and with forward-mode differentiation, the recurrence runs by ordinary operations,
    which these understand, and nothing is rebuilt.

    Args:
        name: the chain's name, for messages.
        steps: the steps, at least one.
        x: the stream's tensor before the first step, of any shape and floating dtype.
        captures: other values the steps read, tensors or not.
        root: object through which the steps find their modules and parameters, at every call.
        gamma: γ. At 0 the steps' ``original`` functions run, and of each only the input is kept.
        arithmetic: "exact" or "float".
        memory_budget: 0.0 to rebuild what the backward pass needs; 1.0 to keep it, as ordinary backpropagation does;
            or which steps do what. The function is the same. Inside a step of another chain it is as in that step.
        velocity: v before the first step: zero, a tensor like ``x`` (which gets a gradient), or "residual": such that v
            after the first step is f(x).
        taps: numbers of steps 1 ≤ t < len(steps) after which x is asked for.
        memory: what is to be remembered between calls of this chain, a dictionary owned by the caller.
        verify: what to do if a backward pass in exact arithmetic does not end where the forward pass began: "warn",
            "raise" or "off". On a CPU at once, elsewhere at the next call with the same ``memory``.
        costs: a list that takes in what each step that may run again costs, found out by watching it.
        kernels: who does the elementwise work of exact arithmetic; what comes out is the same.

    Raises:
        MfxError: if a branch's value does not fit the stream, or values leave the range of exact arithmetic; in the
            backward pass, if the second run of a step cannot be or was not as the first.
    """
    if arithmetic not in ARITHMETICS:
        raise MfxError(f"arithmetic must be one of {sorted(ARITHMETICS)}, not {arithmetic!r}")
    memory = {} if memory is None else memory
    read_pending(memory)
    state = ARITHMETICS[arithmetic]
    plan = _plan(memory_budget, state, gamma, x.dtype, len(steps))
    call = _Call(name, steps, captures, root, gamma, state, plan, costs, velocity, taps, memory, verify, kernels)
    with inside_chain(recorded := _decide_recorded(call, x), keeps=call.keeps_all):
        if gamma.is_zero:
            return _run_original(call, x)
        return _run_recorded(call, x) if recorded else _run_plain(call, x)


def _plan(
    memory_budget: float | ChainPlan, arithmetic: type[State], gamma: Gamma, dtype: torch.dtype, steps: int
) -> ChainPlan:
    if (keeps := enclosing_keeps()) is not None:
        memory_budget = 1.0 if keeps else 0.0
    if isinstance(memory_budget, ChainPlan):
        return memory_budget
    policy = choose_storage(arithmetic, gamma, dtype, steps, memory_budget).policy
    return ChainPlan(frozenset(range(steps) if policy == "activations" else ()), policy == "inputs")


class _Collector:
    """Gathers a call's output, and holds on to no more of the stream than was asked for."""

    def __init__(self, taps: Sequence[int]) -> None:
        self._asked = taps
        self._taps: dict[int, Tensor] = {}
        self._sides: list[tuple[Any, ...]] = []
        self.has_sides = False

    def add(self, x: Tensor, side: Sequence[Any]) -> None:
        self._x = x
        self._sides.append(tuple(side))
        self.has_sides = self.has_sides or bool(side)
        if len(self._sides) in self._asked:
            self._taps[len(self._sides)] = x

    def finish(self) -> ChainOutput:
        return ChainOutput(self._x, tuple(self._taps[t] for t in self._asked), tuple(self._sides))


def _decide_recorded(call: _Call, x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False  # torch.export looks on: there is no backward pass to rebuild anything for
    if under_transform():
        if not call.keeps_all and _needs_grad(call, x):
            message = (
                f"chain {call.name}: inside torch.func transforms and forward-mode differentiation nothing is rebuilt; "
                "activations are kept as in ordinary backpropagation. Use memory_budget=1.0 if that is what you want"
            )
            warn_once("transform", message, call.memory)
        return False
    recorded = enclosing_is_recorded()
    return _needs_grad(call, x) if recorded is None else recorded


def _needs_grad(call: _Call, x: Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(t.requires_grad for t in tensors_in((x, call.velocity, tuple(call.captures)))):
        return True
    layouts = (StateLayout(call.root, step.targets, step.path) for step in call.steps)
    tensors = (place.get() for layout in layouts for place in layout.places(call.root))
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _run_original(call: _Call, x: Tensor) -> ChainOutput:
    runner: Runner = Ordinary(call.root, call.captures, original=True)
    if _recomputes(call):
        runner = _from_inputs(call, x, original=True)
    out = _Collector(call.taps)
    for index, step in enumerate(call.steps):
        x, *side = runner.run(index, step, x, _ZERO)
        out.add(x, side)
    return out.finish()


def _run_plain(call: _Call, x: Tensor) -> ChainOutput:
    """The recurrence by ordinary operations: without a backward pass, or for transforms that cannot be recorded."""
    runner = Ordinary(call.root, call.captures, original=False)
    dtype, state = x.dtype, x.to(wide(x.dtype))
    v = call.velocity.to(state.dtype) if isinstance(call.velocity, Tensor) else None
    out = _Collector(call.taps)
    for index, step in enumerate(call.steps):
        y, *side = runner.run(index, step, x, call.gamma)
        _check_fits(call, step, x, y)
        gamma = _gamma_at(call, index)
        f = y - state if step.kind == "map" else _as(state.dtype, y)
        v = f * gamma.complement if v is None else torch.add(v * gamma.value, f, alpha=gamma.complement)
        state = state + v
        x = _as(dtype, state)
        out.add(x, side)
    return out.finish()


def _run_recorded(call: _Call, x: Tensor) -> ChainOutput:
    """The recurrence in the chain's arithmetic, under autograd."""
    runner = _choose_runner(call, x)
    tape, walked = (runner.tape, runner.walked) if isinstance(runner, FromTape) else (None, range(0))
    v = call.velocity if isinstance(call.velocity, Tensor) else None
    state = call.arithmetic.start(x, v, reversible=tape is not None, kernels=call.kernels)
    if state.rounds_input:
        x = Enter.apply(x, state)
    out = _Collector(call.taps)
    dummy = velocity_dummy(x)
    spacing = call.arithmetic.anchor_every(call.gamma, x.dtype) or len(call.steps)
    on_cpu = x.device.type == "cpu"
    for index, step in enumerate(call.steps):
        gamma = _gamma_at(call, index)
        if state.verifiable and index == walked.start > 0:
            state.remember_start()
        y, *side = runner.run(index, step, x, gamma)
        _check_fits(call, step, x, y)
        is_end = index + 1 == walked.stop
        # Gradients then come in elsewhere too, and the last update may be dead when they do.
        on_tape = bool(call.taps or side) or out.has_sides
        last = tape if is_end and not on_tape else None
        what = f"{call.name}: the stream after step {step.path}"
        x, v = Update.apply(x, v, y, UpdateContext(state, step.kind, gamma, call.gamma, index > 0, dummy, what, last))
        out.add(x, side)
        if (on_cpu or index == len(call.steps) - 1) and (overflowed := state.overflowed()) is not None:
            notice_overflow(f"chain {call.name}, at or before step {step.path}", overflowed, call.memory)
        position = index + 1 - walked.start
        if tape is not None and is_end and on_tape:
            tape.store_end(state, what)
        elif tape is not None and index in walked and not is_end and position % spacing == 0:
            tape.anchor(position, state, what)
    return out.finish()


def _choose_runner(call: _Call, x: Tensor) -> Runner:
    if not _recomputes(call):
        return Ordinary(call.root, call.captures, original=False)
    if call.plan.from_inputs:
        return _from_inputs(call, x, original=False)
    walked = call.plan.walked(len(call.steps))
    return FromTape(*_common(call, x), **_options(call), walked=walked, verify=_verifier(call, verify_chain))


def _from_inputs(call: _Call, x: Tensor, *, original: bool) -> Runner:
    return FromInputs(*_common(call, x), **_options(call), original=original, verify=_verifier(call, verify_step))


def _common(call: _Call, x: Tensor) -> tuple[Any, ...]:
    return call.name, call.root, call.captures, x.device, call.memory


def _options(call: _Call) -> dict[str, Any]:
    return {"kept": call.plan.kept, "costs": call.costs}


def _verifier(call: _Call, verify: Callable[..., None]) -> Callable[..., None] | None:
    checked = call.arithmetic.verifiable and call.verify != "off"
    return partial(verify, call.name, call.memory, call.verify) if checked else None


def _recomputes(call: _Call) -> bool:
    # Under no_grad in a branch of a recorded chain the arithmetic is the recorded one, but nothing is saved.
    return not call.keeps_all and torch.is_grad_enabled() and enclosing_is_recorded() is True


def _gamma_at(call: _Call, index: int) -> Gamma:
    return _ZERO if index == 0 and isinstance(call.velocity, str) else call.gamma


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _check_fits(call: _Call, step: StepFunction, x: Tensor, y: object) -> None:
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
