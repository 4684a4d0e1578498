"""The ways in which compiled code calls nets: all there is to a call but the values of its tensors."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.compiler.output_spec import Foreseen, FromInput, Produced, foreseen_of
from mfx.modules.overlay import Extra
from mfx.modules.random_state import undisturbed
from mfx.modules.tree_copy import tree_copy
from mfx_passes import MfxError

if TYPE_CHECKING:
    from mfx.compiler.callee import Callee
    from mfx.program.codegen import GraphCompiler


_FORWARDS: weakref.WeakValueDictionary[str, Callee] = weakref.WeakValueDictionary()
_SITES: weakref.WeakValueDictionary[str, CallSite] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Call:
    """What two calls must have in common to be of one site.

    Attributes:
        spec: the structure of ``(args, kwargs)``.
        constants: types and values of the leaves that are no tensors, by position.
        requires: of the arguments' tensors, the parameters and the buffers: which require a gradient.
        grad: whether gradients are recorded.
        autocast: the state of autocast, by kind of device.
        compiler: what makes functions of the net's graphs.
    """

    spec: Any
    constants: Mapping[int, tuple[type, Any]]
    requires: tuple[bool, ...]
    grad: bool
    autocast: Mapping[str, compat.AutocastState]
    compiler: GraphCompiler

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with these tensors in them."""
        rest = iter(tensors)
        constants = self.constants
        leaves = [constants[at][1] if at in constants else next(rest) for at in range(self.spec.num_leaves)]
        return pytree.tree_unflatten(leaves, self.spec)  # type: ignore[no-any-return]

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Gradients and autocast are as they were for the code that made the call."""
        with ExitStack() as stack:
            stack.enter_context(compat.above_autograd())
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, state in self.autocast.items():
                stack.enter_context(compat.autocast_as(kind, state))
            yield


@dataclass(eq=False)
class CallSite:
    """One way to call a net.

    Attributes:
        forward: the net's forward.
        call: what is fixed in the call.
        key: by which operations name the site; no other process uses it, so no compiled graph is taken for another.
        foreseen: what the call does, by which code that calls it was compiled.
    """

    forward: Callee
    call: Call
    foreseen: Foreseen
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    def assemble(self, results: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
        """What the net returns, with these tensors in it."""

        def put(leaf: Any) -> Any:
            if isinstance(leaf, Produced):
                return results[leaf.position]
            return given[leaf.position] if isinstance(leaf, FromInput) else leaf

        return pytree.tree_map(put, self.foreseen.structure)

    def infer(self, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like the net's results.

        Raises:
            MfxError: the net does something else by now than what was foreseen when the site was made.
        """
        if self.foreseen.sizes is not None:  # then there is nothing that the inputs' sizes could add
            return [
                torch.empty(sizes, dtype=dtype, device=device)
                for sizes, (dtype, device, _) in zip(self.foreseen.sizes, self.foreseen.kinds, strict=True)
            ]
        foreseen, results = _foresee(self.forward, self.call, inputs, held)
        self.check(foreseen)
        return [torch.empty(result.shape, dtype=result.dtype, device=result.device) for result in results]

    def check(self, real: Foreseen) -> None:
        """Compare with what a call did.

        Raises:
            MfxError: code that was compiled for what was foreseen would go on with something else.
        """
        difference = self.foreseen.difference(real)
        if difference is not None:
            raise MfxError(
                f"{type(self.forward.net).__name__} {difference} when the code around it was compiled. Call "
                "torch.compiler.reset() after a change of the model."
            )


def register(forward: Callee) -> str:
    """A key by which `forward_by` finds a net's forward as long as there is one."""
    key = uuid.uuid4().hex
    _FORWARDS[key] = forward
    return key


def forward_by(key: str) -> Callee:
    """The net's forward that is known by a key."""
    return _FORWARDS[key]


def calls_a_net(graph: fx.Graph) -> bool:
    """Whether a graph that Dynamo made contains a call of a net."""
    arguments = pytree.tree_leaves([(node.args, node.kwargs) for node in graph.nodes])
    return any(isinstance(argument, str) and argument in _FORWARDS for argument in arguments)


def site_of(key: str) -> CallSite:
    """The site of that key."""
    return _SITES[key]


def site_for(
    forward: Callee, args: Any, kwargs: Any, held: Sequence[Tensor], compiler: GraphCompiler
) -> tuple[CallSite, list[Tensor]]:
    """The site of a call, and the tensors of its arguments.

    Args:
        forward: the net's forward.
        args: positional arguments.
        kwargs: arguments by name.
        held: the net's parameters and buffers.
        compiler: what makes functions of the net's graphs.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    constants = {at: _fixed(leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    given = [*inputs, *held]
    grad = torch.is_grad_enabled()
    requires = tuple(grad and tensor.requires_grad for tensor in given)
    kinds = sorted({"cpu", *(tensor.device.type for tensor in given)})
    autocast = {kind: compat.autocast_state(kind) for kind in kinds if torch.amp.is_autocast_available(kind)}
    call = Call(spec, constants, requires, grad, autocast, compiler)
    foreseen, _ = _foresee(forward, call, inputs, held)
    site = next((site for site in forward.call_sites if (site.call, site.foreseen) == (call, foreseen)), None)
    if site is None:
        site = CallSite(forward, call, foreseen)
        forward.call_sites.append(site)
        _SITES[site.key] = site
    return site, inputs


def _foresee(
    forward: Callee, call: Call, inputs: Sequence[Tensor], held: Sequence[Tensor]
) -> tuple[Foreseen, list[Tensor]]:
    """What a call will do, found by running the model as it was on tensors without values."""
    net, mode = forward.net, compat.fake_mode_of([*inputs, *held])
    stand_ins: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        return stand_ins[id(tensor)] if id(tensor) in stand_ins else mode.from_tensor(tensor)

    with compat.without_modes(), undisturbed(net), mode, call.as_called():
        given = [_leaf_like(t, r) for t, r in zip([*inputs, *held], call.requires, strict=True)]
        stand_ins.update((id(t), fake) for t, fake in zip(held_by(net), given[len(inputs) :], strict=True))
        shadow = tree_copy(net, fake)
        args, kwargs = call.arguments(given[: len(inputs)])
        returned = shadow.forward(*args, **kwargs)  # hooks of the net itself are part of the code around it
        foreseen, results = foreseen_of(net, returned, given)
    return replace(foreseen, used=tuple(sorted({*foreseen.used, *_added(net, call, len(inputs))}))), results


def _leaf_like(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A tensor of its own, whichever compiler's stand-in ``tensor`` is."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(requires_grad)


def _added(net: nn.Module, call: Call, first: int) -> Iterator[int]:
    """Positions, from ``first`` on, of the parameters that momentumize gave a net, which the model as it was lacks."""
    own = {id(tensor) for child in net.children() if isinstance(child, Extra) for tensor in child.parameters()}
    for at, tensor in enumerate(held_by(net), first):
        if id(tensor) in own and call.requires[at]:
            yield at


def _fixed(value: Any) -> tuple[type, Any]:
    """A value and its type; a number that a compiler would leave open is fixed to what it is."""
    if isinstance(value, torch.SymInt):
        value = int(value)
    elif isinstance(value, torch.SymFloat):
        value = float(value)
    return type(value), value


def held_by(net: nn.Module) -> list[Tensor]:
    """A net's parameters, and then its buffers, each tensor once."""
    parameters = list(net.parameters())
    known = set(map(id, parameters))
    return [*parameters, *(buffer for buffer in net.buffers() if id(buffer) not in known)]
