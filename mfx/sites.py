"""The ways in which compiled code calls nets: all there is to a call but the values of its tensors."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.randomness import undisturbed
from mfx.tree import tree_copy
from mfx_passes import MfxError

if TYPE_CHECKING:
    from mfx.net import RewrittenForward
    from mfx.program import Program

__all__ = ["Given", "Result", "Site", "disassemble", "forward_by", "is_plain", "know", "site_for", "site_of"]

_FORWARDS: weakref.WeakValueDictionary[str, RewrittenForward] = weakref.WeakValueDictionary()
_SITES: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Given:
    """A tensor that a net returns as it was given: the ``position``-th of its arguments, parameters and buffers."""

    position: int


@dataclass(frozen=True)
class Result:
    """The ``position``-th of the tensors that a net makes."""

    position: int


@dataclass(frozen=True)
class _Call:
    """What two calls must have in common to be of one site.

    Attributes:
        spec: the structure of ``(args, kwargs)``.
        constants: types and values of the leaves that are no tensors, by position.
        requires: of the arguments' tensors, the parameters and the buffers: which require a gradient.
        grad: whether gradients are recorded.
        autocast: the state of autocast, by kind of device.
        program: what makes functions of the net's graphs.
    """

    spec: Any
    constants: Mapping[int, tuple[type, Any]]
    requires: tuple[bool, ...]
    grad: bool
    autocast: Mapping[str, compat.AutocastState]
    program: Program


@dataclass(eq=False)
class Site:
    """One way to call a net.

    Attributes:
        forward: the net's forward.
        call: what is fixed in the call.
        key: by which operations name the site; no other process uses it, so no compiled graph is taken for another.
        structure: what the net returns, with `Result` and `Given` for tensors; known once ``foresee`` has run.
        used: positions of the given tensors that the results depend on, of those that require a gradient.
        differentiable: positions of the results that require a gradient.
    """

    forward: RewrittenForward
    call: _Call
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    structure: Any = None
    used: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with these tensors in them."""
        rest = iter(tensors)
        constants = self.call.constants
        leaves = [constants[at][1] if at in constants else next(rest) for at in range(self.call.spec.num_leaves)]
        return pytree.tree_unflatten(leaves, self.call.spec)  # type: ignore[no-any-return]

    def assemble(self, results: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
        """What the net returns, with these tensors in it."""

        def put(leaf: Any) -> Any:
            if isinstance(leaf, Result):
                return results[leaf.position]
            return given[leaf.position] if isinstance(leaf, Given) else leaf

        return pytree.tree_map(put, self.structure)

    def foresee(self, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like the net's results, found by running the model as it was on tensors without values."""
        net, mode = self.forward.net, compat.fake_mode_of([*inputs, *held])
        given = [t.detach().requires_grad_(r) for t, r in zip([*inputs, *held], self.call.requires, strict=True)]
        stand_ins = {id(t): fake for t, fake in zip(held_by(net), given[len(inputs) :], strict=True)}

        def fake(tensor: Tensor) -> Tensor:
            return stand_ins[id(tensor)] if id(tensor) in stand_ins else mode.from_tensor(tensor)

        with compat.without_modes(), undisturbed(net), mode, self.as_called():
            shadow = tree_copy(net, fake)
            args, kwargs = self.arguments(given[: len(inputs)])
            self.structure, results = disassemble(net, shadow(*args, **kwargs), given)
        self.differentiable = tuple(at for at, result in enumerate(results) if result.requires_grad)
        reached = compat.leaves_of([results[at] for at in self.differentiable])
        self.used = tuple(at for at, tensor in enumerate(given) if tensor.requires_grad and id(tensor) in reached)
        return [torch.empty(result.shape, dtype=result.dtype, device=result.device) for result in results]

    @contextmanager
    def as_called(self) -> Iterator[None]:
        """Gradients and autocast are as they were for the code that made the call."""
        with ExitStack() as stack:
            stack.enter_context(compat.above_autograd())
            stack.enter_context(torch.set_grad_enabled(self.call.grad))
            for kind, state in self.call.autocast.items():
                stack.enter_context(compat.autocast_as(kind, state))
            yield


def know(forward: RewrittenForward) -> str:
    """A key by which `forward_by` finds a net's forward as long as there is one."""
    key = uuid.uuid4().hex
    _FORWARDS[key] = forward
    return key


def forward_by(key: str) -> RewrittenForward:
    """The net's forward that is known by a key."""
    return _FORWARDS[key]


def site_of(key: str) -> Site:
    """The site of that key."""
    return _SITES[key]


def site_for(
    forward: RewrittenForward, args: Any, kwargs: Any, held: Sequence[Tensor], program: Program
) -> tuple[Site, list[Tensor]]:
    """The site of a call, and the tensors of its arguments.

    Args:
        forward: the net's forward.
        args: positional arguments.
        kwargs: arguments by name.
        held: the net's parameters and buffers.
        program: what makes functions of the net's graphs.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    constants = {at: _fixed(leaf) for at, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    given = [*inputs, *held]
    grad = torch.is_grad_enabled()
    requires = tuple(grad and tensor.requires_grad for tensor in given)
    kinds = sorted({"cpu", *(tensor.device.type for tensor in given)})
    autocast = {kind: compat.autocast_state(kind) for kind in kinds if torch.amp.is_autocast_available(kind)}
    call = _Call(spec, constants, requires, grad, autocast, program)
    site = next((site for site in forward.sites if site.call == call), None)
    if site is None:
        site = Site(forward, call)
        forward.sites.append(site)
        _SITES[site.key] = site
    return site, inputs


def _fixed(value: Any) -> tuple[type, Any]:
    """A value and its type; a number that a compiler would leave open is fixed to what it is."""
    if isinstance(value, torch.SymInt):
        value = int(value)
    elif isinstance(value, torch.SymFloat):
        value = float(value)
    return type(value), value


def held_by(net: nn.Module) -> list[Tensor]:
    """A net's parameters and buffers, each once."""
    return [*net.parameters(), *net.buffers()]


def is_plain(value: object) -> bool:
    """Whether a value that is no tensor may come out of a graph."""
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device)


def disassemble(net: nn.Module, returned: Any, given: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """What a net returned, with `Result` and `Given` for tensors; and its results.

    Raises:
        MfxError: something in it is neither a tensor nor a plain value.
    """
    places: dict[int, Result | Given] = {id(tensor): Given(at) for at, tensor in enumerate(given)}
    results: list[Tensor] = []

    def take(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return int(leaf)
        if not isinstance(leaf, Tensor):
            if is_plain(leaf):
                return leaf
            raise MfxError(
                f"{type(net).__name__} returns a {type(leaf).__name__}, which cannot come out of a graph that "
                "torch.compile makes. Have it return tensors and plain values (of a Hugging Face model: pass "
                "use_cache=False), or compile without fullgraph=True."
            )
        if id(leaf) not in places:
            places[id(leaf)] = Result(len(results))
            results.append(leaf)
        return places[id(leaf)]

    return pytree.tree_map(take, returned), results
