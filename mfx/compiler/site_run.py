"""One run of a net for compiled code, with an autograd graph of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mfx import compat
from mfx.compiler.call_site import CallSite
from mfx.compiler.output_spec import describe_outputs
from mfx.engine.recompute.tables import TensorSlot
from mfx_passes import MfxError


class SiteRun:
    """A run of a net on stand-ins for the tensors of the compiled code, which has its own autograd graph.

    Args:
        site: the call site.
        inputs: the tensors of its arguments.
        held: the tensors that are to be its parameters and buffers.
    """

    def __init__(self, site: CallSite, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        self._site = site
        self._slots = _slots(site.forward.net)
        if len(self._slots) != len(held):
            raise MfxError(
                f"{type(site.forward.net).__name__} has {len(self._slots)} parameters and buffers, and had {len(held)} "
                "when the code around it was compiled. Call torch.compiler.reset() after a change of the model."
            )
        requires = iter(site.call.requires)
        self._inputs = [tensor.detach().requires_grad_(next(requires)) for tensor in inputs]
        self._held = [_stand_in(tensor, next(requires), slots) for tensor, slots in zip(held, self._slots, strict=True)]
        self._edges: list[GradientEdge | None] = []
        self._buffers: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """Run the net, and return its results detached.

        Raises:
            MfxError: the outputs are not those that were inferred, or the net changed its input.
        """
        site, net = self._site, self._site.forward.net
        site.forward.refuse_copies()
        args, kwargs = site.call.arguments(self._inputs)
        versions = [tensor._version for tensor in self._inputs]
        with site.call.as_called(), site.forward.lock.writing(), self._held_by_net():
            returned = site.forward.run(args, kwargs, site.call.compiler)
            found, results = describe_outputs(net, returned, [*self._inputs, *self._held])
            self._buffers = [slots[0].get() for slots in self._slots if not slots[0].is_parameter]
        site.check(found)
        if versions != [tensor._version for tensor in self._inputs]:
            raise MfxError(
                f"{type(net).__name__} changes its input in place, which code that torch.compile compiled does not "
                "know of. Give it a copy, or compile the model itself by backend='mfx'."
            )
        self._edges = [get_gradient_edge(result) if result.requires_grad else None for result in results]
        return _without_aliases([_materialized(result) for result in results], [*self._inputs, *self._held])

    def settle(self, buffers: Sequence[Tensor]) -> None:
        """Copy the values that the forward pass left in the net's buffers to ``buffers``."""
        for buffer, value in zip(buffers, self._buffers, strict=True):
            buffer.copy_(value)
        self._buffers = []

    def backward(self, gradients: Sequence[Tensor], like: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
        """Return the gradients of the tensors that the results depend on, in the layout of ``like``.

        Args:
            gradients: those of the differentiable results.
            like: the tensors that the gradients are for.
            keep: True if there may be another backward pass.
        """
        given = [*self._inputs, *self._held]
        wanted = [given[position] for position in self._site.output_spec.used]
        pairs = [(self._edges[at], g) for at, g in zip(self._site.output_spec.differentiable, gradients, strict=True)]
        known = [(edge, gradient) for edge, gradient in pairs if edge is not None]
        with compat.above_autograd():
            found = torch.autograd.grad(
                [edge for edge, _ in known], wanted, [g for _, g in known], retain_graph=keep, allow_unused=True
            )
        return _without_aliases([_in_layout_of(g, tensor) for g, tensor in zip(found, like, strict=True)], gradients)

    @contextmanager
    def _held_by_net(self) -> Iterator[None]:
        """Put the stand-ins in the place of the net's parameters and buffers; a recomputation does so itself."""
        stand_ins = [(slot, tensor) for slots, tensor in zip(self._slots, self._held, strict=True) for slot in slots]
        before = [slot.get() for slot, _ in stand_ins]
        try:
            for slot, tensor in stand_ins:
                slot.put(tensor)
            yield
        finally:
            for (slot, _), tensor in zip(stand_ins, before, strict=True):
                slot.put(tensor)


def _slots(net: nn.Module) -> list[list[TensorSlot]]:
    """Return the slots of each parameter, and then of each buffer, in the order of `mfx.compiler.call_site.held_by`."""
    slots: dict[int, list[TensorSlot]] = {}
    for is_parameter in (True, False):
        for path, module in net.named_modules():
            table = compat.tensor_tables(module)[0 if is_parameter else 1]
            for name, tensor in table.items():
                if tensor is not None:
                    slots.setdefault(id(tensor), []).append(TensorSlot(table, name, f"{path}.{name}", is_parameter))
    return list(slots.values())


def _stand_in(tensor: Tensor, requires_grad: bool, slots: Sequence[TensorSlot]) -> Tensor:
    """Return a leaf over the same values; a copy if it is a buffer, which the net may change."""
    if not slots[0].is_parameter:
        return tensor.detach().clone()
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad)


def _in_layout_of(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient with the strides of ``torch.empty_like(like)``; zeros for None."""
    made = torch.empty_like(like)
    if gradient is None:
        return made.zero_()
    return gradient if gradient.stride() == made.stride() else made.copy_(gradient)


def _materialized(result: Tensor) -> Tensor:
    """Return the values contiguous and without lazy conjugation or negation, flags that compiled code does not see."""
    return result.detach().resolve_conj().resolve_neg().contiguous()


def _without_aliases(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, copied where they share memory with one another or with others, as no operation's may."""
    taken = {compat.memory_of(tensor.untyped_storage()) for tensor in others}
    result: list[Tensor] = []
    for tensor in tensors:
        result.append(tensor.clone() if compat.memory_of(tensor.untyped_storage()) in taken else tensor)
        taken.add(compat.memory_of(result[-1].untyped_storage()))
    return result
