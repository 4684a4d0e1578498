"""The boxes of a drawing and the edges between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx, nn
from torch.fx import Node

from mfx.engine import Stream
from mfx.program.chain_call import Momentum
from mfx.reports.drawing.formula import classes, formula, is_parameter, op_name, shown_path
from mfx.reports.drawing.groups import Group, contract
from mfx.reports.drawing.repeats import repeats
from mfx_passes import StepGraphs
from mfx_passes.ir import enclosing_path
from mfx_passes.paths import ancestors, relative

_OPS = 4  # operations that a box names


@dataclass(frozen=True)
class ValueBox:
    """An input or the output of the model."""

    name: str


@dataclass(frozen=True)
class ModuleBox:
    """A part of the model that is not in a chain.

    Args:
        name: path of the module, or names of the operations.
        kind: class of the module, if it is one.
        tooltip: path and operations in full.
    """

    name: str
    kind: str
    tooltip: str


@dataclass(frozen=True)
class StepLine:
    """A step of a chain.

    Args:
        texts: its formulas, one for each stream that it moves on.
        tooltip: the classes of the modules that the formula names.
        inner: the chains inside its branch.
    """

    texts: tuple[str, ...]
    tooltip: str
    inner: tuple[ChainBox, ...] = ()


@dataclass(frozen=True)
class Fold:
    """Consecutive steps that look the same.

    Args:
        count: how many times the rows are repeated.
        rows: the steps of one period.
        place: module paths of the first and the last step.
    """

    count: int
    rows: tuple[StepLine, ...]
    place: str


@dataclass(frozen=True)
class ChainBox:
    """A momentum call with its steps folded."""

    name: str
    facts: str
    folds: tuple[Fold, ...]


Box: TypeAlias = ValueBox | ModuleBox | ChainBox


@dataclass(frozen=True)
class Picture:
    """Boxes from top to bottom, and edges between them.

    Args:
        title: names the graph.
        boxes: the boxes, in the order in which they are drawn.
        edges: numbers of two boxes, the upper one first.
    """

    title: str
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Model:
    """The model that a graph is of.

    Args:
        modules: its modules, by path.
        streams: shape and dtype of the chains' states, where they are known, by the chains' names.
        within: path of the submodule of a net that the graph is of; steps are named as in the net, nodes as in the
            submodule.
    """

    modules: Mapping[str, nn.Module]
    streams: Mapping[str, tuple[Stream, ...]]
    within: str = ""

    def inner(self, path: str) -> str:
        """Return a path in the net as one in the submodule."""
        return relative(path, self.within)


def picture_of(title: str, graph: fx.Graph, model: Model) -> Picture:
    """Return the picture of a graph.

    Args:
        title: names the graph.
        graph: a rewritten graph.
        model: the model that the graph is of.
    """
    inside = _paths_around_steps(graph, model)
    groups = contract(graph, lambda node: _key(node, inside, model.modules), hide=is_parameter)
    groups = [group for group in groups if group.inputs or not _is_unused(group, groups)]
    numbers = {group: number for number, group in enumerate(groups)}
    edges = sorted((numbers[source], numbers[group]) for group in groups for source in group.inputs)
    return Picture(title, tuple(_box(group, model) for group in groups), tuple(edges))


def _is_unused(group: Group, groups: Sequence[Group]) -> bool:
    """True for an input that is never read (TorchDynamo has some), and for an output of nothing."""
    return group.first.op in ("placeholder", "output") and not any(group in other.inputs for other in groups)


def _paths_around_steps(graph: fx.Graph, model: Model) -> set[str]:
    """Return the paths of all modules that a step of a chain is in."""
    paths = {""}
    for call in _calls(graph.nodes, model.modules):
        for path in (call.chain.split("#")[0], *(step.path for step in call.graphs.steps)):
            paths.update(ancestors(model.inner(path)))
    return paths


def _calls(nodes: Iterable[Node], modules: Mapping[str, nn.Module]) -> list[Momentum]:
    found = [modules.get(str(node.target)) for node in nodes if node.op == "call_module"]
    return [module for module in found if isinstance(module, Momentum)]


def _key(node: Node, inside: set[str], modules: Mapping[str, nn.Module]) -> str | None:
    """Return a key for the outermost module around a node that has no step in it, else for the module around it."""
    if node.op in ("placeholder", "output") or isinstance(modules.get(str(node.target)), Momentum):
        return None
    path = enclosing_path(node)
    own = next((prefix for prefix in ancestors(path) if prefix not in inside), None)
    return f"in {path}" if own is None else f"module {own}"


def _box(group: Group, model: Model) -> Box:
    modules = model.modules
    node = group.first
    if node.op in ("placeholder", "output"):
        return ValueBox("output" if node.op == "output" else _input_name(node))
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, Momentum):
        return _chain_box(module, model)
    names = [op_name(node, modules) for node in group.nodes]
    kind, _, path = (group.key or "").partition(" ")
    if kind == "module":
        inner = f"{path}: {', '.join(names)}"
        return ModuleBox(shown_path(path), type(modules[path]).__name__ if path in modules else "", inner)
    shown = list(dict.fromkeys(names))
    text = " · ".join(shown[:_OPS]) + (f" and {len(shown) - _OPS} more" if len(shown) > _OPS else "")
    return ModuleBox(text, "", f"{path or 'the model itself'}: {', '.join(names)}")


def _input_name(node: Node) -> str:
    """Return the name of an input without what TorchDynamo adds to it.

    >>> from torch.fx import Graph
    >>> _input_name(Graph().placeholder("L_kwargs_input_ids_"))
    'input_ids'
    """
    found = re.fullmatch(r"[lL]_(?:kwargs_)?(.+?)_", str(node.target))
    return found[1] if found else str(node.target)


def _chain_box(call: Momentum, model: Model) -> ChainBox:
    steps = call.graphs.steps
    rows = [_row(step, model, call.graphs.streams) for step in steps]
    alike = [re.sub(r"\[\d+\]", "[i]", repr(row)) for row in rows]
    folds = []
    for start, period, count in repeats(alike):
        last = start + period * count
        merged = tuple(_merged(rows[offset:last:period]) for offset in range(start, start + period))
        folds.append(Fold(count, merged, _place(steps[start:last])))
    facts = [f"{len(steps)} step{'s' * (len(steps) != 1)}", f"γ = {call.gamma:g}"]
    facts.append(f"{call.settings.arithmetic.name} arithmetic" if not call.gamma.is_zero else "the original function")
    if call.settings.velocity != "zero":
        facts.append(f"v₀: {call.settings.velocity}")
    streams = model.streams.get(call.chain, call.streams)
    if streams:
        shapes = [f"{'×'.join(map(str, s.shape))} {str(s.dtype).removeprefix('torch.')}" for s in streams]
        facts.append(f"state {' + '.join(shapes)}")
    return ChainBox(shown_path(call.chain) or "chain", " · ".join(facts), tuple(folds))


def _row(step: StepGraphs, model: Model, streams: Sequence[str]) -> StepLine:
    path, inner = model.inner(step.path), _calls(step.branch.nodes, model.modules)
    return StepLine(
        formula(step, path, model.modules, streams),
        classes(step, path, model.modules),
        tuple(_chain_box(call, model) for call in inner),
    )


def _merged(rows: Sequence[StepLine]) -> StepLine:
    """Merge rows that differ in indices only."""
    inner = tuple(_merged_chains(boxes) for boxes in zip(*(row.inner for row in rows), strict=True))
    texts = tuple(map(_merged_text, zip(*(row.texts for row in rows), strict=True)))
    return StepLine(texts, rows[0].tooltip, inner)


def _merged_chains(boxes: Sequence[ChainBox]) -> ChainBox:
    folds = tuple(
        Fold(
            alike[0].count,
            tuple(map(_merged, zip(*(fold.rows for fold in alike), strict=True))),
            _merged_text([fold.place for fold in alike]),
        )
        for alike in zip(*(box.folds for box in boxes), strict=True)
    )
    return ChainBox(_merged_text([box.name for box in boxes]), boxes[0].facts, folds)


def _merged_text(texts: Sequence[str]) -> str:
    """Merge texts that differ in indices only: these become ``[i]``.

    >>> _merged_text(["blocks[0].fc[1]", "blocks[7].fc[1]"])
    'blocks[i].fc[1]'
    """
    pieces = zip(*(re.split(r"(\[\d+\])", text) for text in texts), strict=True)
    return "".join(same[0] if len(set(same)) == 1 else "[i]" for same in pieces)


def _place(steps: Sequence[StepGraphs]) -> str:
    first, last = shown_path(steps[0].path), shown_path(steps[-1].path)
    return first if first == last else f"{first} … {last}"
