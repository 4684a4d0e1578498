"""Splitting large tensors into blocks, which stay in a CPU's cache over several operations."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, repeat

import torch
from torch import Tensor

from mfx.compat import is_fake

# In elements of eight bytes: of the five tensors in hand most then fit into a second-level cache, and the calls
# themselves take little of the time. torch gives a thread no less than half of it.
_BLOCK = 2**16


class _Fakes(threading.local):
    are_of_a_cpu = False


_fakes = _Fakes()


@contextmanager
def fakes_of_a_cpu(value: bool) -> Iterator[None]:
    """Within this context tensors without values stand for a CPU's, if ``value``: they are split as those are.

    One of their blocks then stands for all, which one after the other take the same memory.
    """
    before, _fakes.are_of_a_cpu = _fakes.are_of_a_cpu, value
    try:
        yield
    finally:
        _fakes.are_of_a_cpu = before


def can_be_split(t: Tensor) -> bool:
    """True if ``t`` is ordinary memory of a CPU; other tensors are not split."""
    return t.device.type == "cpu" and is_plain(t)


def is_plain(t: Tensor) -> bool:
    """True if ``t`` is a tensor in memory, not a subclass that stands for several tensors or for none."""
    return type(t) in (Tensor, torch.nn.Parameter)


def is_single(t: Tensor) -> bool:
    """True if ``t`` is such a tensor, or one without values that stands for it."""
    return is_plain(t) or is_fake(t)


def blocks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return corresponding blocks of the tensors, one-dimensional views, or the tensors themselves.

    Args:
        tensors: of the same shape, or without dimensions: those are in every block. Those to be written must be laid
            out in memory as the first one, which has no holes.
    """
    first = tensors[0]
    count, size = first.numel(), _BLOCK
    if count > size:
        size = max(size, _BLOCK // 2 * torch.get_num_threads())
    for_all = _fakes.are_of_a_cpu and is_fake(first)
    if count <= size or not (for_all or can_be_split(first)):
        return (tensors,)
    parts = zip(*(flat(t, first).split(size) if t.dim() else repeat(t) for t in tensors), strict=False)
    return islice(parts, 1) if for_all else parts


def flat(t: Tensor, first: Tensor) -> Tensor:
    """Return the elements in the order of those of ``first`` in memory, a view if ``t`` is laid out alike."""
    if t.stride() != first.stride():
        t = torch.empty_like(first, dtype=t.dtype).copy_(t)
    return t.as_strided((t.numel(),), (1,))
