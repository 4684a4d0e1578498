"""Facts about single nodes: tags of momentum calls, of blocks and of sizes, module paths, source lines."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch.fx import Node

_MARK, _BLOCK, _SIZE = "momentum_chain", "residual_block", "size"


def tag_momentum_call(node: Node, chain: str) -> None:
    """Tag a node that runs a chain; the tag stays with the node through passes of other libraries."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _MARK: chain}


def momentum_chain(node: Node) -> str | None:
    """Return the name of the chain that a node runs, None if it is not a momentum call."""
    return (node.meta.get("custom") or {}).get(_MARK) if node.op == "call_module" else None


def is_momentum_call(node: Node) -> bool:
    """True if a node runs a chain that was rewritten before."""
    return momentum_chain(node) is not None


def tag_block(node: Node, path: str | None) -> None:
    """Tag a node as one of a block in no chain, with the path of the block's module; None takes the tag away."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _BLOCK: path}


def block_of(node: Node) -> str | None:
    """Return the path of the module of the block that a node is tagged with, None if there is no tag."""
    return (node.meta.get("custom") or {}).get(_BLOCK)


def tag_size(node: Node, terms: Mapping[str | None, int]) -> None:
    """Tag a node as the sum of multiples of 1, for which None stands, and of sizes, none of which is negative."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), _SIZE: dict(terms)}


def known_size(node: Node) -> Mapping[str | None, int] | None:
    """Return the sum that a node is tagged as, None if there is no tag."""
    return (node.meta.get("custom") or {}).get(_SIZE)


_INDEX = re.compile(r"@\d+$")


def enclosing_path(node: Node) -> str:
    """Return the path of the innermost module whose forward made the node; a called module counts as its own."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return str(node.target) if node.op in ("call_module", "get_attr") else ""
    return _INDEX.sub("", str(next(reversed(stack.values()))[0]))


def source_line(node: Node) -> str:
    """Return ``file:line`` of the innermost recorded frame, ``""`` if none was recorded."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return ":".join(frames[-1]) if frames else ""
