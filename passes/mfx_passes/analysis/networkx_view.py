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
            ends is ``momentum_blocks.t``, a node of the op ``"momentum_step"`` and the role ``"sum"``.

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
        roles.setdefault(chain.start, {"chain": chain.name, "step": 0, "role": "skip"})
        for number, step in enumerate(chain.steps):
            role = {
                **dict.fromkeys(step.nodes, "branch"),
                **dict.fromkeys(step.nodes.intersection(step.add.skip_path), "skip"),
                **dict.fromkeys(_tail(step), "tail"),
                **dict.fromkeys(step.add.sums, "sum"),
            }
            roles.update((node, {"chain": chain.name, "step": number, "role": role[node]}) for node in role)
    return roles


def _tail(step: Step) -> set[Node]:
    """Return what a step computes from its sum."""
    tail: set[Node] = set()
    for node in sorted(step.nodes - step.add.sums):
        if any(source is step.add.node or source in tail for source in node.all_input_nodes):
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
    start, captures, *_ = cast(tuple[Any, ...], call.args)
    states, values = [names[start]], [names[capture] for capture in captures]
    for number, step in enumerate(graphs.steps):
        name = f"{names[call]}.{number}"
        facts = {"chain": graphs.name, "step": number}
        x, *others = step.branch.find_nodes(op="placeholder")
        inner = {x: states[-1], **{node: values[i] for node, i in zip(others, step.captures, strict=True)}}
        _add_nodes(view, step.branch, inner, chains, f"{name}.", {}, {**facts, "role": "branch"})
        (output,) = step.branch.find_nodes(op="output")
        branch, *sides = cast(tuple[Node, ...], output.args[0])
        view.add_node(name, op="momentum_step", target="", module=step.path, **facts, role="sum")
        view.add_edges_from(((states[-1], name), (inner[branch], name)))
        states.append(name)
        values += [inner[side] for side in sides]
    view.add_edge(states[-1], names[call])
    return [states[-1], *(states[t] for t in graphs.taps), *values[len(captures) :]]


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
