"""All passes one after the other: find and check, fold, outline, rewrite."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.fx import Graph, GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.analysis.sizes import read_sizes_at_start
from mfx_passes.find.blocks import tag_blocks
from mfx_passes.find.chains import chains_of, find_chains
from mfx_passes.find.nesting import Nesting
from mfx_passes.find.prepare import prepare
from mfx_passes.ir import ChainGraphs, Findings, ModuleCall, Selection
from mfx_passes.rewrite.containers import containers_of, note_containers
from mfx_passes.rewrite.fold import fold_calls, must_stay
from mfx_passes.rewrite.rewrite import Insert, rewrite

MakeCall = Callable[[ChainGraphs], nn.Module]


@dataclass(frozen=True)
class Rewritten:
    """The findings in a graph that was rewritten, and the fate of its module calls.

    Args:
        findings: the chains and the residual adds that are in none.
        flat: the module calls whose nodes were not folded into a call of the module again.
        opened: paths of the modules among them for which the blocks in them are the only reason.
    """

    findings: Findings
    flat: list[ModuleCall]
    opened: list[str]


def rewrite_graph(
    graph: Graph,
    modules: dict[str, nn.Module],
    insert: Insert,
    selection: Selection = Selection(),  # noqa: B008 - frozen
    calls: Sequence[ModuleCall] = (),
    may_open: Callable[[str], bool] | None = None,
) -> Rewritten:
    """Find the chains of a graph and put a momentum call in the place of each, in place.

    Args:
        graph: the graph of a whole forward pass.
        modules: the modules its ``call_module`` nodes call, by dotted path.
        insert: see `rewrite.Insert`.
        selection: which residual adds may be rewritten.
        calls: the module calls the tracer walked through, to be called as modules again where that is possible.
        may_open: tag blocks that are in no chain, see `find.blocks`; and tells whether the module at a path may be left
            open, so that those in it are called one by one. None: no block is tagged.

    Raises:
        MfxError: a pattern of ``only`` or ``skip`` fits nothing.
    """
    findings = chains_of(prepare(graph, modules, marked=selection.marked, in_place=True), selection)
    blocks = None if may_open is None else partial(tag_blocks, selection=selection, is_fixed=must_stay)
    return _rewrite_found(findings, modules, insert, calls, blocks, may_open or _never)


def _never(path: str) -> bool:
    return False


def _rewrite_found(
    findings: Findings,
    modules: dict[str, nn.Module],
    insert: Insert,
    calls: Sequence[ModuleCall] = (),
    blocks: Callable[..., None] | None = None,
    may_open: Callable[[str], bool] = _never,
) -> Rewritten:
    graph, chains = findings.graph, findings.chains
    index = GraphIndex(graph, modules)
    nesting = Nesting(chains)
    for chain in chains:
        starts = chain.starts
        starts_in = [step for step in nesting.around(chain) if any(x in step.nodes or x in step.skips for x in starts)]
        read_sizes_at_start(graph, chain, index.sizes, starts_in)
    sums = {node for chain in chains for step in chain.steps for node in step.sums}
    containers = containers_of(calls, nesting)
    mutations = Mutations(index, sums)
    if blocks is not None:
        blocks(findings, nesting, mutations, index)
    flat, opened = fold_calls(graph, calls, nesting, findings.reread, mutations, may_open)
    note_containers(containers, flat)
    rewrite(graph, nesting, modules, insert)
    return Rewritten(findings, flat, opened)


def call_name(chain: str, taken: Container[str]) -> str:
    """Return a name for a chain's momentum call, an identifier that is not taken: ``momentum_encoder_layers``."""
    name = base = "momentum_" + re.sub(r"\W+", "_", chain).strip("_")
    count = 1
    while name in taken:
        count += 1
        name = f"{base}_{count}"
    return name


class MomentumPass(PassBase):
    """A ``torch.fx`` pass that turns every chain of residual adds of a ``GraphModule`` into one momentum call.

    Args:
        make_call: gets the graphs of a chain and returns the module that will run them; it is called with
            ``(xs, captures, roots)``, see `rewrite.Insert`.
        selection: which residual adds may be rewritten.
    """

    def __init__(self, make_call: MakeCall, selection: Selection = Selection()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self._make_call = make_call
        self._selection = selection

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite a graph module in place; one without chains comes back as it was.

        Args:
            graph_module: with tensors as inputs; shapes need not be known.

        Returns:
            The graph module, and whether it was changed.
        """

        def insert(graphs: ChainGraphs) -> tuple[str, str | None]:
            name = call_name(graphs.name, graph_module._modules)
            graph_module.add_submodule(name, self._make_call(graphs))
            return name, None

        modules = dict(graph_module.named_modules())
        findings = find_chains(graph_module.graph, modules, self._selection)
        if not findings.chains:
            return PassResult(graph_module, False)
        _rewrite_found(findings, modules, insert)
        graph_module.graph = findings.graph
        return PassResult(graph_module, True)
