"""Copies of tensors that share memory as their originals do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from mfx.modules.buffers import storage_of, storages_of


def copies_of(tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return a copy of each tensor, without history; where one is a view of another, so are the copies.

    Args:
        tensors: the tensors, by what the copies are returned by.
    """
    storages = storages_of(tensors.values())
    uses = Counter(map(id, storages))
    copied: dict[int, torch.UntypedStorage] = {}
    found: dict[int, Tensor] = {}
    for (key, tensor), storage in zip(tensors.items(), storages, strict=True):
        if uses[id(storage)] == 1 or not storage_of(tensor):
            copy = tensor.clone()
            found[key] = copy.detach() if copy.requires_grad else copy
        else:
            if id(storage) not in copied:
                copied[id(storage)] = storage.clone()
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            found[key] = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(copied[id(storage)], *place)
        if tensor.__dict__:
            found[key].__dict__.update(tensor.__dict__)
    return found
