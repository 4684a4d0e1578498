"""Large tensors, a block at a time: a CPU goes over a block many times while it is in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# In elements of eight bytes: of the five tensors in hand most then fit into a second-level cache, and the calls
# themselves take little of the time. torch gives a thread no less than half of it.
_BLOCK = 2**16


def can_be_split(t: Tensor) -> bool:
    """Whether ``t`` is ordinary memory of a CPU; anything else is treated in one piece."""
    return t.device.type == "cpu" and is_plain(t)


def is_plain(t: Tensor) -> bool:
    """Whether ``t`` is memory and nothing else: no subclass that stands for several tensors, or for none."""
    return type(t) in (Tensor, torch.nn.Parameter)


def blocks(*tensors: Tensor, scratch: int = 0) -> Iterable[tuple[Tensor, ...]]:
    """Corresponding blocks of the tensors, one-dimensional views, or the tensors themselves.

    Args:
        tensors: of the same shape; what is to be written must be laid out in memory as the first one, which has no
            holes.
        scratch: how many float64 blocks to add, whose content is the last round's.
    """
    first = tensors[0]
    size = max(_BLOCK, _BLOCK // 2 * torch.get_num_threads())
    if first.numel() <= size or not can_be_split(first):
        return ((*tensors, *[torch.empty_like(first, dtype=torch.float64) for _ in range(scratch)]),)
    return _parts(tensors, size, scratch)


def _parts(tensors: tuple[Tensor, ...], size: int, scratch: int) -> Iterator[tuple[Tensor, ...]]:
    first = tensors[0]
    spare = [first.new_empty(size, dtype=torch.float64) for _ in range(scratch)]
    for parts in zip(*(flat(t, first).split(size) for t in tensors), strict=True):
        length = parts[0].numel()
        yield (*parts, *(spare if length == size else [t[:length] for t in spare]))


def flat(t: Tensor, first: Tensor) -> Tensor:
    """The elements in the order in which those of ``first`` lie in memory, a view if ``t`` is laid out alike."""
    if t.stride() != first.stride():
        t = torch.empty_like(first, dtype=t.dtype).copy_(t)
    return t.as_strided((t.numel(),), (1,))
