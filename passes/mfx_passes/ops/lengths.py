"""Lengths along dimensions, as sums of sizes and numbers."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Hashable
from typing import Any

from torch.fx import Node

from mfx_passes.ir.nodes import known_size

Length = frozenset[tuple[Hashable, int]]
"""Multiples of sizes, as text or as a tensor and a dimension, of other nodes, and of 1, for which None stands."""

ZERO: Length = frozenset()


def length(value: Any) -> Length | None:
    """Return a number or a node as a length, None if it is neither.

    >>> length(3) == plus(length(5), length(-2))
    True
    """
    counted = _counted(value)
    return None if counted is None else _length(counted)


def plus(one: Length, other: Length, times: int = 1) -> Length:
    """Return ``one + times * other``."""
    total = Counter(dict(one))
    for term, factor in other:
        total[term] += times * factor
    return _length(total)


def is_ordered(one: Length, other: Length) -> bool:
    """True if one index is known to be at most another one: none counts from the end, or both do by a number."""
    return is_positive(plus(other, one, -1)) and (
        is_positive(one) or (_is_number(one) and _is_number(other) and _ends(other))
    )


def is_positive(value: Length) -> bool:
    """True if a length is known not to be negative."""
    return all(
        factor >= 0 and (term is None or isinstance(term, tuple | str) or _is_product(term)) for term, factor in value
    )


def _is_product(term: Hashable) -> bool:
    """True if a node is the product of some sizes of tensors."""
    if isinstance(term, Node) and term.op == "call_function" and term.target is operator.mul:
        lengths = [length(factor) for factor in term.args]
        return all(value is not None and is_positive(value) for value in lengths)
    sizes = term.args[0] if isinstance(term, Node) and term.target is math.prod else None
    while isinstance(sizes, Node) and sizes.target is operator.getitem and isinstance(sizes.args[1], slice):
        sizes = sizes.args[0]
    return isinstance(sizes, Node) and sizes.target is getattr and "shape" in sizes.args


def _ends(value: Length) -> bool:
    return any(factor < 0 for _, factor in value)


def _is_number(value: Length) -> bool:
    return all(term is None for term, _ in value)


def _length(counted: Counter[Hashable]) -> Length:
    return frozenset((term, factor) for term, factor in counted.items() if factor)


def _counted(value: Any) -> Counter[Hashable] | None:
    if type(value) is int:
        return Counter({None: value})
    if not isinstance(value, Node):
        return None
    if (known := known_size(value)) is not None:
        return Counter(known)
    if value.op == "call_function" and value.target in _SIGNS:
        terms = [length(arg) for arg in value.args]
        if len(terms) == 2 and terms[0] is not None and terms[1] is not None:
            return Counter(dict(plus(terms[0], terms[1], _SIGNS[value.target])))
    return Counter({_size(value) or value: 1})


_SIGNS: dict[Any, int] = {operator.add: 1, operator.sub: -1}


def _size(node: Node) -> tuple[Node, int] | None:
    """Return tensor and dimension of a size, None if the node is not one."""
    if node.target is operator.getitem and isinstance(of := node.args[0], Node) and type(node.args[1]) is int:
        is_shape = of.target is getattr and of.args[1] == "shape"
        if (is_shape or (of.target == "size" and len(of.args) == 1)) and isinstance(of.args[0], Node):
            return of.args[0], node.args[1]
    if node.op == "call_method" and node.target == "size" and len(node.args) == 2:
        tensor, dim = node.args
        return (tensor, dim) if isinstance(tensor, Node) and type(dim) is int else None
    return None
