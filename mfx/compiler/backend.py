"""The torch.compile backend "mfx": Dynamo's graph with its chains rewritten, compiled by another backend."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from types import CodeType
from typing import Any

from torch import fx, nn

from mfx.capture.binding import ByName
from mfx.capture.captured import Captured
from mfx.capture.dynamo.graph import tidy
from mfx.capture.dynamo.sources import is_held_by_module, model_in, module_path
from mfx.compat import compiling as compat_compiling
from mfx.compat import dynamo as compat_dynamo
from mfx.compat.given_up import when_given_up
from mfx.compiler.call_site import calls_a_net
from mfx.compiler.compiled_graphs import CompiledGraph
from mfx.compiler.holders import Holders
from mfx.options.options import OF_GRAPHS, Options
from mfx.program.assembly import Assembly
from mfx.program.codegen import BackendCompiler, to_function
from mfx.program.memory_plans import NetPlans, call_key
from mfx.program.rewriting import rewrite_captured
from mfx.program.rewritten import RewrittenGraph
from mfx.program.scope import Scope
from mfx.program.watched_step import WatchedStep
from mfx.text import without_chains
from mfx_passes import MfxError
from mfx_passes.ir import is_momentum_call, momentum_chain
from mfx_passes.rewrite.portable_graph import copy_graph


def momentum(
    module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph after its chains have been rewritten: ``torch.compile(model, backend="mfx", options={...})``.

    Args:
        module: Dynamo's graph.
        inputs: the values of its inputs.
        mode: the inner backend's; see `torch.compile`, which takes no mode beside options: there it is ``inner_mode``.
        options: options of `mfx.momentumize` by name; ``inner``, the backend that compiles the rewritten graph, the
            steps' branches and the segments around the chains: ``"inductor"`` (default), ``"eager"``, ``"aot_eager"``
            or any other, by name or as a callable; and ``inner_mode`` or ``inner_options``, `torch.compile`'s ``mode``
            and ``options`` for that one.

    Raises:
        MfxError: an option is unknown or wrong; at γ > 0, if a chain is cut by a graph break, or Dynamo is about to
            give up compiling anew and to run the model as it was.
    """
    given = _as_dict(options)
    compiler = _compiler(given, mode)
    checked = _options(given)
    if checked.may_change_function:
        _refuse_the_last_recompilation()
    sources = compat_dynamo.sources(module.graph)
    compiled = compat_compiling.compiled_module()
    model = model_in(sources, None if compiled is None else compiled[0])
    paths = _paths(sources, model)
    holders = Holders(paths)
    holder = holders.of(inputs)
    rewritten, positions = _rewrite(module, paths, model, holder, checked)
    _settle_signs(rewritten, module.graph, model)
    if checked.may_change_function:
        _refuse_fused_layers(rewritten)
        _refuse_cut_chains(module, rewritten)
    if not rewritten.calls:
        _warn_idle(module, given)
    if not rewritten.captured.partial:
        checked.check_chains(rewritten.chain_lengths)
    function = Assembly(
        rewritten.graph,
        rewritten.calls,
        compiler,
        recompute_between=rewritten.recompute_between,
        verify=rewritten.verify,
    )
    plans = NetPlans(checked.budget)
    is_planned = checked.plans or (rewritten.nests and checked.budget.share != 1.0)
    mode = compat_compiling.mode_of_compiled()
    holders.register(lambda net: CompiledGraph(rewritten, net, checked, mode))

    def run(*values: Any) -> Any:
        holder = Scope(rewritten.captured.modules, holders.of(values))
        taken = [values[position] for position in positions]
        watched = partial(WatchedStep, modules=[holders.of(values)])
        with plans.forward_pass(call_key(taken), watched) if is_planned else nullcontext():
            return function(holder, *taken)

    return run


def _as_dict(options: object) -> dict[str, Any]:
    if not isinstance(options, Mapping | None):
        raise MfxError(f"options must be a dictionary such as {{'gamma': 0.9, 'inner': 'eager'}}, not {options!r}.")
    return dict(options or {})


def _compiler(options: dict[str, Any], mode: str | None) -> Callable[[fx.Graph], Callable[..., Any]]:
    inner, inner_options = options.pop("inner", "inductor"), options.pop("inner_options", None)
    mode = options.pop("inner_mode", mode)
    if inner == "mfx" or inner is momentum:
        raise MfxError("inner='mfx': the inner backend compiles what mfx has rewritten; use 'inductor' or another one.")
    if not callable(inner) and inner not in compat_compiling.backends(hidden=True):
        raise MfxError(
            f"inner={inner!r}: no torch.compile backend has this name. There are "
            f"{', '.join(compat_compiling.backends())}; or pass a callable."
        )
    if inner_options is not None and not isinstance(inner_options, Mapping):
        raise MfxError(f"inner_options must be a dictionary, the inner backend's options, not {inner_options!r}.")
    if inner_options is not None and mode is not None:
        raise MfxError(
            f"torch.compile takes a mode or options: give inner_mode={mode!r} or inner_options={inner_options!r}."
        )
    if inner == "eager":
        return to_function
    settings = {"mode": mode, "options": inner_options}
    return BackendCompiler(inner, **{name: value for name, value in settings.items() if value is not None})


def _options(options: dict[str, Any]) -> Options:
    unknown = sorted(set(options) - set(OF_GRAPHS))
    if unknown:
        raise MfxError(
            f"options of the backend 'mfx': {', '.join(unknown)} unknown. There are inner, inner_mode, "
            f"inner_options, {', '.join(OF_GRAPHS)}."
        )
    checked = Options(**options)
    if not isinstance(checked.velocity, str):
        raise MfxError("velocity modules need the model itself: use mfx.momentumize, or velocity='zero' or 'residual'.")
    return checked


def _paths(sources: Sequence[str], model: str) -> list[str | None]:
    """Return the path to read each input of a graph by; None for what stays an input."""
    paths: list[str | None] = []
    for source in sources:
        path = ".".join(module_path(source, model)) if is_held_by_module(source) else None
        paths.append(None if path in paths else path)  # a module may have the name of another's submodule
    return paths


def _rewrite(
    module: fx.GraphModule, paths: Sequence[str | None], model: str, holder: nn.Module, options: Options
) -> tuple[RewrittenGraph, tuple[int, ...]]:
    """Return the rewritten graph, and the positions of the inputs that it takes."""
    partial = compat_compiling.is_broken_off(module) or compat_compiling.is_resumed()
    module = _copy(module)  # Dynamo reads its own later
    modules, positions = tidy(module, paths, lambda key, source: ".".join(module_path(source, model)))
    values = {node.name: node.meta["val"] for node in module.graph.nodes if "val" in node.meta}
    names = tuple(node.name for node in module.graph.find_nodes(op="placeholder"))
    captured = Captured(copy_graph(module.graph), [], {}, ByName(names, {}), modules, values, partial=partial)
    return rewrite_captured(holder, captured, options, {}), positions


def _settle_signs(rewritten: RewrittenGraph, graph: fx.Graph, model: str) -> None:
    """Set γ of chains with signs to 0 if their steps are in evaluation now, and have Dynamo guard on that.

    Dynamo itself guards on a training flag only where a model reads it.

    Raises:
        MfxError: the module that owns the steps is not known.
    """
    for call in rewritten.calls.values():
        if not call.gamma.has_signs:
            continue
        owner = tuple(filter(None, call.owner.split(".")))
        source = next((s for s in compat_dynamo.module_sources(graph) if _path_of(s, model) == owner), None)
        if source is None and not owner:
            source = compat_compiling.source_of_compiled()
        if source is None:
            raise MfxError(
                f"chain {call.chain}: gamma=mfx.BDIA(...) needs the training flag of the module that owns its steps, "
                "and torch.compile has not read any parameter in it by which it would be known. Compile the module "
                "itself, not a function, or use mfx.momentumize."
            )
        if not compat_compiling.guarded_training(source):
            call.gamma = call.gamma.in_evaluation


def _path_of(source: Any, model: str) -> tuple[str, ...] | None:
    """Return the path from the model to a module's source; None if it is not inside."""
    name = compat_dynamo.name_of(source)
    return module_path(name, model) if name.startswith(model) else None


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return fx.GraphModule(module, graph)


def _refuse_cut_chains(module: fx.GraphModule, rewritten: RewrittenGraph) -> None:
    """Raise if a graph break cuts a chain: its velocity would start again at zero, which is another function."""
    broken, resumed = compat_compiling.is_broken_off(module), compat_compiling.is_resumed()
    for node in filter(is_momentum_call, rewritten.graph.nodes):  # none within a branch, which no break cuts
        if rewritten.calls[str(node.target)].gamma.is_zero:
            continue
        starts_at_break = resumed and any(source.op == "placeholder" for source in node.all_input_nodes[:1])
        ends_at_break = broken and any(user.op == "output" for user in _readers_of_end(node))
        if starts_at_break or ends_at_break:
            raise MfxError(
                f"the chain {momentum_chain(node)} is cut by a graph break of torch.compile, where its velocity "
                "would be lost. Compile with fullgraph=True to see what breaks the graph, or use mfx.momentumize."
            )


def _refuse_fused_layers(rewritten: RewrittenGraph) -> None:
    """Raise if a transformer layer is the fused kernel for inference, in which no residual add can be found."""
    if rewritten.captured.graph.find_nodes(op="call_function", target=compat_dynamo.FUSED_LAYER):
        raise MfxError(
            "nn.TransformerEncoderLayer runs as one fused operation without gradients, so its residual adds cannot be "
            "found, and the network would be another one than in training. Call "
            "torch.backends.mha.set_fastpath_enabled(False) first, or use mfx.momentumize."
        )


def _readers_of_end(call: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the end state of a chain, directly or as the first of several values."""
    firsts = [user for user in call.users if user.target is operator.getitem and user.args[1] == 0]
    return [user for node in (call, *firsts) for user in node.users]


def _refuse_the_last_recompilation() -> None:
    """Raise before Dynamo reaches its limit of graphs and runs the model as written, which is another function."""
    if compat_compiling.recompilations_left() < 1:
        raise MfxError(
            "torch.compile has made as many graphs of this function as it will; at the next one it would run the model "
            "without mfx. Raise torch._dynamo.config.recompile_limit, or compile with dynamic=True."
        )


def _warn_idle(module: fx.GraphModule, given: Mapping[str, Any]) -> None:
    if not calls_a_net(module.graph):
        warnings.warn(f"mfx: {without_chains(module, 'is returned unchanged')}", stacklevel=3)
    elif given:
        message = (
            f"mfx: {', '.join(given)}: no effect, for there are no chains to rewrite beside those of a net that was "
            "momentumized before, which keeps its own options. Give them to mfx.momentumize."
        )
        warnings.warn(message, stacklevel=3)


def _warn_given_up(code: CodeType, reason: str) -> None:
    """Warn of a function that Dynamo runs as written: without mfx it is another function if it holds a chain."""
    message = (
        f"mfx: torch.compile has given up on {code.co_name} ({code.co_filename}:{code.co_firstlineno}) and runs it as "
        f"it is written, so no residual adds in it are rewritten ({reason}). Compile with fullgraph=True to have this "
        "as an error that shows the line, or use mfx.momentumize."
    )
    warnings.warn(message, stacklevel=2)


when_given_up(momentum, _warn_given_up)
