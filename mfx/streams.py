"""Shapes and dtypes of the states of a net's chains, without computing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mfx.arguments import bind
from mfx.entry import Entry, with_refused
from mfx.momentum import Stream
from mfx.net import RewrittenForward
from mfx.probe import find_with_shapes
from mfx_passes import Findings, MfxError

__all__ = ["streams_of"]


def streams_of(
    forward: RewrittenForward, entry: Entry, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Stream]:
    """Shape and dtype of each chain's state for these inputs, by chain name; empty where they cannot be had."""
    if entry.captured.frame is not None:  # captured with shapes
        return _at_start(entry.findings(forward.net, forward.options))
    try:
        arguments = bind(forward.net, forward.__signature__, args, kwargs)
    except MfxError:
        return {}
    found = find_with_shapes(forward.net, entry.captured, with_refused(forward.options, entry.refused), arguments)
    return {} if found is None else _at_start(found)


def _at_start(findings: Findings) -> dict[str, Stream]:
    starts = {chain.name: chain.start.meta.get("val") for chain in findings.chains}
    return {name: (tuple(value.shape), value.dtype) for name, value in starts.items() if isinstance(value, Tensor)}
