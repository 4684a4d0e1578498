"""A graph made ready to look for chains in, with the candidates for chains that are in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Graph

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.find.normalize import is_tangled, normalize
from mfx_passes.find.relayout import Detour, find_spans, insert_detours
from mfx_passes.find.residual_adds import Candidate, find_adds, find_candidates
from mfx_passes.ir import Refusal, Rejection, ResidualAdd
from mfx_passes.named_steps import is_mark


@dataclass(frozen=True, eq=False)
class Prepared:
    """A graph without tangled in-place operations, in which the states of a candidate have one layout.

    Args:
        index: the graph.
        adds: its residual adds.
        candidates: the same in rows.
        rejections: the sums that only look like residual adds.
        detours: what was inserted to have one layout.
    """

    index: GraphIndex
    adds: Sequence[ResidualAdd]
    candidates: Sequence[Candidate]
    rejections: Sequence[Rejection]
    detours: Sequence[Detour] = ()


def prepare(graph: Graph, modules: Mapping[str, nn.Module], *, marked: bool, in_place: bool) -> Prepared:
    """Untangle in-place operations (see `normalize`) and have one layout for the states of a chain (see `relayout`).

    Args:
        graph: the graph.
        modules: the modules its ``call_module`` nodes call, by dotted path.
        marked: reject residual adds that `named_steps.mark_steps` did not mark.
        in_place: change the graph where it has to be changed; else a copy of it is changed.
    """
    index = GraphIndex(graph, modules)
    if is_tangled(index):
        if not in_place:
            return prepare(_copy(graph), modules, marked=marked, in_place=True)
        normalize(index)
        index = GraphIndex(graph, modules)
    prepared = _look(index, marked=marked)
    spans = find_spans(prepared.candidates, index)
    if not spans:
        return prepared
    if not in_place:
        return prepare(_copy(graph), modules, marked=marked, in_place=True)
    detours = insert_detours(spans, index)
    return _look(GraphIndex(graph, modules), detours, marked=marked)


def _copy(graph: Graph) -> Graph:
    return Graph.__deepcopy__(graph)  # with all that is noted on nodes, which a portable graph's own copy drops


def _look(index: GraphIndex, detours: Sequence[Detour] = (), *, marked: bool) -> Prepared:
    adds, rejections = find_adds(index)
    if marked:
        rejections += [Rejection(add.node, Refusal.UNNAMED) for add in adds if not is_mark(add.node)]
        adds = [add for add in adds if is_mark(add.node)]
    return Prepared(index, adds, find_candidates(adds, index), rejections, detours)
