"""Capture a model by symbolic tracing."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.binding import ByName
from mfx.capture.captured import Captured, CaptureError, Effect, RaisedError
from mfx.capture.decisions import Guesses
from mfx.capture.guards import guards_of_tensors, guards_of_ties
from mfx.capture.named_steps import NamedStepModules
from mfx.capture.symbolic.call_values import CallValues
from mfx.capture.symbolic.classes import is_of_trace
from mfx.capture.symbolic.dependences import Dependences
from mfx.capture.symbolic.effects import Changes
from mfx.capture.symbolic.identity import refuse_identity_checks, refuse_unseen_code
from mfx.capture.symbolic.leaves import Leaves
from mfx.capture.symbolic.made_tensors import make_anew
from mfx.capture.symbolic.outside_values import OutsideValues, with_callees
from mfx.capture.symbolic.refusals import UntraceableError
from mfx.capture.symbolic.sizes_taken import sizes_taken
from mfx.capture.symbolic.tracer import SymbolicTracer
from mfx.capture.symbolic.user_code import is_interrupt, is_own_fault, is_raised_by_user, own_fault, said_by
from mfx.modules.buffers import storage_of
from mfx.modules.random_state import undisturbed
from mfx.modules.references import mentioned_in
from mfx.modules.restore import tensors_restored
from mfx_passes import MfxError
from mfx_passes.analysis.ancestry import GraphIndex
from mfx_passes.analysis.mutations import Mutations
from mfx_passes.paths import resolve
from mfx_passes.rewrite.portable_graph import copy_graph, dump_calls, load_calls

R = TypeVar("R")

_READS = frozenset(
    {
        torch.Tensor.item,
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.Tensor.__bool__,
        torch.Tensor.__int__,
        torch.Tensor.__float__,
        torch.Tensor.__index__,
    }
)
_MAKES = frozenset({torch.tensor, torch.zeros, torch.ones, torch.full, torch.arange, torch.linspace, torch.eye})
_ADVICE = "Rewrite that line, momentumize the part of the model that can be traced, or leave this model as it is."


def capture(
    model: nn.Module,
    binding: ByName,
    steps: NamedStepModules | None = None,
    is_leaf: Callable[[nn.Module], bool] = lambda module: False,
    leaves: Leaves | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    guesses: Guesses | None = None,
) -> Captured:
    """Trace a model symbolically.

    With ``inputs``, a submodule in which the trace fails is called as a whole, and where the model uses sizes as
    numbers, they are those of the inputs. With ``guesses``, the graph is for one path through the model, and checks as
    it runs that its conditions have the values of that path.

    Args:
        model: the model, in the training mode that the graph is for; it is left as it was.
        binding: which arguments are tensors, and the values of the others.
        steps: modules that are steps as a whole.
        is_leaf: True for other modules that are called as a whole.
        leaves: submodules that are known to become leaves; those that do now are added.
        inputs: the tensors of the call that the graph is for; None if it is for any call.
        guesses: the values to take for conditions on tensors; None if the model must not have any.

    Raises:
        CaptureError: it cannot be traced, or the trace would hold for this one run only.
        RaisedError: the model raises an error on the path that a call takes.
    """
    leaves = Leaves(allowed=False) if leaves is None else leaves
    changes = Changes(model, binding.constants, _refuse_hooks_of_its_own)
    namespaces = {id(function.__globals__): function.__globals__ for function in changes.functions}

    def tracer() -> SymbolicTracer:
        values = None if inputs is None else CallValues(model, inputs)
        whole, files = steps.modules if steps else (), namespaces.values()
        return SymbolicTracer(binding.inputs, binding.constants, whole, is_leaf, leaves, values, guesses, files)

    with tensors_restored(model) as replaced, undisturbed(model) as drawn, compat.plain_transformer_layers():
        last, graph = _traced(model, tracer, changes.trace, guesses, namespaces)
        effects: list[Effect] = []
        if changes and not leaves.grew:
            last, (graph, effects) = _traced(model, tracer, changes.trace_again, guesses, namespaces)
        effects += [Effect("", f"a {kind} outside of the model", is_own=False) for kind in last.leftovers.found]
    _refuse_state_that_changed(model, replaced, drawn)
    called = {str(node.target): model.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")}
    calls = make_anew(graph, last.calls, last.constants, changes.tensors, called)
    if last.values is not None:
        last.values.find(graph)
    if steps is not None:
        steps.mark(graph)
    kept = copy_graph(graph)
    _refuse_changed_constants(model, kept, called, last)
    depends = last.depends
    refuse_unseen_code(model, depends.codes, namespaces)
    functions = _functions_beside(depends, changes)
    refuse_identity_checks(model, with_callees(depends.codes, functions), depends.never_traced)
    outside = OutsideValues(depends.codes, functions)
    binding = replace(binding, asked=depends.answers, looked_at=depends.kinds, outside=outside)
    values, whole = last.values, {path: leaves.reasons[module] for path, module in called.items() if module in leaves}
    if values is not None:
        sizes = sizes_taken(model, graph, values, exactly=bool(whole))
        binding = binding.for_inputs(values.inputs, sizes, values.lacking)
    return Captured(
        kept,
        load_calls(dump_calls(calls), kept),
        last.walked,
        binding,
        modules={last.constants.name: last.constants} if last.constants else {},
        guards={
            last.constants.name: guards_of_tensors(
                model, last.depends.used.values(), last.constants.values, changes.assigned
            ),
            **guards_of_ties(model, {str(node.target) for node in kept.find_nodes(op="get_attr")}, changes.assigned),
        },
        values={} if values is None else values.tensors(graph),
        leaves=whole,
        effects=effects,
        assigned=changes.assigned,
        names=mentioned_in({*depends.codes, *(function.__code__ for function in functions)}),
        decisions=tuple(last.path.decisions),
    )


def _functions_beside(depends: Dependences, changes: Changes) -> list[FunctionType]:
    """Return the functions that may have run, in the files of code that has: others are named alike by chance."""
    files = {namespace.get("__name__") for namespace in depends.codes.values()}
    return [function for function in changes.functions if function.__module__ in files]


def _refuse_state_that_changed(model: nn.Module, replaced: Sequence[str], drawn: Sequence[str]) -> None:
    if replaced:
        raise CaptureError(
            f"{type(model).__name__} replaces or makes buffers, parameters or modules while it runs "
            f"({', '.join(dict.fromkeys(replaced))}), which a symbolic trace cannot follow. Change them in "
            "place (copy_, mul_, add_), and make them before."
        )
    if drawn:
        raise CaptureError(
            f"{type(model).__name__} draws random numbers ({', '.join(drawn)}) outside of its layers while it runs, to "
            "decide what to compute (layer drop, for example): a graph would repeat this one decision for ever. "
            f"{_ADVICE}"
        )


def _refuse_changed_constants(
    model: nn.Module, graph: fx.Graph, called: Mapping[str, nn.Module], tracer: SymbolicTracer
) -> None:
    """Refuse a graph that changes a tensor of which the trace has computed constants: they would be its first ones."""
    if not tracer.depends.used:
        return
    index, prefix = GraphIndex(graph, called), f"{tracer.constants.name}."
    for mutation in Mutations(index).at(index.nodes):
        for node in mutation.family:
            path = str(node.target)
            root = tracer.constants if path.startswith(prefix) else model
            if node.op == "get_attr" and id(resolve(root, path.removeprefix(prefix))) in tracer.depends.used:
                raise CaptureError(
                    f"{type(model).__name__} changes a tensor in place ({mutation.node.name}) that is neither a "
                    f"parameter nor a buffer, and computes with it. {_ADVICE}"
                )


def _traced(
    model: nn.Module,
    make_tracer: Callable[[], SymbolicTracer],
    trace: Callable[[SymbolicTracer], R],
    guesses: Guesses | None,
    namespaces: dict[int, dict[str, Any]],
) -> tuple[SymbolicTracer, R]:
    """Return a trace, and its tracer: the first one that is not led to an error of the model's own by a guess.

    Nor is it one in which code has run whose namespace is missing among those that a tracer searches; it is added.
    """
    while True:
        tracer, failed = make_tracer(), True
        try:
            with compat.dynamo_rules_kept(), _ValuesRead(tracer):
                result = trace(tracer)
            failed = False
            if not (missing := tracer.depends.files.keys() - namespaces.keys()):
                return tracer, result
            namespaces |= {key: tracer.depends.files[key] for key in missing}
        except MfxError:
            raise
        except BaseException as error:
            if is_interrupt(error):
                raise
            if is_own_fault(error):
                raise own_fault(error, model) from error
            said = said_by(error, model)
            _clear_frames(error)
            if guesses is not None and tracer.path.is_misled_by(error):
                guesses.change(tracer.path.decisions)
                continue
            if guesses is not None and guesses.are_told(tracer.path.decisions) and is_raised_by_user(error):
                raise RaisedError(f"{type(model).__name__} raises an error: {said}") from error
            raise CaptureError(f"{type(model).__name__} cannot be traced symbolically: {said}. {_ADVICE}") from error
        finally:
            tracer.leftovers.take_away(failed=failed)


def _clear_frames(error: BaseException | None) -> None:
    """Drop the local variables of the frames that an error came through: traced values are among them."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class _ValuesRead(TorchFunctionMode):
    """Refuses what reads values, but of tensors made of plain numbers, and notes what constants of a graph are made of.

    These are tensors that were there before.
    """

    def __init__(self, tracer: SymbolicTracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._made: dict[int, Tensor] = {}
        self._of_numbers: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and not isinstance(args[0], fx.Proxy) and id(args[0]) not in self._of_numbers:
            self._tracer.refusals.refuse(
                UntraceableError("it reads the value of a tensor while it runs; a graph would hold for this value only")
            )
        if not is_of_trace(sys._getframe(1)):
            self._look(func, args, kwargs)
        try:
            result = func(*args, **(kwargs or {}))
        except Exception as error:
            trace = error.__traceback__
            if trace is None or trace.tb_next is not None:
                raise
            raise error.with_traceback(None) from error.__cause__  # an operation has no frame of its own
        if isinstance(result, Tensor):
            self._note(result, *args)
            if self._is_made_of_numbers(func, pytree.tree_leaves((args, kwargs))):
                self._of_numbers[id(result)] = result
        elif isinstance(result, tuple | list) and all(isinstance(part, Tensor) for part in result):
            for part in result:
                self._note(part, *args)
        return result

    def _look(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what the model's code looks at; refuse constants of what the graph changes: that is not in them yet."""
        if getattr(func, "__name__", "") == "__set__":
            self._tracer.refusals.refuse(UntraceableError("it sets an attribute of a tensor (data, for example)"))
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(value, fx.Proxy) for value in given):
            return
        tensors = [value for value in given if isinstance(value, Tensor)]
        for tensor in tensors:
            self._tracer.look_at(tensor)
        if not self._tracer.written.isdisjoint(map(storage_of, tensors)):
            what = "it reads a tensor that it makes and writes traced values into"
            self._tracer.refusals.refuse(UntraceableError(what))

    def _note(self, result: Tensor, *values: Any) -> None:
        given = [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]
        for value in given:
            if id(value) not in self._made:
                self._tracer.refuse_view(value)
                self._tracer.depends.used[id(value)] = value
        self._made[id(result)] = result

    def _is_made_of_numbers(self, func: Any, leaves: list[Any]) -> bool:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        known = all(id(tensor) in self._of_numbers for tensor in tensors)
        return known and (bool(tensors) or func in _MAKES) and all(map(_is_plain, leaves))


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout))


def _refuse_hooks_of_its_own(model: nn.Module) -> None:
    if noted := _with_hooks_of_its_own(model):  # after the trace: a forward may have registered them
        raise CaptureError(
            f"{type(model).__name__} has forward hooks of its own on {', '.join(noted)}; its forward may read what "
            "they note, and a symbolic trace does not run them. Put the wrapper that has the hooks around the net."
        )


def _with_hooks_of_its_own(model: nn.Module) -> list[str]:
    """Return the paths of modules with forward hooks that are methods of a model's modules, or of their attributes."""
    modules = list(model.modules())
    held = {id(module) for module in modules} | {id(value) for module in modules for value in module.__dict__.values()}
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        for table in compat.forward_hook_tables(module)
        for hook in table.values()
        if (instance := _self_of(hook)) is not None and id(instance) in held
    ]


def _self_of(hook: Any) -> object:
    """Return the object whose method a hook is."""
    while isinstance(hook, partial):
        hook = hook.func
    return getattr(hook, "__self__", None)
