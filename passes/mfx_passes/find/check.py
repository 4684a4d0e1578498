"""The side conditions of an update, one function each: None, or the refusal with its facts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutation, Mutations
from mfx_passes.ir import Chain, Grounds, Refusal, Update
from mfx_passes.ops import gradients, sums

Check = Callable[[Update, GraphIndex, Mutations], Grounds | None]


def changes_input(update: Update, index: GraphIndex, mutations: Mutations) -> Grounds | None:
    """Refuse a branch that writes into its input or a capture: recomputation would write again.

    Without recomputation it may write into what nothing else reads, as into its own part of a cache.
    """
    outside = {update.skip, *(node for node in update.reads if node.op != "get_attr")}
    for mutation in mutations.at(index.sorted(update.nodes - update.add.sums)):
        if mutation.family & outside and not (mutations.forward_only and _is_read_by(update, mutation)):
            return Refusal.CHANGES_INPUT, {"node": mutation.node.name}
    return None


def _is_read_by(update: Update, mutation: Mutation) -> bool:
    """True if this step alone reads the memory that is changed in it; the graph may return it."""
    readers = {user for node in {*mutation.family, mutation.node} for user in node.users if user.op != "output"}
    return update.skip not in mutation.family and readers <= update.nodes


def changed_later(
    update: Update, index: GraphIndex, mutations: Mutations, sums: Collection[Node] | None = None
) -> Grounds | None:
    """Refuse a branch that reads a value that is changed later: recomputation comes after the whole forward pass.

    Residual sums are no changes, for a rewritten one is out of place.

    Args:
        update: the update.
        index: the graph.
        mutations: the in-place operations.
        sums: the sums that are rewritten; None: all residual sums, as if they were.
    """
    sums = mutations.sums if sums is None else sums
    start = index.position[update.skip]
    for mutation in mutations.touching([update.skip, *update.reads]):
        inside = mutation.node in update.nodes or mutation.node in sums
        if mutation.is_unseen and not inside:
            own = mutations.at(update.nodes)  # a recomputation finds what a step changes itself as it was
            if not any(change.family & mutation.family for change in own):
                return Refusal.CHANGED_LATER, {"node": mutation.node.name}
        elif not inside and index.position[mutation.node] > start:
            return Refusal.CHANGED_LATER, {"node": mutation.node.name}
    return None


def moved_past(chain: Chain, index: GraphIndex, mutations: Mutations) -> Iterator[tuple[Update, Grounds]]:
    """Yield the updates at which to cut a chain that would be moved past a change of what it reads, and why.

    A chain runs as a whole where its first step begins: what lies between its steps and is in none of them runs before
    or behind it.
    """
    inside, updates = chain.nodes, list(chain.updates)
    first, last = index.position[min(inside)], index.position[max(inside)]
    for update in updates:
        for mutation in mutations.touching(update.reads):
            at = index.position[mutation.node]
            if mutation.node not in inside and first < at < last:
                begun = [other for other in updates if index.position[other.skip] < at]
                yield begun[-1] if begun else update, (Refusal.CHANGED_LATER, {"node": mutation.node.name})
        for mutation in mutations.at(index.sorted(update.nodes - update.add.sums)):
            readers = {user for alias in mutation.family for user in alias.users} - index.sizes
            if any(first < index.position[reader] < last for reader in readers - inside):
                yield update, (Refusal.CHANGED_LATER, {"node": mutation.node.name})


def changes_state(update: Update, index: GraphIndex, mutations: Mutations) -> Grounds | None:
    """Refuse a state that is changed in place, by the sum or after it, and read through another view afterwards."""
    after = [mutation for mutation in mutations.touching([update.out]) if mutation.node not in update.nodes]
    for mutation in [*mutations.at(index.sorted(update.add.sums)), *after]:
        if any(alias.op in ("placeholder", "get_attr") for alias in mutation.family):
            return Refusal.LIVES_OUTSIDE, {"node": mutation.node.name}
        if any(index.is_read_after(alias, mutation.node) for alias in mutation.family):
            return Refusal.VIEW_READ, {"node": mutation.node.name}
    return None


def narrows(update: Update, index: GraphIndex, mutations: Mutations) -> Grounds | None:
    """Refuse an in-place sum that keeps the dtype of its operand where x + f(x) would not."""
    for node in index.sorted(update.add.sums):
        if sums.out_of_place(node) == node.target:
            continue
        dtypes = {dtype for term in sums.terms(node) or () for factor in term.factors if (dtype := _dtype(factor))}
        kept, promoted = _dtype(node), reduce(torch.promote_types, dtypes) if dtypes else None
        if kept and promoted and kept != promoted:
            return Refusal.NARROWS, {"kept": _short(kept), "promoted": _short(promoted)}
    return None


def _dtype(node: Node) -> torch.dtype | None:
    value: Any = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) and value.dim() else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def changes_shape(update: Update, index: GraphIndex, mutations: Mutations) -> Grounds | None:
    """Refuse a step that does not keep shape, dtype and device of the state; only if shapes are known."""
    before, after = _facts(update.skip), _facts(update.out)
    if before is None or after is None:
        return None
    dtype = before[1]
    if not dtype.is_floating_point or dtype.itemsize < 2:  # torch does not add floats of 8 bits
        return Refusal.NOT_FLOATING, {
            "dtype": _short(dtype),
            "enough": " of 16 bits" if dtype.is_floating_point else "",
        }
    if before != after:
        return Refusal.CHANGES_SHAPE, {"before": _describe(before), "after": _describe(after)}
    branch = _broadcast_shape(update.add.branch)
    if update.kind == "residual" and branch is not None and branch != before[0]:
        return Refusal.BROADCAST, {"branch": str(branch), "stream": str(before[0])}
    return None


def differentiates_outside(update: Update, index: GraphIndex, mutations: Mutations) -> Grounds | None:
    """Refuse a branch that differentiates through what lies outside of it, which its recomputation does not have."""
    node = gradients.through_others(update.nodes, index.modules)
    return None if node is None else (Refusal.DIFFERENTIATES, {"node": node.name})


def _broadcast_shape(nodes: Sequence[Node]) -> tuple[int, ...] | None:
    values = [node.meta.get("val") for node in nodes]
    shapes = [tuple(value.shape) for value in values if isinstance(value, torch.Tensor)]
    return tuple(torch.broadcast_shapes(*shapes)) if len(shapes) == len(nodes) else None


def _facts(node: Node) -> tuple[tuple[int, ...], torch.dtype, torch.device] | None:
    value: Any = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(value.shape), value.dtype, value.device


def _describe(facts: tuple[tuple[int, ...], torch.dtype, torch.device]) -> str:
    shape, dtype, device = facts
    return f"{tuple(shape)} {_short(dtype)} on {device}"


CHECKS: tuple[Check, ...] = (
    changes_input,
    changed_later,
    changes_state,
    changes_shape,
    narrows,
    differentiates_outside,
)


def refused(update: Update, index: GraphIndex, mutations: Mutations) -> Grounds | None:
    """Return the first refusal of an update, or None."""
    return next((grounds for check in CHECKS if (grounds := check(update, index, mutations))), None)
