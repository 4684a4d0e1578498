"""A graph as a ``networkx.DiGraph``, for queries of one's own, GraphML and other people's viewers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch.fx import Graph, Node
from torch.overrides import resolve_name

from mfx_passes.ir import ChainGraphs, Findings, Step, enclosing_path, momentum_chain

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(
    graph: Graph, findings: Findings | None = None, chains: Mapping[str, ChainGraphs] | None = None
) -> nx.DiGraph:
    """Return a ``torch.fx`` graph as a directed graph of networkx: its nodes by name, its data flow as edges.

    Every attribute of a node is text or an integer, and there only if it applies, so that ``networkx.write_graphml``
    takes the result:

    * ``op`` and ``target``: as in ``torch.fx``, a function by its full name (``torch.nn.functional.linear``);
    * ``module``: path of the innermost module whose forward made the node, ``""`` for the root; of a call of a module
      as a whole, that module's;
    * ``shape`` and ``dtype``: of its value, where they were recorded, such as ``"(8, 64)"`` and ``"float32"``;
    * ``chain`` and ``step``: name of the innermost chain that the node is in, and number of the step in it, from 0;
    * ``role``: ``"skip"`` for the start of a chain and for a view of a state on its way into a sum; ``"branch"`` and
      ``"sum"``; ``"tail"`` for what a step does to its sum; ``"momentum call"`` for a chain that was rewritten.

    Args:
        graph: any graph, such as that of ``mfx.trace(model)``; it stays as it is.
        findings: what `find_chains` found in it, for the roles of the nodes; without, only momentum calls have one.
        chains: what momentum calls run, by their targets: these also show what is inside. For the step t of a call
            ``momentum_blocks``, the nodes of the branch are ``momentum_blocks.t.NAME``, and the state in which the step
            ends is ``momentum_blocks.t``, a node of the op ``"momentum_step"`` and the role ``"sum"``. In a chain of
            several streams there is ``momentum_blocks.t.NAME`` for each one that the step updates, side by side, with
            the stream's number as ``stream``.

    Example:
        >>> from mfx_passes import find_chains
        >>> from torch import nn
        >>> from torch.fx import symbolic_trace
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        ...     def forward(self, x):
        ...         x = x + self.a(x)
        ...         x = x + self.b(x)
        ...         return self.head(x)
        >>> traced = symbolic_trace(Net())
        >>> findings = find_chains(traced.graph, dict(traced.named_modules()))
        >>> view = to_networkx(traced.graph, findings)
        >>> [(name, facts["step"], facts["role"]) for name, facts in view.nodes.items() if "role" in facts]
        [('x', 0, 'skip'), ('a', 0, 'branch'), ('add', 0, 'sum'), ('b', 1, 'branch'), ('add_1', 1, 'sum')]
        >>> sorted(view.successors("add"))
        ['add_1', 'b']
    """
    import networkx as nx

    view = nx.DiGraph()
    _add_nodes(view, graph, {}, chains or {}, "", {} if findings is None else _roles(findings))
    return view


def _roles(findings: Findings) -> dict[Node, dict[str, Any]]:
    """Return chain, step and role of every node of a chain; the chains come outermost first, the innermost decides."""
    roles: dict[Node, dict[str, Any]] = {}
    for chain in findings.chains:
        for start in chain.starts:
            roles.setdefault(start, {"chain": chain.name, "step": 0, "role": "skip"})
        for number, step in enumerate(chain.steps):
            role = dict.fromkeys(step.nodes, "branch")
            for update in step.updates:
                role.update(dict.fromkeys(step.nodes.intersection(update.add.skip_path), "skip"))
            role.update({**dict.fromkeys(_tail(step), "tail"), **dict.fromkeys(step.sums, "sum")})
            roles.update((node, {"chain": chain.name, "step": number, "role": role[node]}) for node in role)
    return roles


def _tail(step: Step) -> set[Node]:
    """Return what a step computes from its sums."""
    ends, tail = {update.add.node for update in step.updates}, set[Node]()
    for node in sorted(step.nodes - step.sums):
        if any(source in ends or source in tail for source in node.all_input_nodes):
            tail.add(node)
    return tail


def _add_nodes(
    view: nx.DiGraph,
    graph: Graph,
    names: dict[Node, str],
    chains: Mapping[str, ChainGraphs],
    prefix: str,
    roles: Mapping[Node, Mapping[str, Any]],
    role: Mapping[str, Any] = {},
) -> None:
    """Add the nodes of a graph to the view, but for those that have a name in it already."""
    results: dict[Any, list[str]] = {}  # of momentum calls that return several
    for node in graph.nodes:
        if node in names or (prefix and node.op == "output"):
            continue
        name = names[node] = f"{prefix}{node.name}"
        chain = momentum_chain(node)
        own = role if chain is None else {"chain": chain, "role": "momentum call"}
        view.add_node(name, **_facts(node), **roles.get(node, own))
        view.add_edges_from((names[source], name) for source in node.all_input_nodes)
        if chain is not None and str(node.target) in chains:
            results[node] = _add_steps(view, node, names, chains)
        if node.target is operator.getitem and node.args[0] in results:
            view.add_edge(results[node.args[0]][cast(int, node.args[1])], name)


def _add_steps(view: nx.DiGraph, call: Node, names: Mapping[Node, str], chains: Mapping[str, ChainGraphs]) -> list[str]:
    """Add what is inside of a momentum call; return the names of what it returns: end state, taps, side outputs."""
    graphs = chains[str(call.target)]
    starts, captures, *_ = cast(tuple[Any, ...], call.args)
    states = [[names[start] for start in starts]]
    values = [names[capture] for capture in captures]
    for number, step in enumerate(graphs.steps):
        facts = {"chain": graphs.name, "step": number}
        inputs, before, after = step.branch.find_nodes(op="placeholder"), states[-1], list(states[-1])
        read = [*(before[stream] for stream in step.reads), *(values[i] for i in step.captures)]
        inner = dict(zip(inputs, read, strict=True))
        _add_nodes(view, step.branch, inner, chains, f"{names[call]}.{number}.", {}, {**facts, "role": "branch"})
        (output,) = step.branch.find_nodes(op="output")
        results = cast(tuple[Node, ...], output.args[0])
        for stream, branch, path in zip(step.writes, results, step.paths or (step.path,), strict=False):
            name = f"{names[call]}.{number}" + (f".{graphs.streams[stream]}" if len(graphs.streams) > 1 else "")
            own = {**facts, "role": "sum"} if len(graphs.streams) == 1 else {**facts, "role": "sum", "stream": stream}
            view.add_node(name, op="momentum_step", target="", module=path, **own)
            view.add_edges_from(((before[stream], name), (inner[branch], name)))
            after[stream] = name
        states.append(after)
        values += [inner[side] for side in results[len(step.writes) :]]
    view.add_edges_from((end, names[call]) for end in states[-1])
    return [*states[-1], *(states[t][stream] for t, stream in graphs.taps), *values[len(captures) :]]


def _facts(node: Node) -> dict[str, str]:
    facts = {"op": node.op, "target": _name_of(node.target), "module": enclosing_path(node)}
    value: Any = next((node.meta[key] for key in ("val", "example_value", "tensor_meta") if key in node.meta), None)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        facts["shape"] = str(tuple(value.shape))
        facts["dtype"] = str(value.dtype).removeprefix("torch.")
    return facts


def _name_of(target: Any) -> str:
    """Return a target as text: a function by the name that it is found under in torch, or by that of its module."""
    if isinstance(target, str):
        return target
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", repr(target))
    return resolve_name(target) or f"{module}.{name}".strip("._")
