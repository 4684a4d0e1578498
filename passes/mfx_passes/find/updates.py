"""Make updates of residual adds: their first and last states, and the nodes they own."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from torch.fx import Node

from mfx_passes import paths
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.sizes import is_shared_size
from mfx_passes.find.residual_adds import Candidate, Link
from mfx_passes.ir import Refusal, Rejection, Update, enclosing_path
from mfx_passes.ops import sums, vocabulary
from mfx_passes.ops.step_markers import mapped
from mfx_passes.ops.vocabulary import are_undone


def assemble(run: Candidate, index: GraphIndex) -> tuple[list[list[Update]], list[Rejection]]:
    """Return rows of consecutive updates; a row ends where the stream's layout changes for good."""
    rows: list[list[Update]] = [[]]
    rejections: list[Rejection] = []
    for link in run.links:
        update = _update(link, rows[-1][-1].out, run, index) if rows[-1] else _first_update(link, run, index)
        if update is None and rows[-1]:
            rows.append([])
            update = _first_update(link, run, index)
        if update is None:
            rejections.append(Rejection(link.add.node, Refusal.REARRANGED))
            rows.append([])
        else:
            rows[-1].append(update)
    return [row for row in rows if row], rejections


def _first_update(link: Link, run: Candidate, index: GraphIndex) -> Update | None:
    """Start the first update of a row before a rearrangement of the skip, if that is undone after the sum.

    One that is undone before the sum stays in front of the chain: others may read what lies between.
    """
    early = [start for start in starts_before_relayout(link, index) if not are_undone(_moved(link, start, index))]
    starts = (*early, link.add.bases[0])
    return next((update for start in starts if (update := _update(link, start, run, index))), None)


def starts_before_relayout(link: Link, index: GraphIndex) -> list[Node]:
    """Return the values on the skip's way that a rearrangement follows, the earliest one first."""
    path = link.add.skip_path
    return [base for above, base in pairwise(path) if _moves(above, index) and base in link.add.bases][::-1]


def _moves(node: Node, index: GraphIndex) -> bool:
    return index.layout(node) not in (None, vocabulary.NEUTRAL)


def _moved(link: Link, skip: Node, index: GraphIndex) -> list[tuple[object, ...] | None]:
    """Return the rearrangements between a state and the sum that it is the skip of, in order."""
    path = link.add.skip_path
    entry = [index.layout(node) for node in path[: path.index(skip)]]
    return [kind for kind in entry[::-1] if kind != vocabulary.NEUTRAL]


def _update(link: Link, skip: Node, run: Candidate, index: GraphIndex) -> Update | None:
    end = link.tail[-1] if link.tail else link.add.node
    moved = _moved(link, skip, index)
    out = restored(end, moved, link, index) if moved else end
    if out is None and are_undone(moved):
        out, moved = end, []
    if out is None:
        return None
    kind = "map" if moved or link.add.is_scaled or link.add.node.target is mapped else run.kind
    update = Update(link.add, skip, link.add.skip_path[0], link.tail, out, set(), kind)
    own(update, index)
    return update


def own(update: Update, index: GraphIndex, states: Collection[Node] = (), feeding: int = 0) -> None:
    """Give an update the nodes that it owns, and the path of its branch.

    Args:
        update: the update.
        index: the graph.
        states: those of all streams of its chain; each ends what is owned.
        feeding: bits of the states whose readers must run inside the chain, see `GraphIndex.bits`.
    """
    update.nodes, fed = _owned(update.skip, update.out, index, states, feeding)
    add, term, out = update.add, update.term, update.out
    branch = _towards(out, fed) - add.sums - set(update.tail)  # not what only looks at the stream
    branch -= index.sizes | _towards(term, fed) | set(index.skip_path(out))
    branch -= {node for node in term.users if add.is_scaled and sums.is_product(node)}
    update.path = paths.common(map(enclosing_path, branch))


def _towards(node: Node, nodes: set[Node]) -> set[Node]:
    """Return those of some nodes that a node is computed from, with the node itself."""
    found, todo = {node}, [node]
    while todo:
        sources = nodes.intersection(todo.pop().all_input_nodes) - found
        found |= sources
        todo += sources
    return found


def restored(end: Node, moved: list[tuple[object, ...] | None], link: Link, index: GraphIndex) -> Node | None:
    """Return the node after ``end`` at which every rearrangement of the skip has been undone, last one first."""
    pending = list(moved)
    for node in _onwards(end, link, index):
        kind = index.layout(node)
        if kind == vocabulary.NEUTRAL:
            continue
        if kind is None or not vocabulary.undoes(kind, pending[-1] or ()):
            return None
        pending.pop()
        if not pending:
            return node
    return None


def _onwards(end: Node, link: Link, index: GraphIndex) -> list[Node]:
    """Return the value-preserving operations from a state towards the next step's skip, or along a single path."""
    if link.next is not None:
        path = link.next.skip_path
        return list(path[: path.index(end)][::-1])
    onwards: list[Node] = []
    while (reader := index.only_reader(end)) is not None and index.layout(reader) is not None:
        onwards.append(end := reader)
    return onwards


def _owned(
    skip: Node, out: Node, index: GraphIndex, states: Collection[Node], feeding: int
) -> tuple[set[Node], set[Node]]:
    """Return the nodes that an update between two states owns, and those of them that are computed from states.

    It owns, of the nodes computed from ``skip``: those that ``out`` needs; those without readers, which are there for
    their effect (checks, prints, ``copy_`` into a part of a tensor), with the nodes these need. Then what these read
    that is computed from other streams. Then sizes of all these. Then nodes that all these alone read (a position bias
    made of parameters, a key projected from an encoder's output); but not sizes of other states, which are no reads.
    """
    interval = [node for node in index.between(skip, out) if node.op not in ("placeholder", "get_attr", "output")]
    fed, shared = {skip}, set[Node]()
    for node in interval:
        sources = set(node.all_input_nodes)
        if node in index.sizes and is_shared_size(node) and (sources & fed) <= {skip}:
            shared.add(node)  # all states have it
        elif (node not in states or node is out) and not fed.isdisjoint(sources - shared):
            fed.add(node)
    needed = {out, *(node for node in fed if not node.users)}
    for node in reversed(interval):
        if node in needed and (node not in states or node is out):
            needed.update(node.all_input_nodes)
    owned = {node for node in interval if node in fed and node in needed}
    todo = list(owned) if feeding else []
    while todo:
        for source in todo.pop().all_input_nodes:
            is_given = source in owned or source in states or source in index.sizes
            if not is_given and index.ancestors(source) & feeding:
                owned.add(source)
                todo.append(source)
    computed = set(owned)
    for node in interval:
        if node in index.sizes and owned.issuperset(node.all_input_nodes):
            owned.add(node)
    for node in reversed(interval):
        if node.users and node not in states and owned.issuperset(node.users):
            is_other_size = node in index.sizes and any(source in states for source in node.all_input_nodes)
            if not is_other_size or skip in node.all_input_nodes:
                owned.add(node)
    return owned, computed
