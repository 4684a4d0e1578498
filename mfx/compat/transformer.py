"""torch.nn.Transformer layers without their fused inference path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def plain_transformer_layers() -> Iterator[None]:
    """Have ``nn.TransformerEncoderLayer`` take the path of training, without its fused shortcut for inference.

    The shortcut decides by looking at shapes, which a symbolic trace does not have (torch 2.11 to 2.15).
    """
    from torch.nn.modules import transformer

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The length serves only to guess if a mask is causal: a hint that changes no value.
        with (
            patch.object(transformer, "_get_seq_len", _no_length),
            patch.object(transformer, "_detect_is_causal_mask", _is_marked_causal),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _no_length(src: Tensor, batch_first: bool) -> None:
    return None


def _is_marked_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True
