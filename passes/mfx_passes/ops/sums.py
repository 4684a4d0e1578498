"""Sums in one spelling: a list of signed, scaled terms, however the model writes it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mfx_passes.ops import step_markers


@dataclass(frozen=True)
class Term:
    """A term of a sum: ``scale`` times the product of ``factors``."""

    factors: tuple[Node, ...]
    scale: float = 1

    @property
    def node(self) -> Node | None:
        """The node, if the term is a node alone."""
        return self.factors[0] if len(self.factors) == 1 and self.scale == 1 else None


def terms(node: Node) -> tuple[Term, ...] | None:
    """Return the two or more terms that a node adds up; None if it is not a sum of nodes."""
    if "out" in node.kwargs:
        return None
    spelling = _SPELLINGS.get((node.op, node.target))
    return spelling(node) if spelling else None


def _two_terms(sign: int) -> Callable[[Node], tuple[Term, ...] | None]:
    def spelling(node: Node) -> tuple[Term, ...] | None:
        first, second = _argument(node, 0, "input"), _argument(node, 1, "other")
        alpha = node.kwargs.get("alpha", 1)
        if not (isinstance(first, Node) and isinstance(second, Node) and isinstance(alpha, int | float)):
            return None
        return Term((first,)), Term((second,), sign * alpha)

    return spelling


def _addcmul(node: Node) -> tuple[Term, ...] | None:
    first, a, b = (_argument(node, i, name) for i, name in enumerate(("input", "tensor1", "tensor2")))
    value = node.kwargs.get("value", 1)
    if not (isinstance(first, Node) and isinstance(a, Node) and isinstance(b, Node) and isinstance(value, int | float)):
        return None
    return Term((first,)), Term((a, b), value)


def _lerp(node: Node) -> tuple[Term, ...] | None:
    first, last, weight = (_argument(node, i, name) for i, name in enumerate(("input", "end", "weight")))
    if not (isinstance(first, Node) and isinstance(last, Node)):
        return None
    if isinstance(weight, Node):
        return Term((first, weight)), Term((last, weight))  # of 1 - weight, which does not matter here
    return (Term((first,), 1 - weight), Term((last,), weight)) if isinstance(weight, int | float) else None


def is_product(node: Node) -> bool:
    """True if a node is a product, a quotient or a negative."""
    return node.op in ("call_function", "call_method") and node.target in _PRODUCTS


def factors(node: Node) -> list[Node]:
    """Return the nodes whose product a node is, itself if it is none; divisors are left out."""
    if not is_product(node):
        return [node]
    count = 2 if node.target in _MULTIPLIES else 1
    return [factor for arg in node.args[:count] if isinstance(arg, Node) for factor in factors(arg)]


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


_MULTIPLIES = frozenset({operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__"})
_PRODUCTS = _MULTIPLIES | {operator.truediv, torch.div, torch.divide, "div", operator.neg, torch.neg, "neg"}

_ADD, _SUB = _two_terms(1), _two_terms(-1)
_SPELLINGS: dict[tuple[str, Any], Callable[[Node], tuple[Term, ...] | None]] = {
    ("call_function", operator.add): _ADD,
    ("call_function", operator.iadd): _ADD,
    ("call_function", torch.add): _ADD,
    ("call_method", "add"): _ADD,
    ("call_method", "add_"): _ADD,
    ("call_method", "__add__"): _ADD,
    ("call_method", "__iadd__"): _ADD,
    ("call_function", operator.sub): _SUB,
    ("call_function", operator.isub): _SUB,
    ("call_function", torch.sub): _SUB,
    ("call_function", torch.subtract): _SUB,
    ("call_method", "sub"): _SUB,
    ("call_method", "sub_"): _SUB,
    ("call_function", torch.addcmul): _addcmul,
    ("call_method", "addcmul"): _addcmul,
    ("call_method", "addcmul_"): _addcmul,
    ("call_function", torch.lerp): _lerp,
    ("call_method", "lerp"): _lerp,
    ("call_function", step_markers.added): _ADD,
    ("call_function", step_markers.mapped): _ADD,
}

_OUT_OF_PLACE: dict[tuple[str, Any], Any] = {
    ("call_function", operator.iadd): operator.add,
    ("call_function", operator.isub): operator.sub,
    ("call_method", "add_"): "add",
    ("call_method", "__iadd__"): "add",
    ("call_method", "sub_"): "sub",
    ("call_method", "addcmul_"): "addcmul",
}


def out_of_place(node: Node) -> Any:
    """Return the target of the same sum out of place: ``operator.add`` for ``operator.iadd`` and so on."""
    return _OUT_OF_PLACE.get((node.op, node.target), node.target)
