"""Copies of tensors that share memory as their originals do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from mfx.modules.buffers import storage_of


def copies_of(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return a copy of each tensor, without history; where one is a view of another, so are the copies.

    Args:
        tensors: the tensors, by what the copies are returned by.
    """
    storages = {key: storage_of(tensor) for key, tensor in tensors.items()}
    uses = Counter(storage for storage in storages.values() if storage)
    copied: dict[int, torch.UntypedStorage] = {}
    found: dict[int, Tensor] = {}
    for key, tensor in tensors.items():
        storage = storages[key]
        if uses[storage] < 2:
            found[key] = tensor.detach().clone()
        else:
            if storage not in copied:
                copied[storage] = tensor.untyped_storage().clone()
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            found[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(copied[storage], *place)
        if tensor.__dict__:
            found[key].__dict__.update(tensor.__dict__)
    return found
