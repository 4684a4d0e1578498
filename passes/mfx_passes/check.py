"""Side conditions of a step, one function each: None, or why it must stay as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from mfx_passes.index import GraphIndex
from mfx_passes.ir import Step
from mfx_passes.normalize import Mutation

Check = Callable[[Step, GraphIndex, Sequence[Mutation]], str | None]


def inputs_of(step: Step) -> list[Node]:
    """What a step reads from outside: its state first, then its captures (parameters and buffers are no captures)."""
    reads = dict.fromkeys(source for node in step.nodes for source in node.all_input_nodes)
    outside = [node for node in reads if node not in step.nodes and node is not step.skip and node.op != "get_attr"]
    return [step.skip, *outside]


def changes_outside_value(step: Step, index: GraphIndex, mutations: Sequence[Mutation]) -> str | None:
    """A branch that writes into its input or a capture would write again when it is re-run."""
    outside = set(inputs_of(step))
    for mutation in mutations:
        if mutation.node in step.nodes - step.add.sums and mutation.family & outside:
            return f"{mutation.node.name} changes in place a value that the branch is given from outside"
    return None


def changed_later(step: Step, index: GraphIndex, mutations: Sequence[Mutation]) -> str | None:
    """A value the branch reads must be the same when the branch is re-run, after the whole forward pass."""
    outside = set(inputs_of(step))
    start = index.position[step.skip]
    for mutation in mutations:
        inside = mutation.node in step.nodes or mutation.node in step.add.sums
        if not inside and mutation.family & outside and index.position[mutation.node] > start:
            return f"{mutation.node.name} changes in place a value that the branch reads"
    return None


def tangled(step: Step, index: GraphIndex, mutations: Sequence[Mutation]) -> str | None:
    """A state changed in place by the sum, or after it, must not be read through another view afterwards."""
    for mutation in mutations:
        in_sum = mutation.node in step.add.sums
        after = step.out in mutation.family and mutation.node not in step.nodes
        if (in_sum or after) and any(index.is_read_after(alias, mutation.node) for alias in mutation.family):
            return f"{mutation.node.name} changes the stream in place and a view of it is read afterwards"
    return None


def changes_shape(step: Step, index: GraphIndex, mutations: Sequence[Mutation]) -> str | None:
    """With shapes at hand: the state must keep its shape, dtype and device."""
    before, after = _facts(step.skip), _facts(step.out)
    if before is None or after is None:
        return None
    if not before[1].is_floating_point:
        return f"the stream is {before[1]}, not floating point"
    if before != after:
        return f"the step changes the stream from {_describe(before)} to {_describe(after)}"
    branch = _broadcast_shape(step.add.branch)
    if step.kind == "residual" and branch is not None and branch != before[0]:
        return f"the branch {branch} is broadcast over the stream {before[0]}"
    return None


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
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')} on {device}"


CHECKS: tuple[Check, ...] = (changes_outside_value, changed_later, tangled, changes_shape)


def refusal(step: Step, index: GraphIndex, mutations: Sequence[Mutation]) -> str | None:
    """The first reason to refuse a step, or None."""
    return next((reason for check in CHECKS if (reason := check(step, index, mutations))), None)
