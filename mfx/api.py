"""The public functions that make a momentumized net and show its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from mfx.capture.arguments import bind_defaults, check_signature
from mfx.capture.captured import signature_of
from mfx.capture.decisions import Guesses
from mfx.capture.symbolic.trace import capture as capture_symbolically
from mfx.compat import compiled_model
from mfx.compiler.compiled_graphs import named_graphs
from mfx.modules.tree_copy import M, net_of
from mfx.net.build import build_net
from mfx.net.forward import forward_of
from mfx.options.options import Given, Options
from mfx.program.chain_call import holds_chain
from mfx.program.networkx_view import view_of
from mfx.text import described
from mfx_passes import MfxError

if TYPE_CHECKING:
    import networkx as nx


def momentumize(
    model: M,
    *,
    gamma: Given | Mapping[str, Given] = 0.9,
    velocity: str | nn.Module | Mapping[str, nn.Module] = "zero",
    arithmetic: str = "exact",
    memory_budget: float | str = 0.0,
    recompute: str | None = None,
    offload: str | None = None,
    min_steps: int = 2,
    only: str | Sequence[str | Sequence[str]] | None = None,
    skip: str | Sequence[str] | None = None,
    capture: str = "auto",
    example_inputs: Any = None,
    verify: str = "warn",
) -> M:
    """Return the same model with every chain of residual adds x + f(x) turned into reversible momentum steps.

    A chain computes v ← γ·v + (1−γ)·f(x), x ← x + v (Sander, Ablin, Blondel, Peyré, "Momentum Residual Neural
    Networks", ICML 2021). Its backward pass rebuilds its activations instead of storing them. For γ > 0 this is
    *another function* of the same weights; at γ = 0 it is the model itself.

    Args:
        model: any module; it stays as it is. A ``GraphModule`` gives a ``GraphModule``; a momentumized net is rewritten
            anew, from the function of its class.
        gamma: momentum, 0 <= γ < 1, for all chains or by chain name (shell patterns allowed). An `mfx.BDIA` has a γ of
            mean 0 in training and the model itself in evaluation. ``"auto"``: 0.9 for chains of 12 updates or more, 0
            for shorter ones, decided when a chain is first found.
        velocity: v before the first step: ``"zero"``; ``"residual"``, such that the first step adds f(x) in full; or a
            module (or a mapping from chain names, shell patterns allowed, to modules; zero for the others) that
            computes it from x. These very modules, not copies, live under ``velocity.``, once per chain.
        arithmetic: ``"exact"``: rebuilt activations are the forward pass's, bit for bit, by fixed point; chains whose
            inputs take no more than that keep these and compute in floating point, at every budget. ``"float"``: within
            6e-6 relative in float32, less memory in short chains.
        memory_budget: share of the chains' activations that is kept for the backward pass; the function is the same.
            0.0 keeps none (m₀ bytes), 1.0 all (m₁ bytes, ordinary backpropagation), b in between at most
            m₀ + b·(m₁ − m₀) bytes: those of the steps that save the most FLOPs per byte. Or a number of bytes above 1,
            such as ``"24GiB"``, for the peak of activations from the net's call until its backward pass is done,
            gradients of parameters left out. It holds from the third training step on inputs of a shape on. The first
            two keep as little as they can, and are measured; if that is more, the third raises an error.
        recompute: None: beside the steps of the chains, blocks like theirs that are in no chain (with a projection,
            without a skip, alone) are recomputed in the backward pass; ``"all"``: all that lies between the chains
            (stem, downsampling, head) is, in pieces, within the same budget.
        offload: ``"cpu"``: what the chains keep between forward and backward (steps' inputs at γ = 0, end states and
            anchors) lies in host memory, and is fetched one step ahead; None: on the chains' device. Small tensors and
            those that others hold stay. The function is the same.
        min_steps: chains with fewer steps stay as they were.
        only: chain names or module paths (shell patterns) to rewrite, all others stay as they were. A list of them in
            the list names steps that are in no chain with others.
        skip: chain names or module paths (shell patterns) to leave as they were.
        capture: ``"symbolic"``: by symbolic tracing; ``"dynamo"``: by TorchDynamo, which captures the first call and
            later ones that differ in what the graph depends on; ``"auto"``: symbolic tracing if it works, else Dynamo.
            A call that cannot be captured in the way asked for by name is an error; at γ = 0 it runs in parts, with a
            warning.
        example_inputs: arguments of a call to capture at once instead of at the first call: one input, a tuple of
            inputs, or a mapping from argument names to inputs; or a list of tuples and mappings, one per call.
            Nothing is computed with them.
        verify: ``"warn"``, ``"raise"`` or ``"off"``: the reaction when the backward pass in exact arithmetic does not
            arrive where the forward pass began, because a step did not compute the same values twice.

    Returns:
        A model of the same class that shares all parameters and buffers with ``model``, with the same ``state_dict``
        keys. Operations that move or cast parameters in place, such as ``.to()``, therefore change both. Without any
        chain, ``model`` itself, and a warning.

    Raises:
        MfxError: an option is wrong, or the model cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"momentumize takes a torch.nn.Module, not {described(model)}.")
    options = Options(
        gamma,
        velocity,
        arithmetic,
        memory_budget,
        recompute,
        offload,
        min_steps,
        only,
        skip,
        capture,
        example_inputs,
        verify,
    )
    return build_net(model, options)


def trace(model: nn.Module) -> fx.GraphModule:
    """Return a model's forward pass as a graph, traced by mfx's symbolic tracer.

    Arguments without a default value are the graph's inputs; the others are fixed to their default. Conditions on the
    values of tensors count as False; the graph checks as it runs that they are.

    Args:
        model: any module that can be traced, in the training mode that the graph is for.

    Raises:
        MfxError: it cannot be traced, or the trace would hold for one run only.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"trace takes a torch.nn.Module, not {described(model)}.")
    root = net_of(model)
    signature = signature_of(root)
    check_signature(root, signature)
    captured = capture_symbolically(root, bind_defaults(signature), None, holds_chain, guesses=Guesses())
    root._modules.update(captured.modules)
    return fx.GraphModule(root, captured.graph, class_name=type(model).__name__)


@contextmanager
def original(net: nn.Module) -> Iterator[nn.Module]:
    """Run a momentumized net as the original model, on the same weights, within this context.

    Args:
        net: a momentumized net, or a module that contains some.

    Raises:
        MfxError: it contains no momentumized net.
    """
    if not isinstance(net, nn.Module):
        raise MfxError(f"original takes a momentumized net, not {described(net)}.")
    forwards = [forward for module in net.modules() if (forward := forward_of(module))]
    if not forwards:
        raise MfxError(f"{type(net).__name__} has not been momentumized, so there is no other function to go back to.")
    for forward in forwards:
        forward.bypassed += 1
    try:
        yield net
    finally:
        for forward in forwards:
            forward.bypassed -= 1


def graphs(net: nn.Module) -> dict[str, fx.GraphModule]:
    """Return the rewritten graphs that a net has needed so far.

    Args:
        net: a momentumized net, or the result of ``torch.compile(model, backend="mfx")``.

    Returns:
        One module per graph, over the net's own modules: ``"train"``, ``"eval"``, and ``"train#2"`` and so on for other
        values of arguments that are not tensors, and where submodules are in another mode than the rest.

    Raises:
        MfxError: the net has not been momentumized.
    """
    if not isinstance(net, nn.Module):
        raise MfxError(f"graphs takes a momentumized net, not {described(net)}.")
    model = compiled_model(net)
    if model is not None:
        return named_graphs(model) if forward_of(model) is None else graphs(model)
    forward = forward_of(net)
    if forward is not None:
        return forward.graphs()
    if isinstance(net, fx.GraphModule):
        return {"train" if net.training else "eval": net}
    raise MfxError(f"{type(net).__name__} has not been momentumized; call mfx.momentumize(model) first.")


def to_networkx(net: nn.Module) -> nx.DiGraph:
    """Return the rewritten graphs of a net as a ``networkx.DiGraph``, for queries of one's own and for GraphML.

    Nodes are those of the graphs of `mfx.graphs`, edges their data flow. A chain is one node with the role
    ``"momentum call"``, behind what it runs: the nodes of its branches and, as ``CALL.0``, ``CALL.1`` and so on, the
    states in which its steps end. The attributes of nodes are those of `mfx_passes.to_networkx`, text and integers
    only, and ``graph``, the name of their graph in `mfx.graphs`.

    Args:
        net: a momentumized net, or the result of ``torch.compile(model, backend="mfx")``. Where it has several graphs
            so far, their nodes are called ``"train: NAME"``, ``"eval: NAME"`` and so on; of one graph alone:
            ``to_networkx(mfx.graphs(net)["train"])``.

    Returns:
        An acyclic graph, without nodes if no graph was needed so far.

    Raises:
        MfxError: the net has not been momentumized.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import mfx
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = x + layer(x)
        ...         return x
        >>> view = mfx.to_networkx(mfx.momentumize(Net(), example_inputs=torch.zeros(1, 4)))
        >>> [(name, facts["step"]) for name, facts in view.nodes.items() if facts.get("role") == "sum"]
        [('momentum_layers.0', 0), ('momentum_layers.1', 1)]
        >>> sorted(view.successors("momentum_layers.0"))
        ['momentum_layers.1', 'momentum_layers.1.layers_1']
    """
    import networkx as nx

    found = graphs(net)
    whole = nx.DiGraph()
    for title, module in found.items():
        view = view_of(module)
        nx.set_node_attributes(view, title, "graph")
        whole.update(nx.relabel_nodes(view, {name: f"{title}: {name}" for name in view}) if len(found) > 1 else view)
    return whole
