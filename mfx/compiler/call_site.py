"""A call site: everything about a call of a net from compiled code except tensor values."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.compiler.callee import Callee
from mfx.compiler.output_spec import FromInput, OutputSpec, Produced, describe_outputs
from mfx.modules.aside import aside
from mfx.modules.kept_results import results_not_kept
from mfx.modules.overlay import Extra
from mfx.modules.tree_copy import tree_copy
from mfx.program.codegen import GraphCompiler
from mfx_passes import MfxError

_FORWARDS: weakref.WeakValueDictionary[str, Callee] = weakref.WeakValueDictionary()
_SITES: weakref.WeakValueDictionary[str, CallSite] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Call:
    """The parts of a call that two calls of one site have in common.

    Attributes:
        treespec: the structure of ``(args, kwargs)``.
        constants: types and values of the leaves that are not tensors, by position.
        requires: True for each of the arguments' tensors, the parameters and the buffers that requires a gradient.
        grad: True if gradients are recorded.
        autocast: the state of autocast, by kind of device.
        compiler: turns the net's graphs into functions.
    """

    treespec: Any
    constants: Mapping[int, tuple[type, Any]]
    requires: tuple[bool, ...]
    grad: bool
    autocast: Mapping[str, compat.AutocastState]
    compiler: GraphCompiler

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` with these tensors in them."""
        rest = iter(tensors)
        constants = self.constants
        leaves = [constants[at][1] if at in constants else next(rest) for at in range(self.treespec.num_leaves)]
        return pytree.tree_unflatten(leaves, self.treespec)  # type: ignore[no-any-return]

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Set gradients and autocast as they were for the code that made the call."""
        with ExitStack() as stack:
            stack.enter_context(compat.above_autograd())
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, state in self.autocast.items():
                stack.enter_context(compat.autocast_as(kind, state))
            yield


@dataclass(eq=False)
class CallSite:
    """Everything about a call of a net except tensor values.

    Attributes:
        forward: the net's forward.
        call: what is fixed in the call.
        key: names the site in operations; unique across processes, so that no compiled graph is taken for another.
        output_spec: the outputs that the code around the call was compiled for.
    """

    forward: Callee
    call: Call
    output_spec: OutputSpec
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def assemble(self, results: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
        """Return the net's result with these tensors in it."""

        def put(leaf: Any) -> Any:
            if isinstance(leaf, Produced):
                return results[leaf.position]
            return given[leaf.position] if isinstance(leaf, FromInput) else leaf

        return pytree.tree_map(put, self.output_spec.structure)

    def infer(self, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors like the net's results.

        Raises:
            MfxError: the net's outputs have changed since the site was made.
        """
        if self.output_spec.sizes is not None:  # then the sizes do not depend on the inputs
            return [
                torch.empty(sizes, dtype=dtype, device=device)
                for sizes, (dtype, device, _) in zip(self.output_spec.sizes, self.output_spec.kinds, strict=True)
            ]
        output_spec, results = _infer(self.forward, self.call, inputs, held)
        self.check(output_spec)
        return [torch.empty(result.shape, dtype=result.dtype, device=result.device) for result in results]

    def check(self, real: OutputSpec) -> None:
        """Check that the outputs of a call are those that the code around it was compiled for.

        Raises:
            MfxError: they are not.
        """
        difference = self.output_spec.difference(real)
        if difference is not None:
            raise MfxError(
                f"{type(self.forward.net).__name__} {difference}: not as when the code around it was compiled. Call "
                "torch.compiler.reset() after a change of the model."
            )


def register(forward: Callee) -> str:
    """Return a key by which `forward_by` finds a net's forward as long as it lives."""
    key = uuid.uuid4().hex
    _FORWARDS[key] = forward
    return key


def forward_by(key: str) -> Callee:
    """Return the net's forward that is registered under a key."""
    return _FORWARDS[key]


def calls_a_net(graph: fx.Graph) -> bool:
    """True if a graph of Dynamo's contains a call of a net."""
    arguments = pytree.tree_leaves([(node.args, node.kwargs) for node in graph.nodes])
    return any(isinstance(argument, str) and argument in _FORWARDS for argument in arguments)


def site_by(key: str) -> CallSite:
    """Return the call site with a key."""
    return _SITES[key]


def site_for(
    forward: Callee, args: Any, kwargs: Any, held: Sequence[Tensor], compiler: GraphCompiler
) -> tuple[CallSite, list[Tensor]]:
    """Return the site of a call, a new one if need be, and the tensors of its arguments.

    Args:
        forward: the net's forward.
        args: positional arguments.
        kwargs: arguments by name.
        held: the net's parameters and buffers.
        compiler: turns the net's graphs into functions.
    """
    leaves, treespec = pytree.tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    constants = {at: _fixed(leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    given = [*inputs, *held]
    grad = torch.is_grad_enabled()
    requires = tuple(grad and tensor.requires_grad for tensor in given)
    kinds = sorted({"cpu", *(tensor.device.type for tensor in given)})
    autocast = {kind: compat.autocast_state(kind) for kind in kinds if torch.amp.is_autocast_available(kind)}
    call = Call(treespec, constants, requires, grad, autocast, compiler)
    output_spec, _ = _infer(forward, call, inputs, held)
    site = next((site for site in forward.call_sites if (site.call, site.output_spec) == (call, output_spec)), None)
    if site is None:
        site = CallSite(forward, call, output_spec)
        forward.call_sites.append(site)
        _SITES[site.key] = site
    return site, inputs


def _infer(
    forward: Callee, call: Call, inputs: Sequence[Tensor], held: Sequence[Tensor]
) -> tuple[OutputSpec, list[Tensor]]:
    """Infer the outputs of a call by running the original model on fake tensors."""
    net, mode = forward.net, compat.fake_mode_of([*inputs, *held])
    stand_ins: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        return stand_ins[id(tensor)] if id(tensor) in stand_ins else mode.from_tensor(tensor)

    with aside(net), results_not_kept(net), compat.fake_mode(mode), call.as_called():
        given = [_leaf_like(t, r) for t, r in zip([*inputs, *held], call.requires, strict=True)]
        stand_ins.update((id(t), fake) for t, fake in zip(held_by(net), given[len(inputs) :], strict=True))
        shadow = tree_copy(net, fake)
        args, kwargs = call.arguments(given[: len(inputs)])
        returned = shadow.forward(*args, **kwargs)  # hooks of the net itself are part of the code around it
        output_spec, results = describe_outputs(net, returned, given)
    used = {*output_spec.used, *_velocity_parameters(net, call, len(inputs))}
    return replace(output_spec, used=tuple(sorted(used))), results


def _leaf_like(tensor: Tensor, requires_grad: bool) -> Tensor:
    """Return a new leaf like ``tensor``, whichever compiler's stand-in that is."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(requires_grad)


def _velocity_parameters(net: nn.Module, call: Call, first: int) -> Iterator[int]:
    """Yield the positions, from ``first`` on, of the parameters that momentumize added to the original model's."""
    own = {id(tensor) for child in net.children() if isinstance(child, Extra) for tensor in child.parameters()}
    for at, tensor in enumerate(held_by(net), first):
        if id(tensor) in own and call.requires[at]:
            yield at


def _fixed(value: Any) -> tuple[type, Any]:
    """Return a value's type and the value; a symbolic number is fixed to its present value."""
    if isinstance(value, torch.SymInt):
        value = int(value)
    elif isinstance(value, torch.SymFloat):
        value = float(value)
    return type(value), value


def held_by(net: nn.Module) -> list[Tensor]:
    """Return a net's parameters, and then its buffers, each tensor once."""
    parameters = list(net.parameters())
    known = set(map(id, parameters))
    return [*parameters, *(buffer for buffer in net.buffers() if id(buffer) not in known)]
