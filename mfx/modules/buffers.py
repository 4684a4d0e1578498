"""Buffers that can be changed in place: arrays of numpy, records of one, and the standard library's."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection
from io import BytesIO, StringIO
from operator import methodcaller
from typing import Any

import torch
from torch import nn

DATA = 2**26
"""Bytes of a buffer above which it is not looked at: data, not something that a model notes."""


NO_STORAGE = torch.UntypedStorage(0)
_storage = methodcaller("untyped_storage")


def storages_of(tensors: Collection[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Return the storages of tensors; ``NO_STORAGE`` for kinds of tensors that have none.

    While it is kept, the storage of some memory is one object, and no other can be taken for it.
    """
    try:
        return [*map(_storage, tensors)]
    except (RuntimeError, NotImplementedError):
        return [_storage_or_none(tensor) for tensor in tensors]


def _storage_or_none(tensor: torch.Tensor) -> torch.UntypedStorage:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return NO_STORAGE


def storage_of(tensor: torch.Tensor) -> int:
    """Return what tensors have in common that share memory; 0 for kinds of tensors that have no memory of one piece."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if is_plain else 0


def is_buffer(value: object) -> bool:
    """True for a buffer of numbers or text that can be changed in place."""
    if isinstance(value, bytearray | array | memoryview | BytesIO | StringIO):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray | numpy.void)


def size_of(value: Any) -> int:
    """Return the bytes of a buffer."""
    if isinstance(value, BytesIO | StringIO):
        return 0 if value.closed else len(value.getvalue())
    if isinstance(value, array):
        return len(value) * value.itemsize
    return len(value) if isinstance(value, bytearray) else int(value.nbytes)


def numbers_of(value: Any) -> tuple[Any, ...]:
    """Return what a buffer holds: its bytes, its shape, and the objects if it is an array of objects.

    Of a file in memory, the second is the position.
    """
    if isinstance(value, BytesIO | StringIO):
        return (None, None) if value.closed else (value.getvalue(), value.tell())
    as_bytes = bytes(value) if isinstance(value, bytearray) else value.tobytes()
    dtype = getattr(value, "dtype", None)
    objects = tuple(value.flat) if dtype is not None and dtype.hasobject and hasattr(value, "flat") else ()
    return as_bytes, getattr(value, "shape", None), *objects


def set_numbers(value: Any, numbers: tuple[Any, ...]) -> None:
    """Have a buffer hold what ``numbers_of`` returned."""
    as_bytes, shape, *objects = numbers
    if isinstance(value, BytesIO | StringIO):
        if not value.closed:
            value.seek(0)
            value.truncate()
            value.write(as_bytes)
            value.seek(shape)
    elif isinstance(value, bytearray):
        value[:] = as_bytes
    elif isinstance(value, array):
        value[:] = array(value.typecode, as_bytes)
    elif isinstance(value, memoryview):
        value.cast("B")[:] = as_bytes
    elif value.dtype.hasobject:
        for place, item in enumerate(objects):
            value.flat[place] = item
    elif (before := sys.modules["numpy"].frombuffer(as_bytes, value.dtype)).size and value.dtype.names and not shape:
        for name in value.dtype.names:  # a record
            value[name] = before[0][name]
    else:
        if value.shape != shape:
            value.resize(shape, refcheck=False)
        value[...] = before.reshape(shape)
