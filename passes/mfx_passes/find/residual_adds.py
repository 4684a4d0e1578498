"""Find residual adds by ancestry, and string them together to candidates for chains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.ir import Kind, Refusal, Rejection, ResidualAdd
from mfx_passes.ops import sums, vocabulary


@dataclass(frozen=True, eq=False)
class Link:
    """A residual add whose state (``out``, at the end of ``tail``) is the skip of ``next``; the last has no next."""

    add: ResidualAdd
    tail: tuple[Node, ...] = ()
    next: ResidualAdd | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """Residual adds in a row, all of one kind, before any side condition was looked at."""

    links: tuple[Link, ...]
    kind: Kind


def find_adds(index: GraphIndex) -> tuple[list[ResidualAdd], list[Rejection]]:
    """Return the residual adds of a graph, in program order, and the sums that only look like one."""
    adds: list[ResidualAdd] = []
    rejections: list[Rejection] = []
    absorbed: set[Node] = set()
    for node in reversed(index.nodes):  # a sum takes the sums inside it along, so the outermost comes first
        if node in absorbed or node in index.sizes or sums.terms(node) is None:
            continue
        add = _residual_add(node, index)
        if isinstance(add, ResidualAdd):
            absorbed |= add.sums
            adds.append(add)
        elif add is not None:
            rejections.append(add)
    return adds[::-1], rejections[::-1]


def _residual_add(node: Node, index: GraphIndex) -> ResidualAdd | Rejection | None:
    return _plain_add(node, index) or _scaled_add(node, index) or _merge_of_branches(node, index)


def _plain_add(node: Node, index: GraphIndex) -> ResidualAdd | None:
    addends = list(sums.terms(node) or ())
    owned = {node}
    while True:
        for term in addends:
            if (found := _as_skip(term, addends, index)) is not None:
                path, bases = found
                if term.node is None:
                    return None
                branch = tuple(factor for other in addends if other is not term for factor in other.factors)
                return ResidualAdd(node, frozenset(owned), path, bases, branch)
        inner = next((t.node for t in addends if _is_inner_sum(t.node, owned)), None)
        if inner is None:
            return None
        owned.add(inner)
        addends = [x for t in addends for x in ((sums.terms(inner) or ()) if t.node is inner else (t,))]


def _scaled_add(node: Node, index: GraphIndex) -> ResidualAdd | None:
    """Return the residual add of a sum that has a skip as a factor; of several, the one that the others depend on."""
    addends, owned = list(sums.terms(node) or ()), {node}
    while True:
        factors = [[f for factor in term.factors for f in sums.factors(factor)] for term in addends]
        found = [
            (path, bases, [f for row in factors for f in row if f is not skip])
            for mine in factors
            for skip in mine
            for path, bases in _bases(skip, [row for row in factors if row is not mine], index)
        ]
        if found:
            path, bases, branch = min(found, key=lambda each: index.position[each[0][0]])
            if sum(row.count(path[0]) for row in factors) > 1:  # x*a(x) + x*b(x)
                return None
            return ResidualAdd(node, frozenset(owned), path, bases, tuple(branch), is_scaled=True)
        inner = next((t.node for t in addends if _is_inner_sum(t.node, owned)), None)
        if inner is None or _plain_add(inner, index) is not None:
            return None
        owned.add(inner)
        addends = [x for t in addends for x in ((sums.terms(inner) or ()) if t.node is inner else (t,))]


def _bases(skip: Node, others: list[list[Node]], index: GraphIndex) -> Iterator[tuple[tuple[Node, ...], ...]]:
    path = index.skip_path(skip)
    for i, base in enumerate(path):
        if base.op == "get_attr" or base in index.sizes:
            return
        if all(any(index.is_ancestor(base, factor) for factor in row) for row in others):
            yield path, path[i:]
            return


def _as_skip(term: sums.Term, addends: list[sums.Term], index: GraphIndex) -> tuple[tuple[Node, ...], ...] | None:
    """Return a term's skip path, and the part of it where a step may begin; None if other terms do not depend on it."""
    if len(term.factors) != 1:
        return None
    path = index.skip_path(term.factors[0])
    others = [other for other in addends if other is not term]
    for i, base in enumerate(path):
        if base.op == "get_attr" or any(other.node is base for other in others):  # x + x is not a step
            return None
        if all(any(index.is_ancestor(base, factor) for factor in other.factors) for other in others):
            return path, path[i:]
    return None


def _is_inner_sum(node: Node | None, owned: set[Node]) -> bool:
    return node is not None and sums.terms(node) is not None and set(node.users) <= owned


def _merge_of_branches(node: Node, index: GraphIndex) -> Rejection | None:
    factors = [factor for term in sums.terms(node) or () for factor in term.factors]
    if len(factors) == 2 and index.share_computed_ancestor(*factors):
        return Rejection(node, Refusal.MERGE)
    return None


def find_candidates(adds: Sequence[ResidualAdd], index: GraphIndex) -> list[Candidate]:
    """String residual adds together: the state after one is the skip of the next, and each component is a path."""
    import networkx as nx  # takes half a second

    starting: dict[Node, list[ResidualAdd]] = defaultdict(list)
    for add in adds:
        for base in add.bases:
            starting[base].append(add)
    links = {add: _link(add, starting, index) for add in adds}
    following = nx.DiGraph()
    following.add_nodes_from(adds)
    following.add_edges_from((add, link.next) for add, link in links.items() if link.next)
    candidates: list[Candidate] = []
    for component in nx.weakly_connected_components(following):
        path = sorted(component, key=lambda add: index.position[add.node])
        assert nx.is_path(following, path)
        candidates += _split_by_kind([links[add] for add in path], index)
    return candidates


def _link(add: ResidualAdd, starting: dict[Node, list[ResidualAdd]], index: GraphIndex) -> Link:
    """Link a sum to the next: the sum itself is its skip, or the end of a tail."""
    if following := starting.get(add.node):
        return Link(add, (), _next(following))
    tail, moved = [], []
    for node in _tail(add.node, index):
        tail.append(node)
        if (kind := index.layout(node)) not in (None, vocabulary.NEUTRAL):
            moved.append(kind)
        following = starting.get(node)
        if following and vocabulary.are_undone(moved):
            return Link(add, tuple(tail), _next(following))
    return Link(add)


def _next(following: Sequence[ResidualAdd]) -> ResidualAdd:
    """Return the outermost of several sums that start from one state, one whose skip is not scaled if there is one."""
    return next((add for add in reversed(following) if not add.is_scaled), following[-1])


def _tail(node: Node, index: GraphIndex) -> list[Node]:
    """Return the single path of tail operations that begins at a node, each on the value of the one before.

    Rearrangements are among them, as around the LayerNorm of channels of images: a tail ends where they are undone.
    """
    tail: list[Node] = []
    while (reader := index.only_reader(node)) is not None and (
        vocabulary.is_tail(reader, index.modules) or index.layout(reader) is not None
    ):
        if next(source for source in reader.all_input_nodes if source.op != "get_attr") is not node:
            break  # a weight or a bound that is computed: the tail of another value
        tail.append(node := reader)
    return tail


def _split_by_kind(row: list[Link], index: GraphIndex) -> list[Candidate]:
    """Cut a row wherever links with a tail meet links without one, or with another one."""
    candidates: list[Candidate] = []
    first = 0
    for i, link in enumerate(row):
        if link.next is None or (i > first and _signature(link, index) != _signature(row[first], index)):
            candidates.append(_close(row[first : i + 1], index))
            first = i + 1
    return candidates


def _signature(link: Link, index: GraphIndex) -> tuple[object, ...]:
    return tuple(vocabulary.signature(node, index.modules) for node in link.tail)


def _close(row: list[Link], index: GraphIndex) -> Candidate:
    """End a candidate: its last step takes the tail that its predecessors have, if it is there, and no other."""
    wanted = _signature(row[0], index) if len(row) > 1 else ()
    last = row[-1]
    tail = tuple(_tail(last.add.node, index)[: len(wanted)])
    ended = Link(last.add, tail) if _signature(Link(last.add, tail), index) == wanted else Link(last.add)
    return Candidate((*row[:-1], ended), "map" if wanted else "residual")
