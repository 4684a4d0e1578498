"""One run of a net on behalf of compiled code, with an autograd graph of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mfx import compat
from mfx.compiler.call_site import CallSite
from mfx.compiler.output_spec import foreseen_of
from mfx.engine.recompute.layout import TensorSlot
from mfx_passes import MfxError


class SiteRun:
    """Runs the net on tensors that stand in for those of the compiled code, which has autograd for itself.

    Args:
        site: how the net is called.
        inputs: the tensors of its arguments.
        held: the tensors that are to be its parameters and buffers.
    """

    def __init__(self, site: CallSite, inputs: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        self._site = site
        self._homes = _homes(site.forward.net)
        if len(self._homes) != len(held):
            raise MfxError(
                f"{type(site.forward.net).__name__} has {len(self._homes)} parameters and buffers, and had {len(held)} "
                "when the code around it was compiled. Call torch.compiler.reset() after a change of the model."
            )
        requires = iter(site.call.requires)
        self._inputs = [tensor.detach().requires_grad_(next(requires)) for tensor in inputs]
        self._held = [_stand_in(tensor, next(requires), homes) for tensor, homes in zip(held, self._homes, strict=True)]
        self._edges: list[GradientEdge | None] = []
        self._buffers: list[Tensor] = []

    def forward(self) -> list[Tensor]:
        """The results of the net, out of the hands of autograd.

        Raises:
            MfxError: the net did something else than what was foreseen, or changed its input.
        """
        site, net = self._site, self._site.forward.net
        args, kwargs = site.call.arguments(self._inputs)
        versions = [tensor._version for tensor in self._inputs]
        with site.call.as_called(), self._held_by_net():
            returned = site.forward.run(args, kwargs, site.call.compiler)
            found, results = foreseen_of(net, returned, [*self._inputs, *self._held])
            self._buffers = [homes[0].get() for homes in self._homes if not homes[0].is_parameter]
        site.check(found)
        if versions != [tensor._version for tensor in self._inputs]:
            raise MfxError(
                f"{type(net).__name__} changes its input in place, which code that torch.compile compiled does not "
                "know of. Give it a copy, or compile the model itself by backend='mfx'."
            )
        self._edges = [get_gradient_edge(result) if result.requires_grad else None for result in results]
        return _apart([_plain(result) for result in results], [*self._inputs, *self._held])

    def settle(self, buffers: Sequence[Tensor]) -> None:
        """Give ``buffers`` the values that the forward pass left."""
        for buffer, value in zip(buffers, self._buffers, strict=True):
            buffer.copy_(value)
        self._buffers = []

    def backward(self, gradients: Sequence[Tensor], like: Sequence[Tensor], *, keep: bool) -> list[Tensor]:
        """The gradients of what the results depend on, in the layout of ``like``.

        Args:
            gradients: of the results that are differentiable.
            like: the tensors that the gradients are for.
            keep: whether there may be another backward pass.
        """
        given = [*self._inputs, *self._held]
        wanted = [given[position] for position in self._site.foreseen.used]
        pairs = [(self._edges[at], g) for at, g in zip(self._site.foreseen.differentiable, gradients, strict=True)]
        known = [(edge, gradient) for edge, gradient in pairs if edge is not None]
        with compat.above_autograd(), self._held_by_net():
            found = torch.autograd.grad(
                [edge for edge, _ in known], wanted, [g for _, g in known], retain_graph=keep, allow_unused=True
            )
        return _apart([_laid_out(g, tensor) for g, tensor in zip(found, like, strict=True)], gradients)

    @contextmanager
    def _held_by_net(self) -> Iterator[None]:
        """The net has the stand-ins for parameters and buffers."""
        places = [(home, tensor) for homes, tensor in zip(self._homes, self._held, strict=True) for home in homes]
        with self._site.forward.lock:  # another thread's stand-ins are not the net's own, to be put back
            before = [home.get() for home, _ in places]
            try:
                for home, tensor in places:
                    home.put(tensor)
                yield
            finally:
                for (home, _), tensor in zip(places, before, strict=True):
                    home.put(tensor)


def _homes(net: nn.Module) -> list[list[TensorSlot]]:
    """Where each parameter, and then each buffer, of a net lies, in the order of `mfx.compiler.call_site.held_by`."""
    homes: dict[int, list[TensorSlot]] = {}
    for is_parameter in (True, False):
        for path, module in net.named_modules():
            table = module._parameters if is_parameter else module._buffers
            for name, tensor in table.items():
                if tensor is not None:
                    homes.setdefault(id(tensor), []).append(TensorSlot(table, name, f"{path}.{name}", is_parameter))
    return list(homes.values())


def _stand_in(tensor: Tensor, requires_grad: bool, homes: Sequence[TensorSlot]) -> Tensor:
    """A leaf over the same values; of a buffer, a copy, which the net may change."""
    if not homes[0].is_parameter:
        return tensor.detach().clone()
    return nn.Parameter(tensor.detach(), requires_grad=requires_grad)


def _laid_out(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient with the strides of ``torch.empty_like(like)``; zeros if nothing depends on it."""
    made = torch.empty_like(like)
    if gradient is None:
        return made.zero_()
    return gradient if gradient.stride() == made.stride() else made.copy_(gradient)


def _plain(result: Tensor) -> Tensor:
    """The values as they lie in memory to whoever sees no flags on a tensor: without lazy conjugation and negation."""
    return result.detach().resolve_conj().resolve_neg().contiguous()


def _apart(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors, copied where they share memory with one another or with others, as no operation may."""
    taken = {compat.memory_of(tensor.untyped_storage()) for tensor in others}
    result: list[Tensor] = []
    for tensor in tensors:
        result.append(tensor.clone() if compat.memory_of(tensor.untyped_storage()) in taken else tensor)
        taken.add(compat.memory_of(result[-1].untyped_storage()))
    return result
