"""Predicts what a training step takes with and without mfx, by a rehearsal on tensors without values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils import _pytree as pytree
from typing_extensions import override

from mfx import compat
from mfx.engine import ChainSettings
from mfx.engine.arithmetic.blocks import fakes_of_a_cpu
from mfx.engine.memory.flops import FlopCounter
from mfx.ledger import gradients_left_out
from mfx.modules.aside import aside
from mfx.modules.kept_results import results_not_kept
from mfx.net.views import Inputs, View
from mfx.program.chain_call import Momentum
from mfx.program.codegen import to_function
from mfx.program.memory_plans import NetPlans, UnreachableError
from mfx.program.shapes import shadow_of, undivided
from mfx.program.watched_step import WatchedStep
from mfx.reports.explain.rehearsal import Observer, Rehearsed, as_plain
from mfx.reports.training_state import TrainingState, training_state


@dataclass(frozen=True)
class Usage:
    """Memory and work of one training step.

    Attributes:
        kept: bytes alive between forward and backward, the output among them, as `mfx.ActivationMeter` counts:
            every storage once, without parameters, buffers and inputs.
        peak: the most bytes alive at once, by the same count, where the caller holds the output until the backward pass
            is done. Large states in exact arithmetic are handled block by block if all tensors are on a CPU, else
            in one piece.
        peak_of_loss: the same, where the caller holds of the output only what the backward pass starts at: the loss,
            if the output names one.
        flops: floating-point operations of matrix products, convolutions and attention.
        chains: bytes of ``kept`` that were allocated in each chain, by name.
        recomputed: those of the ``flops`` that the recomputation of each chain's branches takes, by name; under "" that
            of all that is in no chain.
    """

    kept: int
    peak: int
    peak_of_loss: int
    flops: int
    chains: Mapping[str, int]
    recomputed: Mapping[str, int]


_NO_ROOM = TrainingState(0, 0, 0)


@dataclass(frozen=True)
class Estimate:
    """A training step with ordinary backpropagation through the original model, and as mfx runs it.

    Attributes:
        plain: the original.
        momentum: the rewritten one.
        held: bytes alive between forward and backward only because they are part of the output, by the output's key.
        room: bytes that a training step with Adam takes beside activations.
        unreachable: says why the memory budget cannot be had, if so; ``momentum`` then keeps as little as possible.
    """

    plain: Usage
    momentum: Usage
    held: Mapping[str, int] = field(default_factory=dict)
    unreachable: str | None = None
    room: TrainingState = _NO_ROOM


_KEY, _STEPS = "rehearsal", 10  # of the plans; more steps than any plan takes


def estimate(view: View, args: tuple[Any, ...], kwargs: Mapping[str, Any], optional: tuple[str, ...] = ()) -> Estimate:
    """Rehearse a training step on tensors without values, which takes neither their memory nor their time.

    The backward pass starts at the loss, if the output names one, else at the output's first entry. Whatever device the
    tensors are on, the operations are those of a CPU.

    Args:
        view: the graph to rehearse, in the training mode that its module is in.
        args: arguments of the call; any device, meta too.
        kwargs: arguments by name.
        optional: keys of the output that the user may not need.
    """
    with aside(view.module), results_not_kept(view.module):
        return _estimate(view, args, kwargs, optional)


def _estimate(view: View, args: tuple[Any, ...], kwargs: Mapping[str, Any], optional: tuple[str, ...]) -> Estimate:
    plans = _plans(view.all_calls.values())
    error = None
    try:
        for _ in range(_STEPS if plans is not None else 0):  # by which the plan is found
            ViewRehearsal(view, args, kwargs, plans=plans).training_step()
            if plans is None or plans.is_settled(_KEY):
                break
        usage, output_keys = ViewRehearsal(view, args, kwargs, plans=plans).training_step()
    except UnreachableError as found:
        error, plans = str(found), None  # what takes the least is what is shown
        usage, output_keys = ViewRehearsal(view, args, kwargs).training_step()
    plain = ViewRehearsal(view, args, kwargs, settings=as_plain).training_step()[0] if view.all_calls else usage
    wanted = tuple(key for key in optional if key in output_keys)
    held = ViewRehearsal(view, args, kwargs, plans=plans).held(wanted) if wanted else {}
    room = training_state(view.module, optimizer=None, shards=1, blocks=())
    return Estimate(plain, usage, held, error, room)


def _plans(calls: Iterable[Momentum]) -> NetPlans | None:
    """Return plans for the budget that the calls share; None if it is all or nothing."""
    return next((NetPlans(call.plans.budget) for call in calls if call.plans is not None), None)


class Rehearsal(ABC):
    """A copy of a model and of a call's arguments on tensors without values, and an observer.

    Args:
        module: the model.
        args: arguments of the call; any device, meta too.
        kwargs: arguments by name.
        counter: counts the floating-point operations.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], counter: FlopCounter | None = None
    ) -> None:
        self._is_of_a_cpu = True
        with compat.fake_mode() as self._mode:
            fakes: dict[int, Tensor] = {}
            whole = undivided(module)

            def fake(tensor: Tensor) -> Tensor:
                self._is_of_a_cpu &= tensor.device.type == "cpu"
                return fakes.setdefault(id(tensor), self._fake(whole(tensor)))

            self._net = shadow_of(module, fake)
            self._inputs: Inputs = pytree.tree_map_only(Tensor, fake, (args, dict(kwargs)))
        own = [*self._net.parameters(), *self._net.buffers()]
        self._trained = [tensor for tensor in own if tensor.requires_grad]
        self._counter = FlopCounter() if counter is None else counter
        self._observer = Observer(own, self._counter)

    def training_step(self, chains: Iterable[str] = ()) -> tuple[Usage, tuple[str, ...]]:
        """Rehearse a training step; return its usage, of these chains too, and the keys of the output."""
        observer = self._observer
        without_grads = gradients_left_out(observer, self._trained)
        with ExitStack() as stack:
            stack.enter_context(compat.fake_mode(self._mode))
            stack.enter_context(fakes_of_a_cpu(self._is_of_a_cpu))
            for context in (torch.enable_grad(), without_grads, self._counter, observer):
                stack.enter_context(context)
            output = self._run()
            kept, names = observer.live, tuple(chains)
            in_chains = {chain: observer.live_in(chain) for chain in names}
            keys = tuple(map(str, output)) if isinstance(output, Mapping) else ()
            roots, lives = _roots(output), observer.lives_of(_tensors_in(output, set()))
            del output
            with observer.in_call(True):
                if roots:
                    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
        recomputed = {chain: observer.recomputed[chain] for chain in ("", *names)}
        peak = observer.peak_with(lives)
        return Usage(kept, peak, observer.peak, self._counter.flops, in_chains, recomputed), keys

    @abstractmethod
    def _run(self) -> Any:
        """Run the copy on the copied arguments; return its output."""

    def _fake(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            fake: Tensor = self._mode.from_tensor(tensor)
            return fake
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)


class ViewRehearsal(Rehearsal):
    """A rehearsal of the graph that a view shows.

    Args:
        view: the view.
        args: arguments of the call.
        kwargs: arguments by name.
        settings: gives the settings that a momentum call is run by, if not its own.
        plans: what a memory budget's plans were decided from.
        counter: counts the floating-point operations.
    """

    def __init__(
        self,
        view: View,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        settings: Callable[[Momentum], ChainSettings] | None = None,
        plans: NetPlans | None = None,
        counter: FlopCounter | None = None,
    ) -> None:
        super().__init__(view.module, args, kwargs, counter)
        self._calls = {
            name: Rehearsed(call, self._observer, None if settings is None else settings(call), plans)
            for name, call in view.all_calls.items()
        }
        self._plans, self._view = plans, view

    @override
    def training_step(self, chains: Iterable[str] = ()) -> tuple[Usage, tuple[str, ...]]:
        return super().training_step((*chains, *(call.chain for call in self._calls.values())))

    def held(self, keys: tuple[str, ...]) -> dict[str, int]:
        """Return the bytes that are freed when these entries are deleted from the output, one after the other."""
        with compat.fake_mode(self._mode), torch.enable_grad(), self._observer:
            output = dict(self._run())
            freed = {}
            for key in keys:
                before = self._observer.live
                del output[key]
                freed[key] = before - self._observer.live
        return freed

    @override
    def _run(self) -> Any:
        view = self._view
        compiler = self._watched if view.recomputes_more else to_function
        watched = partial(WatchedStep, self._observer)
        forward_pass = nullcontext() if self._plans is None else self._plans.forward_pass(_KEY, watched)
        with forward_pass, self._observer.in_call(view.recomputes_more):
            return view.run(self._net, self._calls, self._inputs, compiler)

    def _watched(self, graph: Graph) -> Callable[..., Any]:
        return self._observer.step("", to_function(graph))


def _roots(output: Any) -> list[Tensor]:
    """Return the tensors that the backward pass starts at."""
    if isinstance(output, Mapping) and output:
        loss = output.get("loss")
        output = next(iter(output.values())) if loss is None else loss
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield the tensors of an output, also those that objects in it hold, as a cache does."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module | type):
            seen.add(id(leaf))
            yield from _tensors_in(getattr(leaf, "__dict__", ()), seen)
