"""Oracles that judge mfx. Nothing here imports mfx, reads a torch.fx graph, or shares a line with what it checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch.autograd.graph import Node

# --- identity residual adds, counted on the autograd graph of a real forward pass ------------------------------------


class Edge(NamedTuple):
    """One tensor of the forward pass: the node that made it and which of the node's outputs it is."""

    node: Node
    output_nr: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.node._input_metadata[self.output_nr].shape)


@dataclass(frozen=True)
class ResidualAdd:
    """An add of two equal-shaped tensors of which one, the skip, is an ancestor of the other, the branch."""

    add: Node
    skip: Edge
    branch: Edge

    @property
    def shape(self) -> tuple[int, ...]:
        return self.skip.shape


_RELAYOUT = "Alias|Clone|Permute|ReshapeAlias|Squeeze|T|ToCopy|Transpose|UnsafeView|Unsqueeze|View"
RELAYOUTS = frozenset(f"{name}Backward{overload}" for name in _RELAYOUT.split("|") for overload in range(5))
"""Operations that hand on their input's elements, perhaps in another layout or dtype."""


def residual_adds(output: torch.Tensor, *, through_relayouts: bool = True) -> list[ResidualAdd]:
    """The identity residual adds a forward pass went through, in forward order.

    Counts the AddBackward0 nodes (``x + f``, ``torch.add``, ``x += f``, whatever wrote them) that ``output`` depends
    on, with two tensor operands of equal shape, one of which was computed from the other.

    An n-ary sum ``x + a(x) + b(x)`` counts once, for ``x + a(x)``: neither term of the second add is computed from the
    other. ``x + x`` does not count. Operands that do not require a gradient are invisible; pass an input that does
    where the first block reads the input itself.

    Args:
        output: any tensor with a history.
        through_relayouts: let the skip be a view, transpose, copy or cast of the tensor the branch was computed from.
    """
    if output.grad_fn is None:
        raise ValueError("the output has no autograd history: run the model with gradients enabled")
    history = _History(output.grad_fn)
    found = []
    for add in history.nodes:
        edges = history.inputs[add]
        if add.name() != "AddBackward0" or len(edges) != 2 or edges[0].shape != edges[1].shape:
            continue
        for skip, branch in (edges, edges[::-1]):
            source = history.source(skip) if through_relayouts else skip
            end = history.source(branch) if through_relayouts else branch
            if history.computed_from(end, source):
                found.append(ResidualAdd(add, skip, branch))
                break
    return found


_TAIL = (
    "Celu|Clamp|ClampMin|Div|Elu|Gelu|Hardsigmoid|Hardswish|Hardtanh|LeakyRelu|Mish|Mul|NativeBatchNorm|"
    "NativeDropout|NativeGroupNorm|NativeLayerNorm|PreluKernel|Relu|Selu|Sigmoid|Silu|Softplus|Tanh"
)
TAILS = frozenset(f"{name}Backward{overload}" for name in _TAIL.split("|") for overload in range(3))
"""Activations, normalisations, dropout and constant factors: what may stand between a sum and the next block."""


def chained_adds(output: torch.Tensor) -> list[ResidualAdd]:
    """Those of the `residual_adds` that lie in a chain of two or more: that follow another one, or are followed by one.

    One follows another if its skip is the other's sum: itself, a relayout of it, or what activations, normalisations,
    dropout and constant factors make of it, as between the blocks of a ResNet or of a post-norm transformer. Whoever
    else reads these tensors does not matter. A sum that is the skip of several others is followed by the one with which
    the chain goes on the longest; the others begin anew.
    """
    adds = {add.add: add for add in residual_adds(output)}
    assert output.grad_fn is not None
    history = _History(output.grad_fn)
    before = {node: history.before_tails(add.skip) for node, add in adds.items()}
    length, following = dict.fromkeys(adds, 1), {}
    for node in reversed(adds):  # the last ones first
        skip = before[node]
        if skip in adds and length[skip] <= length[node]:
            length[skip], following[skip] = length[node] + 1, node
    found = {*following, *following.values()}
    return [add for node, add in adds.items() if node in found]


class _History:
    """The nodes behind one tensor in forward order, and each one's depth: the longest path from it to a leaf."""

    def __init__(self, root: Node) -> None:
        self.inputs: dict[Node, tuple[Edge, ...]] = {}
        self.depth: dict[Node, int] = {}
        stack = [root]
        while stack:  # depth first, by hand: deep networks are deeper than Python's stack
            node = stack[-1]
            if node in self.depth:
                stack.pop()
                continue
            if node not in self.inputs:
                self.inputs[node] = tuple(Edge(n, i) for n, i in node.next_functions if n is not None)
            waiting = [e.node for e in self.inputs[node] if e.node not in self.depth]
            stack.extend(waiting)
            if not waiting:
                self.depth[node] = 1 + max((self.depth[e.node] for e in self.inputs[node]), default=0)
                stack.pop()
        self.nodes = sorted(self.depth, key=self.depth.__getitem__)

    def source(self, edge: Edge) -> Edge:
        """The tensor that ``edge`` is a relayout of."""
        while edge.node.name() in RELAYOUTS and len(self.inputs[edge.node]) == 1:
            (edge,) = self.inputs[edge.node]
        return edge

    def before_tails(self, edge: Edge) -> Node:
        """Return what made the tensor ``edge``, but for relayouts, activations, normalisations, dropout and factors."""
        while (node := self.source(edge).node).name() in TAILS:
            inputs = [e for e in self.inputs[node] if e.node.name() != "torch::autograd::AccumulateGrad"]
            if len(inputs) != 1:
                break
            (edge,) = inputs
        return node

    def computed_from(self, end: Edge, start: Edge) -> bool:
        """True if ``end`` was computed from ``start``.

        Looks only at nodes deeper than ``start``: no other can lie between the two.
        """
        floor = self.depth[start.node]
        seen = {end.node}
        stack = [end.node] if self.depth[end.node] > floor else []
        while stack:
            for edge in self.inputs[stack.pop()]:
                if edge == start:
                    return True
                if edge.node not in seen and self.depth[edge.node] > floor:
                    seen.add(edge.node)
                    stack.append(edge.node)
        return False


# --- the momentum recurrence, written as in the paper, by ordinary backprop -------------------------------------------

Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


class Momentum(NamedTuple):
    """The states a momentum chain went through."""

    taps: list[torch.Tensor]  # x[0] ... x[T]
    velocities: list[torch.Tensor]  # v[0] ... v[T]

    @property
    def output(self) -> torch.Tensor:
        return self.taps[-1]


def momentum_reference(
    functions: Sequence[Function],
    x: torch.Tensor,
    gamma: float,
    kind: Literal["residual", "map"] = "residual",
    velocity: Literal["zero", "residual"] | torch.Tensor | Function = "zero",
) -> Momentum:
    """v[t+1] = γ v[t] + (1 − γ) f_t(x[t]);  x[t+1] = x[t] + v[t+1].  Everything in float64.

    Args:
        functions: one per step: f_t itself (``"residual"``) or a map h_t with f_t(x) = h_t(x) − x (``"map"``).
        x: x[0].
        gamma: γ in [0, 1).
        kind: what ``functions`` are.
        velocity: v[0]: ``"zero"``, ``"residual"`` (v[0] = v[1] = f_0(x[0]), evaluated once), a tensor, or a function
            of x[0].
    """
    v = _initial_velocity(velocity, x)
    taps, velocities = [x], [x if v is None else v]
    for function in functions:
        f = function(x) if kind == "residual" else function(x) - x
        if v is None:
            v = velocities[0] = f
        else:
            v = gamma * v + (1 - gamma) * f
        x = x + v
        if {x.dtype, v.dtype, f.dtype} != {torch.float64}:
            raise TypeError(f"the reference works in float64, not {x.dtype}, {v.dtype}, {f.dtype}")
        taps.append(x)
        velocities.append(v)
    return Momentum(taps, velocities)


def _initial_velocity(velocity: str | torch.Tensor | Function, x: torch.Tensor) -> torch.Tensor | None:
    if isinstance(velocity, torch.Tensor):
        return velocity
    if callable(velocity):
        return velocity(x)
    return {"zero": torch.zeros_like(x), "residual": None}[velocity]


# --- gradients, parameter by parameter -------------------------------------------------------------------------------

Grads: TypeAlias = Mapping[str, torch.Tensor | None]


def grads(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Copies of the gradients of a module's parameters by name; None where there is none."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def assert_close_grads(actual: Grads, expected: Grads, rel: float, *, noise: float = 0.0) -> float:
    """Asserts ||actual − expected|| ≤ rel · ||expected|| for every parameter, and the same names with the same Nones.

    A gradient that is zero but for rounding (a bias in front of a BatchNorm) has no relative error worth the name:
    ``noise`` is the norm, as a fraction of the largest gradient's, below which errors are taken relative to that
    fraction instead. Choose it from the dtype's eps; the default excuses nothing.

    Returns:
        The largest relative error.
    """
    assert actual.keys() == expected.keys(), f"different parameters: {sorted(actual.keys() ^ expected.keys())}"
    norms = {name: _norm(grad) for name, grad in expected.items() if grad is not None}
    assert norms, "there is no gradient to compare with"
    floor = noise * max(norms.values())
    errors, complaints = {}, []
    for name, b in expected.items():
        a = actual[name]
        if a is None or b is None:
            if a is not b:
                complaints.append(
                    f"{name}: {'no gradient, expected one' if a is None else 'a gradient, expected none'}"
                )
        elif a.shape != b.shape:
            complaints.append(f"{name}: shape {tuple(a.shape)} instead of {tuple(b.shape)}")
        else:
            error, scale = _norm(a.double() - b.double()), max(norms[name], floor)
            errors[name] = error / scale if scale else (0.0 if error == 0 else float("inf"))
            if not errors[name] <= rel:  # also catches nan
                complaints.append(f"{name}: relative error {errors[name]:.2e} > {rel:.0e} (norm {norms[name]:.2e})")
    assert not complaints, f"{len(complaints)} of {len(expected)} gradients differ:\n  " + "\n  ".join(complaints)
    return max(errors.values())


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())
