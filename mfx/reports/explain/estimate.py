"""What a training step takes with and without mfx, from a step that nobody computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.arguments import bind
from mfx.engine.memory.flops import FlopCounter
from mfx.net.forward import RewrittenForward
from mfx.program.chain_call import Momentum
from mfx.program.codegen import GraphCompiler, to_function
from mfx.program.memory_plans import NetPlans
from mfx.program.rewritten import RewrittenGraph
from mfx.program.shapes import shadow_of, undivided
from mfx.reports.explain.rehearsal import Observer, Rehearsed

Calls = Mapping[str, Momentum]
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Usage:
    """What one training step takes.

    Attributes:
        kept: bytes alive between forward and backward, the output among them, as `mfx.ActivationMeter` counts:
            every storage once, without parameters, buffers and inputs.
        peak: the most bytes alive at once, parameters' gradients not among them; with large states handled in one
            piece, as on a GPU. A CPU takes them block by block, so that exact arithmetic may take less there.
        flops: floating-point operations of matrix products, convolutions and attention.
        chains: bytes of ``kept`` that came to be in each chain, by name.
        recomputed: those of the ``flops`` that second runs of each chain's branches take, by name.
    """

    kept: int
    peak: int
    flops: int
    chains: Mapping[str, int]
    recomputed: Mapping[str, int]


@dataclass(frozen=True)
class Estimate:
    """A training step with ordinary backpropagation through the original model, and as mfx runs it.

    Attributes:
        plain: the original.
        momentum: the rewritten one.
        held: bytes between forward and backward that are alive only because the output has them, by the output's key.
    """

    plain: Usage
    momentum: Usage
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed.

    Attributes:
        net: the model.
        calls: its momentum calls, by name.
        run: runs a copy of the model, with these calls in the place of its own, on arguments; what lies between the
            calls by functions that a compiler makes.
        reruns_rest: whether what lies between the calls runs again in the backward pass, too.
    """

    net: nn.Module
    calls: Calls
    run: Callable[[nn.Module, Calls, Inputs, GraphCompiler], Any]
    reruns_rest: bool = False


def estimate(
    subject: Rehearsal, args: tuple[Any, ...], kwargs: Mapping[str, Any], optional: tuple[str, ...] = ()
) -> Estimate:
    """Rehearse a training step on tensors without values, which takes neither their memory nor their time.

    The backward pass starts at the loss, if the output names one, else at the output's first entry. Whatever device the
    tensors are on, the operations are those of a CPU.

    Args:
        subject: what to rehearse, in the training mode that it is in.
        args: arguments of the call; any device, meta too.
        kwargs: arguments by name.
        optional: keys of the output that the user might do without.
    """
    plans = _plans(subject.calls.values())
    if plans is not None:  # the first step keeps as little as can be, and shows what is to be had for the budget
        _Stage(subject, args, kwargs, plans=plans).training_step()
    usage, output_keys = _Stage(subject, args, kwargs, plans=plans).training_step()
    plain = _Stage(subject, args, kwargs, plain=True).training_step()[0] if subject.calls else usage
    wanted = tuple(key for key in optional if key in output_keys)
    return Estimate(plain, usage, _Stage(subject, args, kwargs, plans=plans).held(wanted) if wanted else {})


def _plans(calls: Iterable[Momentum]) -> NetPlans | None:
    """For the budget that the calls share; None if it is all or nothing."""
    return next((NetPlans(call.budget) for call in calls if call.plans is not None), None)


def of_entry(forward: RewrittenForward, entry: RewrittenGraph) -> Rehearsal:
    """A net, by one of its rewritten graphs."""
    inner = _calls_in(forward.net)  # of momentum nets that the user put into the model

    def run(net: nn.Module, calls: Calls, inputs: Inputs, compiler: GraphCompiler) -> Any:
        args, kwargs = inputs
        _put(net, {path: calls[f"{path}()"] for path in inner})
        own = copy.copy(entry)
        own.calls = {name: calls[name] for name in entry.calls}
        if entry.captured.frame is not None:
            return own.call(net, args, kwargs, compiler)
        return own.run(net, bind(net, forward.__signature__, args, kwargs), compiler)

    calls = {**{f"{path}()": call for path, call in inner.items()}, **entry.calls}
    return Rehearsal(forward.net, calls, run, entry.recompute_between)


def of_module(module: nn.Module) -> Rehearsal:
    """A module that holds its momentum calls: a graph module that was rewritten, a momentum net."""

    def run(net: nn.Module, calls: Calls, inputs: Inputs, compiler: GraphCompiler) -> Any:
        args, kwargs = inputs
        _put(net, calls)
        return net(*args, **kwargs)

    return Rehearsal(module, _calls_in(module), run)


def _calls_in(net: nn.Module) -> dict[str, Momentum]:
    """The momentum calls that are modules in a net, by path."""
    return {path: inner for path, inner in net.named_modules() if isinstance(inner, Momentum)}


def _put(net: nn.Module, calls: Calls) -> None:
    for path, call in calls.items():
        net.set_submodule(path, call)


class _Stage:
    """A copy of a model and of a call's arguments, all of tensors without values, and an observer."""

    def __init__(
        self,
        subject: Rehearsal,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        plain: bool = False,
        plans: NetPlans | None = None,
    ) -> None:
        with compat.fake_mode() as self._mode:
            fakes: dict[int, Tensor] = {}

            def fake(tensor: Tensor) -> Tensor:
                return fakes.setdefault(id(tensor), self._fake(undivided(tensor)))

            self._net = shadow_of(subject.net, fake)
            self._inputs: Inputs = pytree.tree_map_only(Tensor, fake, (args, dict(kwargs)))
        own = [*self._net.parameters(), *self._net.buffers()]
        self._trained = [tensor for tensor in own if tensor.requires_grad]
        self._counter = FlopCounter()
        self._observer = Observer(own, self._counter)
        self._calls = {
            name: Rehearsed(call, self._observer, plain=plain, plans=plans) for name, call in subject.calls.items()
        }
        self._plans = plans
        self._subject = subject

    def training_step(self) -> tuple[Usage, tuple[str, ...]]:
        """What a training step takes, and the keys of the output."""
        observer = self._observer
        hooks = [tensor.register_post_accumulate_grad_hook(observer.leave_out_grad) for tensor in self._trained]
        try:
            with compat.unlogged(), self._mode, torch.enable_grad(), self._counter, observer:
                output = self._run()
                kept, chains = observer.live, [call.chain for call in self._calls.values()]
                in_chains = {chain: observer.live_in(chain) for chain in chains}
                with observer.in_call(True):
                    _backpropagate(output)
        finally:
            for hook in hooks:
                hook.remove()
        recomputed = {chain: observer.recomputed[chain] for chain in chains}
        keys = tuple(map(str, output)) if isinstance(output, Mapping) else ()
        return Usage(kept, observer.peak, self._counter.flops, in_chains, recomputed), keys

    def held(self, keys: tuple[str, ...]) -> dict[str, int]:
        """What is freed when the output is left without these entries, one after the other."""
        with compat.unlogged(), self._mode, torch.enable_grad(), self._observer:
            output = dict(self._run())
            freed = {}
            for key in keys:
                before = self._observer.live
                del output[key]
                freed[key] = before - self._observer.live
        return freed

    def _run(self) -> Any:
        subject = self._subject
        compiler = self._watched if subject.reruns_rest else to_function
        passing = nullcontext() if self._plans is None else self._plans.forward_pass("rehearsal")
        with passing, self._observer.in_call(subject.reruns_rest):
            return subject.run(self._net, self._calls, self._inputs, compiler)

    def _watched(self, graph: Graph) -> Callable[..., Any]:
        return self._observer.step("", to_function(graph))

    def _fake(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            fake: Tensor = self._mode.from_tensor(tensor)
            return fake
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)


def _backpropagate(output: Any) -> None:
    if isinstance(output, Mapping) and output:
        loss = output.get("loss")
        output = next(iter(output.values())) if loss is None else loss
    roots = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])
