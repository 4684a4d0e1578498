"""From a graph to its chains: find, check, cut where needed, nest and name. Reads the graph, never rewrites it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.fx import Graph, Node

from mfx_passes.check import inputs_of, refusal
from mfx_passes.errors import MfxError
from mfx_passes.find import find_adds, find_runs
from mfx_passes.index import GraphIndex
from mfx_passes.ir import Chain, Findings, Rejection, Selection, Step, common_path
from mfx_passes.normalize import Mutation, mutations_in, normalize
from mfx_passes.sizes import is_state_size
from mfx_passes.steps import assemble


def find_chains(graph: Graph, modules: Mapping[str, nn.Module], selection: Selection = Selection()) -> Findings:  # noqa: B008
    """All chains of residual steps in a graph, outermost first, and why the other residual adds are in none.

    In-place operations are untangled in the graph (see `normalize`); apart from that it is left as it was.

    Args:
        graph: the graph of a whole forward pass.
        modules: the modules its ``call_module`` nodes call, by dotted path.
        selection: which residual adds may be rewritten.

    Raises:
        MfxError: a pattern of ``only`` or ``skip`` fits nothing.
    """
    index = GraphIndex(graph, modules)
    if normalize(index):
        index = GraphIndex(graph, modules)
    mutations = mutations_in(index)
    adds, rejections = find_adds(index)
    rows: list[list[Step]] = []
    for run in find_runs(adds, index):
        assembled, refused = assemble(run, index)
        rejections += refused
        for row in assembled:
            rows += _cut(row, index, mutations, selection.refused, rejections)
    chains = [Chain(row) for row in _long_enough(rows, selection.min_steps, rejections)]
    chains = _nest(chains, rejections)
    _name(chains)
    chains = _select(chains, selection, rejections)
    return Findings(chains, sorted(rejections, key=lambda rejection: index.position[rejection.node]))


def _cut(
    row: list[Step],
    index: GraphIndex,
    mutations: Sequence[Mutation],
    refused: Mapping[str, str],
    out: list[Rejection],
) -> list[list[Step]]:
    """Take refused steps out of a row, and cut it where a branch needs what an earlier step gave to the outside."""
    rows: list[list[Step]] = [[]]
    known = _Outputs(index)
    for step in row:
        if reason := refused.get(step.add.node.name) or refusal(step, index, mutations):
            out.append(Rejection(step.add.node, reason))
            rows.append([])
            known = _Outputs(index)
            continue
        if rows[-1] and known.feed(step, rows[-1]):
            rows.append([])
            known = _Outputs(index)
        rows[-1].append(step)
        known.add(step)
    return [row for row in rows if row]


class _Outputs:
    """Everything that is computed from the steps of a row, inside and outside of them."""

    def __init__(self, index: GraphIndex) -> None:
        self._index = index
        self._own: set[Node] = set()
        self._fed: set[Node] = set()

    def add(self, step: Step) -> None:
        self._own |= step.nodes

    def feed(self, step: Step, row: list[Step]) -> bool:
        """Whether a capture of ``step`` is computed from the row.

        Sizes do not count: all states share theirs, and what an earlier branch computed of others is handed on.
        """
        states = {row[0].skip, *(earlier.out for earlier in row)}
        for node in self._index.between(row[-1].skip, step.out):
            outside = node not in self._own and node not in step.nodes
            if outside and any(source in self._own or source in self._fed for source in node.all_input_nodes):
                self._fed.add(node)
        sizes = self._index.sizes
        captures = [node for node in inputs_of(step)[1:] if not is_state_size(node, states, sizes)]
        return any((node in self._own and node not in sizes) or node in self._fed for node in captures)


def _long_enough(rows: Iterable[list[Step]], min_steps: int, rejections: list[Rejection]) -> list[list[Step]]:
    kept = []
    for row in rows:
        if len(row) >= min_steps:
            kept.append(row)
            continue
        steps = "a single residual step" if len(row) == 1 else f"a chain of {len(row)} steps"
        rejections += [Rejection(step.add.node, f"{steps}; chains have at least {min_steps}") for step in row]
    return kept


def _nest(chains: list[Chain], rejections: list[Rejection]) -> list[Chain]:
    """Order chains outermost first, and refuse those that lie partly inside a step of another one."""
    owner: dict[Node, Step] = {}
    nested = []
    for chain in sorted(chains, key=lambda chain: -len(chain.nodes)):
        if len({id(owner.get(node)) for node in chain.nodes}) > 1:
            reason = "the chain lies partly inside a step of another chain"
            rejections += [Rejection(step.add.node, reason) for step in chain.steps]
            continue
        nested.append(chain)
        owner.update((node, step) for step in chain.steps for node in step.nodes)
    return nested


def _name(chains: Sequence[Chain]) -> None:
    """The longest common module path of the steps; ``#2`` and so on where that is not unique."""
    seen: Counter[str] = Counter()
    for chain in sorted(chains, key=lambda chain: chain.start):
        name = common_path(step.path for step in chain.steps) or "root"
        seen[name] += 1
        chain.name = name if seen[name] == 1 else f"{name}#{seen[name]}"


def _select(chains: list[Chain], selection: Selection, rejections: list[Rejection]) -> list[Chain]:
    """Apply ``only`` and ``skip``; a chain that loses a step in its middle becomes two."""
    known = {chain.name for chain in chains} | {step.path for chain in chains for step in chain.steps}
    for pattern in (*(selection.only or ()), *selection.skip):
        if not any(_fits(name, pattern) for name in known):
            names = ", ".join(sorted(chain.name for chain in chains)) or "none"
            raise MfxError(f"{pattern!r} in only/skip fits no chain and no module path of a step. Chains: {names}.")
    if selection.only is None and not selection.skip:
        return chains
    selected = []
    for chain in chains:
        rows: list[list[Step]] = [[]]
        for step in chain.steps:
            if _wanted(chain, step, selection):
                rows[-1].append(step)
            else:
                rejections.append(Rejection(step.add.node, "left out by only/skip"))
                rows.append([])
        selected += [Chain(row) for row in _long_enough(filter(None, rows), selection.min_steps, rejections)]
    _name(selected)
    return selected


def _wanted(chain: Chain, step: Step, selection: Selection) -> bool:
    def named(pattern: str) -> bool:
        return fnmatchcase(chain.name, pattern) or _fits(step.path, pattern)

    return (selection.only is None or any(map(named, selection.only))) and not any(map(named, selection.skip))


def _fits(path: str, pattern: str) -> bool:
    """A pattern names a module with everything inside it."""
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*")
