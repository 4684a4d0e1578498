"""Blocks: modules that one would put a checkpoint around, and that are in no chain.

The steps of a chain lie in modules of one or a few classes. Other modules of these classes are blocks, too: with a
projection instead of a skip, as where a ResNet changes the shape; without a skip, as in a MobileNet; or alone. So is a
module of another class that adds up two branches of its input. They keep their function. Tags tell who runs the graph
which nodes belong together, so that their activations can be rebuilt as those of a step are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from torch.fx import Node

from mfx_passes import paths
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.find.nesting import Nesting
from mfx_passes.ir import Findings, Refusal, Selection, enclosing_path, tag_block
from mfx_passes.ops.gradients import differentiates

_ALONE = (Refusal.SINGLE, Refusal.SHORT)
_UNTOUCHED = (Refusal.LEFT_OUT, Refusal.UNNAMED, Refusal.OTHER)


def tag_blocks(
    findings: Findings,
    nesting: Nesting,
    mutations: Mutations,
    index: GraphIndex,
    selection: Selection,
    is_fixed: Callable[[Node], bool],
) -> None:
    """Tag the nodes of the blocks that are in no chain with the paths of their modules.

    What the user left out has no tags; nor has a block that differentiates or that changes in place what lives on
    outside of it, or of which something is changed in place later.

    Args:
        findings: the chains, none of them rewritten, and the rejections.
        nesting: the chains.
        mutations: the in-place operations of the graph.
        index: the graph.
        selection: the options of the search.
        is_fixed: tells nodes that must run once only.
    """
    if not findings.chains or selection.only is not None or selection.marked or selection.forward_only:
        return
    found, merging = _candidates(findings, nesting, index, selection)
    computed = [node for node in index.nodes if node.op != "get_attr"]
    for path, run in groupby(computed, lambda node: _owner(node, {*found, *merging})):
        nodes = list(run)
        if path is None or any(map(is_fixed, nodes)) or not _is_apart(nodes, mutations, index):
            continue
        if path in found or _has_one_end_each(nodes):
            for node in nodes:
                tag_block(node, path)


def _candidates(
    findings: Findings, nesting: Nesting, index: GraphIndex, selection: Selection
) -> tuple[set[str], set[str]]:
    """Return the paths of modules of the classes that steps lie in, and of others that add up two branches."""
    updates = [update for chain in findings.chains for update in chain.updates]
    in_chains = {enclosing_path(node) for chain in findings.chains for node in chain.nodes if node.op != "get_attr"}
    left = [rejection.path for rejection in findings.rejections if rejection.refusal in _UNTOUCHED]
    taken = {path for inner in (*in_chains, *left) for path in paths.ancestors(inner)}
    sums = [enclosing_path(update.add.node) for update in updates]
    sums += [rejection.path for rejection in findings.rejections if rejection.refusal in _ALONE]
    kinds = {type(index.modules[path]) for path in sums if path in index.modules and path}
    outside = {enclosing_path(node) for node in index.nodes if nesting.innermost(node) is None}
    around = {path for inner in outside if inner for path in paths.ancestors(inner)} - taken
    free = {path for path in around if path in index.modules and not _is_skipped(path, selection)}
    blocks = _innermost({path for path in free if type(index.modules[path]) in kinds})
    where = [rejection.path for rejection in findings.rejections]
    others = {rejection.path for rejection in findings.rejections if rejection.refusal is Refusal.MERGE} & free
    others = {path for path in others if sum(paths.is_inside(inner, path) for inner in where) == 1}
    return blocks, {path for path in others if not any(_overlap(path, block) for block in blocks)}


def _overlap(path: str, other: str) -> bool:
    return paths.is_inside(path, other) or paths.is_inside(other, path)


def _innermost(found: Collection[str]) -> set[str]:
    around = {path for inner in found for path in paths.ancestors(inner)[:-1]}
    return set(found) - around


def _is_skipped(path: str, selection: Selection) -> bool:
    whole = paths.ancestors(paths.join(selection.within, path))
    return any(fnmatchcase(part, pattern) for part in whole for pattern in selection.skip)


def _owner(node: Node, blocks: Collection[str]) -> str | None:
    if node.op in ("placeholder", "output"):
        return None
    path = enclosing_path(node)
    return next((outer for outer in paths.ancestors(path) if outer in blocks), None) if path else None


def _is_apart(nodes: Sequence[Node], mutations: Mutations, index: GraphIndex) -> bool:
    """True if a block may run again: it neither differentiates nor changes what is outside, nor is it changed later."""
    own = set(nodes)
    if any(differentiates(node, index.modules) for node in nodes):
        return False
    if any(node not in own and node.op != "get_attr" for m in mutations.at(nodes) for node in m.family):
        return False
    has = own.union(*(node.all_input_nodes for node in nodes))
    begin = index.position[nodes[0]]
    return all(m.node in own or index.position[m.node] < begin for m in mutations.touching(has))


def _has_one_end_each(nodes: Sequence[Node]) -> bool:
    own = set(nodes)
    read = {source for node in nodes for source in node.all_input_nodes if source.op != "get_attr"} - own
    return len(read) == 1 and sum(not own.issuperset(node.users) for node in nodes) == 1
