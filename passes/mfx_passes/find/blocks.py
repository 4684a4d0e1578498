"""Blocks: modules that one would put a checkpoint around, and that are in no chain.

The steps of a chain lie in modules of one or a few classes. Other modules of these classes are blocks, too: with a
projection instead of a skip, as where a ResNet changes the shape; without a skip, as in a MobileNet; or alone. So is a
module of another class that adds up two branches of its input. They keep their function. Tags tell who runs the graph
which nodes belong together, so that their activations can be rebuilt as those of a step are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from torch import nn
from torch.fx import Node

from mfx_passes import paths
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.find.nesting import Nesting
from mfx_passes.ir import Findings, Refusal, Selection, Update, enclosing_path, tag_block
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
    candidates = found | merging
    merges = {rejection.node for rejection in findings.rejections if rejection.refusal is Refusal.MERGE}
    for path, run in groupby(computed, lambda node: _owner(node, candidates, nesting)):
        nodes = list(run)
        if path is None or any(map(is_fixed, nodes)) or not _is_apart(nodes, mutations, index):
            continue
        if len(nodes) == 1 and not _holds_modules(nodes[0], index):
            continue  # such as a linear layer: all it keeps is what it is given
        if path in found or (merges.intersection(nodes) and _has_one_end_each(nodes, index.sizes)):
            for node in nodes:
                tag_block(node, path)


def _candidates(
    findings: Findings, nesting: Nesting, index: GraphIndex, selection: Selection
) -> tuple[set[str], set[str]]:
    """Return the paths of modules that are like those that steps lie in, and of others that add up two branches.

    The latter may be the first part of a block whose last step begins a chain.
    """
    in_chains = {enclosing_path(node) for chain in findings.chains for node in chain.nodes if node.op != "get_attr"}
    left = [rejection.path for rejection in findings.rejections if rejection.refusal in _UNTOUCHED]
    untouched = {path for inner in left for path in paths.ancestors(inner)}
    taken = untouched.union(path for inner in in_chains for path in paths.ancestors(inner))
    outside = {enclosing_path(node) for node in index.nodes if nesting.innermost(node) is None}
    around = {path for inner in outside if inner for path in paths.ancestors(inner)} - untouched
    around = {path for path in around if path in index.modules and not _is_skipped(path, selection)}
    classes = _Classes(findings, index.modules)
    blocks = _innermost({path for path in around - taken if classes.is_block(path)})
    merging = {rejection.path for rejection in findings.rejections if rejection.refusal is Refusal.MERGE} & around
    others = {path for path in merging - taken if classes.sums_in(path) == 1}
    others |= {path for path in merging & taken if classes.is_block(path)}
    return blocks, {path for path in others if not any(_overlap(path, block) for block in blocks)}


class _Classes:
    """The classes of modules that add up the steps of chains, or that such a step would lie in alone.

    A module of such a class is a block if it holds as many sums as one in a chain, at most. A class that repeats a step
    in one forward (``for layer in layers: x = x + layer(x)``) is a tower: recomputed as a whole, the activations of all
    its layers would be alive at once. In a tower the modules of the branches are the blocks.

    Args:
        findings: the chains and the rejections.
        modules: the modules of the graph by path.
    """

    def __init__(self, findings: Findings, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        updates = [update for chain in findings.chains for update in chain.updates]
        alone = [rejection.path for rejection in findings.rejections if rejection.refusal in _ALONE]
        sums = [enclosing_path(update.add.node) for update in updates]
        sums += [rejection.path for rejection in findings.rejections]
        self._held = Counter(path for inner in sums for path in paths.ancestors(inner))
        own = Counter(sums)
        single = [path for path in alone if path in modules and own[path] == 1]
        self._most = {type(modules[path]): self.sums_in(path) for path in single if path}
        self._branches: dict[type, set[type]] = {}
        for path, group in groupby(updates, lambda update: enclosing_path(update.add.node)):
            if path and path in modules:
                self._note(path, list(group))

    def _note(self, path: str, updates: Sequence[Update]) -> None:
        cls = type(self._modules[path])
        self._most[cls] = max(self._most.get(cls, 1), self.sums_in(path))
        if _repeats(list(map(self._branch, updates))):
            inner = {update.path for update in updates if update.path != path and update.path in self._modules}
            self._branches.setdefault(cls, set()).update(type(self._modules[p]) for p in inner)

    def _branch(self, update: Update) -> list[object]:
        """Return what tells branches of different kinds apart: the operations in the module that a branch lies in."""
        return [
            type(self._modules[str(node.target)]) if node.op == "call_module" else node.target
            for node in sorted(update.nodes)
            if node.op != "get_attr" and paths.is_inside(enclosing_path(node), update.path)
        ]

    def sums_in(self, path: str) -> int:
        """Return how many sums a module holds, those in chains and the rejected ones."""
        return self._held[path]

    def is_block(self, path: str) -> bool:
        """True if a module is a block, or a layer of a tower."""
        cls = type(self._modules[path])
        around = [type(self._modules[outer]) for outer in paths.ancestors(path)[:-1] if outer in self._modules]
        if any(cls in self._branches.get(outer, ()) for outer in around):
            return True
        return cls in self._most and cls not in self._branches and self.sums_in(path) <= self._most[cls]


def _repeats(word: Sequence[object]) -> bool:
    """True if some entries come twice in a row: AA, or ABAB."""
    starts = range(len(word))
    return any(word[i : i + n] == word[i + n : i + 2 * n] for i in starts for n in range(1, (len(word) - i) // 2 + 1))


def _overlap(path: str, other: str) -> bool:
    return paths.is_inside(path, other) or paths.is_inside(other, path)


def _innermost(found: Collection[str]) -> set[str]:
    around = {path for inner in found for path in paths.ancestors(inner)[:-1]}
    return set(found) - around


def _is_skipped(path: str, selection: Selection) -> bool:
    whole = paths.ancestors(paths.join(selection.within, path))
    return any(fnmatchcase(part, pattern) for part in whole for pattern in selection.skip)


def _owner(node: Node, blocks: Collection[str], nesting: Nesting) -> str | None:
    if node.op in ("placeholder", "output") or nesting.innermost(node) is not None:
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


def _holds_modules(node: Node, index: GraphIndex) -> bool:
    return node.op == "call_module" and any(True for _ in index.modules[str(node.target)].children())


def _has_one_end_each(nodes: Sequence[Node], sizes: Collection[Node]) -> bool:
    """True if one value goes in, and one comes out; sizes do not count."""
    own, values = set(nodes), [node for node in nodes if node not in sizes]
    read = {source for node in values for source in node.all_input_nodes if source.op != "get_attr"}
    ends = sum(not own.issuperset(node.users) for node in values)
    return len(read.difference(own, sizes)) == 1 and ends == 1
