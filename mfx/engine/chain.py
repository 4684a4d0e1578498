"""The call of one chain: runs it forward so that the backward pass can rebuild the activations it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, compress
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from mfx.compat import takes_saved_tensors_hooks, under_transform
from mfx.engine.arithmetic import FloatState, State
from mfx.engine.arithmetic.base import wide
from mfx.engine.arithmetic.choice import choose
from mfx.engine.arithmetic.signed import UpdateGamma, add_scaled, complement_of, multiplier, value_of
from mfx.engine.checks import check_devices, check_fits, writes_into_stream
from mfx.engine.containers import gathering
from mfx.engine.flags import notice_overflow, read_pending, warn_once
from mfx.engine.gammas import gammas_of
from mfx.engine.memory.plan import ChainPlan, StepCost
from mfx.engine.memory.storage import streams_of, walks_back
from mfx.engine.offload import Offload
from mfx.engine.recompute.layout import StateLayout
from mfx.engine.recompute.runners import FromInputs, FromTape, Ordinary, Runner
from mfx.engine.recompute.saved import tensors_in
from mfx.engine.scope import enclosing_is_recorded, enclosing_keeps, inside_chain
from mfx.engine.steps import ChainCache, ChainCall, ChainOutput, ChainSettings, Mark, StepFunction
from mfx.engine.streams import Streams
from mfx.engine.update import Enter, Update, velocity_dummy
from mfx.modules.recomputing import recomputing
from mfx.options.gamma import Gamma
from mfx_passes.ir import Container

_ZERO = Gamma(0, 1)
_version_of = attrgetter("_version")


def run_chain(
    name: str,
    steps: Sequence[StepFunction],
    xs: Sequence[Tensor],
    captures: Sequence[Any],
    root: Any,
    settings: ChainSettings,
    *,
    v0: Sequence[Tensor | None] | None = None,
    taps: Sequence[tuple[int, int]] = (),
    containers: Sequence[Container] = (),
    cache: ChainCache | None = None,
    costs: list[StepCost] | None = None,
    mark: Mark | None = None,
) -> ChainOutput:
    """Run a chain of steps with momentum: v ← γ·v + (1−γ)·f(x), x ← x + v (Sander et al., ICML 2021).

    With several streams there are an x and a v of each. A step reads some of the x's, as they are before it, and moves
    some of the streams on.

    Inside torch.func transforms, and with forward-mode differentiation, the recurrence runs by ordinary operations,
    which these support, and nothing is recomputed.

    Args:
        name: the chain's name, for messages.
        steps: the steps, at least one.
        xs: the streams' tensors before the first step, of any shapes and floating dtypes.
        captures: other values the steps read, tensors or not.
        root: object through which the steps find their modules and parameters, at every call.
        settings: how the chain runs. Inside a step of another chain its plan is that of the step: all or nothing kept.
        v0: each stream's v before the first step, like its x; it gets a gradient. None is zero, or what
            ``settings.velocity`` says.
        taps: pairs of a number of steps t and of a stream that the t-th step moves: its x then is returned, too.
        containers: modules that runs of the steps make up: where they are sharded, each run is gathered for once.
        cache: the dictionary in which calls of this chain keep what later calls need; the caller owns it.
        costs: a list to which the measured cost of each step that may be recomputed is appended.
        mark: see `ChainCall`.

    Raises:
        MfxError: if a branch's value does not fit the stream, or values leave the range of exact arithmetic; in the
            backward pass, if a recomputation fails or differs from the forward pass.
    """
    cache = {} if cache is None else cache
    read_pending(cache)
    plan = _plan(name, settings, xs, steps)
    v0 = [None] * len(xs) if v0 is None else v0
    call = ChainCall(name, steps, captures, root, settings, plan, v0, taps, containers, cache, costs, mark)
    if (recorded := _decide_recorded(call, xs)) and settings.offload:
        call = replace(call, offload=Offload.of(name, xs[0].device, (*xs, *tensors_in(tuple(captures)))))
    with inside_chain(recorded, keeps=call.keeps_all), settings.lock.reading(), call.offload or nullcontext():
        if settings.gamma.is_zero:
            return _run_original(call, xs)
        return _run_recorded(call, xs) if recorded else _run_plain(call, xs)


def _plan(name: str, settings: ChainSettings, xs: Sequence[Tensor], steps: Sequence[StepFunction]) -> ChainPlan:
    keeps = enclosing_keeps()
    if keeps:
        return ChainPlan.keep_all(len(steps))
    if keeps is None and settings.plan is not None:
        plan = settings.plan
    else:
        plan = ChainPlan(frozenset(), from_inputs=not _walks_back(settings, xs, steps))
    if takes_saved_tensors_hooks() or under_transform() or len(plan.kept) == len(steps) or not torch.is_grad_enabled():
        return plan
    message = (
        f"chain {name}: where saved-tensor hooks are disabled nothing is rebuilt; activations are kept as in ordinary "
        "backpropagation. Use memory_budget=1.0 if that is what you want"
    )
    warn_once("saved tensors", message, settings.lock)
    return ChainPlan.keep_all(len(steps))


def _walks_back(settings: ChainSettings, xs: Sequence[Tensor], steps: Sequence[StepFunction]) -> bool:
    streams = streams_of(xs, [step.writes for step in steps])
    return not settings.gamma.is_zero and walks_back(settings.arithmetic, settings.gamma, streams)


def _decide_recorded(call: ChainCall, xs: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling():
        return False  # torch.export: there is no backward pass to rebuild anything for
    if under_transform():
        if not call.keeps_all and _needs_grad(call, xs):
            message = (
                f"chain {call.name}: inside torch.func transforms and forward-mode differentiation nothing is rebuilt; "
                "activations are kept as in ordinary backpropagation. Use memory_budget=1.0 if that is what you want"
            )
            warn_once("transform", message, call.settings.lock)
        return False
    recorded = enclosing_is_recorded()
    return _needs_grad(call, xs) if recorded is None else recorded


def _needs_grad(call: ChainCall, xs: Sequence[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(t.requires_grad for t in tensors_in((tuple(xs), tuple(call.v0), tuple(call.captures)))):
        return True
    tensors = chain.from_iterable(layout.tensors() for layout in _layouts(call))
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _layouts(call: ChainCall) -> Iterator[StateLayout]:
    for index, step in enumerate(call.steps):
        layout = call.cache.get(key := ("layout", index))
        if layout is None or not layout.fits(call.root):
            layout = StateLayout(call.root, step.targets, step.path)
            if layout.lasts:
                call.cache[key] = layout
        yield layout


def _run_original(call: ChainCall, xs: Sequence[Tensor]) -> ChainOutput:
    recomputes = _recomputes(call)
    runner: Runner = FromInputs(call, xs[0].device, original=True) if recomputes else Ordinary(call, original=True)
    runner, streams = gathering(runner, call, original=True), Streams(xs, call.taps, call.mark)
    for index, step in enumerate(call.steps):
        outputs = runner.run(index, step, streams.read(step), [_ZERO] * len(step.writes))
        streams.branch_is_done()
        streams.add(step, *outputs)
    return streams.finish()


def _run_plain(call: ChainCall, xs: Sequence[Tensor]) -> ChainOutput:
    """Run the recurrence by ordinary operations: without a backward pass, or inside transforms."""
    all_gammas = gammas_of(call, xs)
    runner = gathering(Ordinary(call, original=False), call, original=False)
    states = [x.to(wide(x.dtype)) for x in xs]
    vs = [None if v is None else _as(state.dtype, v) for v, state in zip(call.v0, states, strict=True)]
    streams = Streams(xs, call.taps)
    for index, (step, gammas) in enumerate(zip(call.steps, all_gammas, strict=True)):
        ys, side = runner.run(index, step, streams.read(step), gammas)
        for stream, kind, gamma, y in zip(step.writes, step.kinds, gammas, ys, strict=True):
            check_fits(call, step, xs[stream], y)
            state, v = states[stream], vs[stream]
            f = y - state if kind == "map" else _as(state.dtype, y)
            if v is None:
                v = f * gamma.factor(complement_of, state)
            else:
                v = add_scaled(v * multiplier(gamma, value_of, v), f, gamma.factor(complement_of, state))
            states[stream], vs[stream] = state + v, v
        del ys, y, f, state, v  # the next branch runs without them
        streams.add(step, [_as(xs[stream].dtype, states[stream]) for stream in step.writes], side)
    return streams.finish()


def _run_recorded(call: ChainCall, xs: Sequence[Tensor]) -> ChainOutput:
    """Run the recurrence in the chain's arithmetic, under autograd."""
    settings, gamma = call.settings, call.settings.gamma
    all_gammas = gammas_of(call, xs)  # before the runner looks at the random generators
    walks = _walks_back(settings, xs, call.steps)
    # Where inputs are kept in any case, the plain recurrence in a wide dtype. It does not depend on the plan, nor on
    # whether the chain is inside another one: the function is the same.
    arithmetic = settings.arithmetic if walks else FloatState
    check_devices(call, arithmetic, xs)
    xs = [x.clone() if x.is_inference() else x for x in xs]  # neither versions nor saved tensors otherwise
    runner = _choose_runner(call, xs[0].device, walks=walks)
    tape, walked = (runner.tape, runner.walked) if isinstance(runner, FromTape) else (None, range(0))
    states, xs = _start(call, arithmetic, xs, reversible=tape is not None)
    streams, vs = Streams(xs, call.taps, call.mark), list(call.v0)
    dummies = [velocity_dummy(x) for x in xs]
    runner = gathering(runner, call, original=False)
    spacing = min(arithmetic.anchor_every(gamma, x.dtype) or len(call.steps) for x in xs)
    may_overflow, on_cpu, last = arithmetic.verifiable, xs[0].device.type == "cpu", len(call.steps) - 1
    ends = {} if tape is None else _ends(call.steps, walked, len(xs))
    stored = {*range(walked.start + spacing - 1, walked.stop, spacing), walked.stop - 1} if tape is not None else ()
    remembered = walked.start if arithmetic.verifiable and walked.start > 0 else -1
    earlier: list[list[UpdateGamma]] = [[] for _ in xs]  # γ of the updates of each stream so far
    firsts: dict[int, Tensor] = {}  # by stream; all gradients of the chain come by one of them
    for index, (step, gammas) in enumerate(zip(call.steps, all_gammas, strict=True)):
        if index == remembered:
            for state in compress(states, earlier):
                state.remember_start()
        read = streams.read(step)
        versions = [*map(_version_of, read)]
        try:
            ys, side = runner.run(index, step, read, gammas)
            if [*map(_version_of, read)] != versions:
                raise writes_into_stream(call, step)
        except BaseException:
            if tape is not None and index in walked and not recomputing():
                what = f"{call.name}: the stream before step {step.path}"
                tape.interrupt(index - walked.start, _present(states, earlier, streams.xs), what)
            raise
        streams.branch_is_done()
        # With these, gradients arrive elsewhere too, when the last update may have been freed.
        on_tape = call.taps or side or streams.has_sides
        after = []
        for stream, kind, own, y in zip(step.writes, step.kinds, gammas, ys, strict=True):
            x, state = streams.xs[stream], states[stream]
            check_fits(call, step, x, y)
            is_end = ends.get(stream) == index and not on_tape
            begin = partial(tape.begin, stream) if is_end and tape is not None else None
            context = state, kind, own, earlier[stream], dummies[stream], begin
            x, vs[stream] = Update.apply(x, vs[stream], y, context)
            if stream not in firsts and x.requires_grad:
                firsts[stream] = x
            after.append(x)
        del ys, y, read, x  # the next branch runs without them
        streams.add(step, after, side)
        if may_overflow and (on_cpu or index == last):
            _notice_overflows(call, step, compress(states, earlier), firsts.values())
        if index in stored and tape is not None:
            present = _present(states, earlier, streams.xs)
            tape.store(index + 1 - walked.start, present, f"{call.name}: the stream after step {step.path}")
    return streams.finish()


def _start(
    call: ChainCall, arithmetic: type[State], xs: Sequence[Tensor], *, reversible: bool
) -> tuple[list[State], Sequence[Tensor]]:
    """Return the states before the first step, and the streams as the first branches read them."""
    states = [
        choose(arithmetic, x).start(x, v, reversible=reversible, kernels=call.settings.kernels)
        for x, v in zip(xs, call.v0, strict=True)
    ]
    if arithmetic.rounds_input:
        xs = [Enter.apply(x, state) for x, state in zip(xs, states, strict=True)]
    return states, xs


def _notice_overflows(call: ChainCall, step: StepFunction, states: Iterable[State], firsts: Iterable[Tensor]) -> None:
    for state in states:
        if (overflowed := state.overflowed()) is not None:
            place = f"chain {call.name}, at or before step {step.path}"
            notice_overflow(place, overflowed, call.cache, firsts if call.settings.verify == "raise" else ())


def _present(
    states: Sequence[State], earlier: Sequence[Sequence[UpdateGamma]], xs: Sequence[Tensor]
) -> list[State | Tensor]:
    """Return the states of the streams that were updated, and the tensors of the others."""
    return [state if gone else x.detach() for state, gone, x in zip(states, earlier, xs, strict=True)]


def _ends(steps: Sequence[StepFunction], walked: range, streams: int) -> dict[int, int]:
    """Return, by stream, the number of the last of some steps that moves it."""
    ends: dict[int, int] = {}
    for index in reversed(walked):
        for stream in steps[index].writes:
            ends.setdefault(stream, index)
        if len(ends) == streams:
            break
    return ends


def _choose_runner(call: ChainCall, device: torch.device, *, walks: bool) -> Runner:
    if not _recomputes(call):
        return Ordinary(call, original=False)
    if call.plan.from_inputs or not walks:
        return FromInputs(call, device, original=False)
    return FromTape(call, device)


def _recomputes(call: ChainCall) -> bool:
    # Under no_grad in a branch of a recorded chain the arithmetic is the recorded one, but nothing is saved.
    return not call.keeps_all and torch.is_grad_enabled() and enclosing_is_recorded() is True


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)
