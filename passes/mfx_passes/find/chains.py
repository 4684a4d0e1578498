"""Find the chains of a graph: assemble updates, make steps of them, nest, name, select."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import groupby

from torch import nn
from torch.fx import Graph

from mfx_passes import paths
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.errors import MfxError
from mfx_passes.find.check import changed_later, moved_past
from mfx_passes.find.nesting import Nesting
from mfx_passes.find.prepare import Prepared, prepare
from mfx_passes.find.relayout import remove_unused
from mfx_passes.find.steps import find_steps
from mfx_passes.find.streams import Row
from mfx_passes.find.updates import assemble
from mfx_passes.ir import (
    Chain,
    Cut,
    Findings,
    Grounds,
    Refusal,
    Rejection,
    Selection,
    Step,
    Update,
    enclosing_path,
    is_momentum_call,
)


def find_chains(graph: Graph, modules: Mapping[str, nn.Module], selection: Selection = Selection()) -> Findings:  # noqa: B008
    """Return all chains of residual steps in a graph, outermost first, and why other residual adds are in none.

    The graph is not changed. Where in-place operations have to be untangled (see `normalize`), or states brought into
    the layout of the rest of their chain (see `relayout`), a copy of the graph is, and the findings are in that.

    Args:
        graph: the graph of a whole forward pass.
        modules: the modules its ``call_module`` nodes call, by dotted path.
        selection: which residual adds may be rewritten.

    Raises:
        MfxError: a pattern of ``only`` or ``skip`` fits nothing.
    """
    return chains_of(prepare(graph, modules, marked=selection.marked, in_place=False), selection)


def chains_of(prepared: Prepared, selection: Selection) -> Findings:
    """Return the chains of a prepared graph; see `find_chains`. Detours that are in no chain are taken out."""
    index, graph = prepared.index, prepared.index.graph
    every_sum = {node for add in prepared.adds for node in add.sums}
    mutations = Mutations(index, every_sum, forward_only=selection.forward_only)
    in_place, grounds = mutations.at(every_sum), selection.grounds
    while True:
        chains, rejections, cuts = _search(prepared, mutations, selection, grounds)
        updates = [update for chain in chains for update in chain.updates]
        sums = {node for update in updates for node in update.add.sums}
        left = [mutation for mutation in in_place if mutation.node not in sums]  # change what a branch may read
        late = {u.add.node.name: why for u in updates if left and (why := changed_later(u, index, mutations, sums))}
        if mutations and not late:
            late = {u.add.node.name: why for chain in chains for u, why in moved_past(chain, index, mutations)}
        if not late:
            break
        grounds = {**grounds, **late}
    reread = remove_unused(prepared.detours, chains, graph)
    rejections.sort(key=lambda rejection: index.position[rejection.node])
    ends = {update.add.node for update in updates}
    return Findings(chains, rejections, [cut for cut in cuts if {cut.node, cut.last} & ends], reread, graph)


def _search(
    prepared: Prepared, mutations: Mutations, selection: Selection, grounds: Mapping[str, Grounds]
) -> tuple[list[Chain], list[Rejection], list[Cut]]:
    index = prepared.index
    rejections: list[Rejection] = list(prepared.rejections)
    rows: list[Row] = []
    for candidate in prepared.candidates:
        assembled, rearranged = assemble(candidate, index)
        rows += assembled
        rejections += rearranged
    found = find_steps(rows, index, mutations, selection, grounds)
    rejections += found.rejections
    _name_updates([update for steps in found.lists for step in steps for update in step.updates], index, selection)
    chains = [Chain(steps) for steps in _long_enough(found.lists, selection.min_steps, rejections)]
    chains = _nest(chains, rejections)
    _name(chains)
    _check_patterns(chains, selection, index.graph)
    return _select(chains, selection, rejections), rejections, found.cuts


def _name_updates(updates: Iterable[Update], index: GraphIndex, selection: Selection) -> None:
    counts: Counter[str] = Counter()
    for update in sorted(updates, key=lambda update: index.position[update.add.node]):
        update.path = paths.join(selection.within, update.path)
        counts[update.path] += 1
        update.name = f"{update.path}:{counts[update.path]}"


def _long_enough(rows: Iterable[list[Step]], min_steps: int, rejections: list[Rejection]) -> list[list[Step]]:
    kept = []
    for row in rows:
        if len(row) >= min_steps:
            kept.append(row)
            continue
        refusal = Refusal.SINGLE if len(row) == 1 else Refusal.SHORT
        facts = {"steps": len(row), "min_steps": min_steps}
        rejections += [Rejection(update.add.node, refusal, facts) for step in row for update in step.updates]
    return kept


def _nest(chains: Iterable[Chain], rejections: list[Rejection]) -> list[Chain]:
    """Order chains outermost first, and refuse those that lie partly inside a step of another one."""
    nesting = Nesting()
    for chain in sorted(chains, key=lambda chain: -len(chain.nodes)):
        if not nesting.add(chain):
            rejections += [Rejection(update.add.node, Refusal.CROSSING) for update in chain.updates]
    return nesting.chains


def _name(chains: Sequence[Chain]) -> None:
    """Name each chain after the longest common module path of its steps, with ``#2`` and so on to be unique."""
    taken = {chain.name for chain in chains}
    counts: Counter[str] = Counter()
    for chain in sorted(chains, key=lambda chain: chain.starts[0]):
        base = paths.common(step.path for step in chain.steps) or "root"
        while not chain.name:
            counts[base] += 1
            name = base if counts[base] == 1 else f"{base}#{counts[base]}"
            chain.name = name if name not in taken else ""


def _select(chains: list[Chain], selection: Selection, rejections: list[Rejection]) -> list[Chain]:
    """Apply ``only`` and ``skip``; a chain that loses a step in its middle becomes two, as where a group ends."""
    selected = []
    for chain in chains:
        rows = [(group, list(row)) for group, row in groupby(chain.steps, partial(_group, chain, selection))]
        if len(rows) == 1 and rows[0][0] is not None:
            selected.append(chain)
            continue
        left_out = [step for group, row in rows for step in row if group is None]
        rejections += [Rejection(update.add.node, Refusal.LEFT_OUT) for step in left_out for update in step.updates]
        kept = [row for group, row in rows if group is not None]
        selected += [Chain(row) for row in _long_enough(kept, selection.min_steps, rejections)]
    _name(selected)
    return selected


def _check_patterns(chains: Sequence[Chain], selection: Selection, graph: Graph) -> None:
    updates = [update for chain in chains for update in chain.updates]
    known = {chain.name for chain in chains} | {name for update in updates for name in (update.path, update.name)}
    # A pattern may mean a chain in another part of the model, or one that was rewritten before.
    if selection.within or selection.partial or any(map(is_momentum_call, graph.nodes)):
        return
    passed = known | {enclosing_path(node) for node in graph.nodes}  # a block may be in no chain, and left out, too
    patterns = [*((p, known) for p in sum(selection.groups or [], ())), *((p, passed) for p in selection.skip)]
    for pattern, names_known in patterns:
        if not any(_fits(name, pattern) for name in names_known):
            names = ", ".join(sorted(chain.name for chain in chains)) or "none"
            raise MfxError(f"{pattern!r} in only/skip fits no chain and no module path of a step. Chains: {names}.")


def _group(chain: Chain, selection: Selection, step: Step) -> int | None:
    """Return which patterns of ``only`` name an update of a step, 0 without any; None if it is left out."""

    def named(pattern: str) -> bool:
        return fnmatchcase(chain.name, pattern) or any(
            update.name == pattern or _fits(update.path, pattern) for update in step.updates
        )

    if any(map(named, selection.skip)):
        return None
    groups = selection.groups
    return 0 if groups is None else next((i for i, group in enumerate(groups) if any(map(named, group))), None)


def _fits(path: str, pattern: str) -> bool:
    """True if a pattern fits a module or one that it is inside of."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")
