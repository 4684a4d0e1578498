"""Capture one call of a model by TorchDynamo, where symbolic tracing cannot follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import chain
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx.capture.arguments import bind
from mfx.capture.binding import NotPlainError
from mfx.capture.captured import Captured, CaptureError, RaisedError, signature_of
from mfx.capture.class_guards import ClassGuard, guards_of_classes
from mfx.capture.dynamo.first_call import own_error, run_first_call, settle
from mfx.capture.dynamo.graph import tidy
from mfx.capture.dynamo.sources import is_held_by_module, module_path
from mfx.compat.dynamo import DynamoCapture, sources, trace_call
from mfx.compat.dynamo_errors import has_given_up, is_raised_by_model
from mfx.modules.overlay import Overlay
from mfx.modules.python_state import state_of
from mfx.modules.references import mentioned_in, stored_in
from mfx_passes.ops.step_markers import called
from mfx_passes.rewrite.portable_graph import copy_graph

torch.compiler.allow_in_graph(called)


_Seen = TypeVar("_Seen")
_ADVICE = "Rewrite that line, or momentumize a part of the model that does without it."


class GuardedCall:
    """The binding of a graph that Dynamo captured: its guards, and the bytecode that runs the call around the graph.

    The guards are on shapes, dtypes, values of arguments that are not tensors, attributes and hooks of modules, grad
    and autocast mode.

    Args:
        seen: the call as Dynamo saw it.
        forward: the function that was called; its first argument is the model.
        positions: the positions, among the inputs of Dynamo's graph, of the inputs of the captured graph.
        modules: the modules of the model.
        key: the key of the call's arguments, as a symbolic trace would bind them; None if it would not.
        classes: guards on classes, of which Dynamo guards only what it has found where it has found it.
    """

    guards_modules = True

    def __init__(
        self,
        seen: DynamoCapture,
        forward: FunctionType,
        positions: tuple[int, ...],
        modules: Iterable[nn.Module],
        key: Hashable | None,
        classes: Sequence[ClassGuard] = (),
    ) -> None:
        self.key = key
        self._seen = seen
        self._replaced = {id(module) for module in modules if _has_forward(module)}
        self._forward = forward
        self._signature = inspect.signature(forward, follow_wrapped=False)
        self.positions = positions
        self._classes = classes

    def holds(self, net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """True if the graph is the one for this call."""
        if torch.compiler.is_exporting():
            return False  # guards do not hold for tensors without values
        if not all(guard.holds() for guard in self._classes):
            return False
        if any(_has_forward(module) and id(module) not in self._replaced for module in net.modules()):
            return False
        try:
            bound = self._signature.bind(net, *args, **kwargs)
        except TypeError:
            return False  # the error is that of a call that is captured
        bound.apply_defaults()
        names, cells = self._forward.__code__.co_freevars, self._forward.__closure__ or ()
        closed_over = {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}
        return self._seen.holds({**closed_over, **bound.arguments})

    def function(self, graph_function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward with ``graph_function`` in place of its tensor work; it takes the model, then arguments.

        Side effects of the original (a cache that is filled, an attribute that is set) happen as they did.
        """

        def select(*values: Any) -> Any:
            return graph_function(*(values[position] for position in self.positions))

        return self._seen.callable(select)


def capture_call(
    net: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    history: MutableMapping[Any, Any] | None,
    any_float: bool,
    raises: bool,
) -> Captured:
    """Return the graph of one call; nothing is computed.

    Args:
        net: the model, in the training mode that the graph is for.
        args: arguments of the call.
        kwargs: arguments by name.
        history: sizes in earlier calls, which is updated; sizes that differ from theirs are variables of the graph.
            So are those of token ids, in the first call already. None for a graph for the sizes of this call alone.
        any_float: True if other numbers that differ are to be variables, too.
        raises: True if an error that the model raises itself is to be told from others; else the model has to run as it
            is written.

    Raises:
        CaptureError: the model cannot be captured as one graph.
        RaisedError: the model itself raises an error.
    """
    forward = inspect.unwrap(type(net).forward, stop=lambda function: isinstance(function, FunctionType))
    if not isinstance(forward, FunctionType):
        raise CaptureError(
            f"{type(net).__name__}.forward is a {type(forward).__name__}, not a Python function. {_ADVICE}"
        )
    method = forward.__get__(net)
    varying = sizes_of_ids(args, kwargs)
    trace = partial(trace_call, method, args, kwargs, history=history, any_float=any_float, varying=varying)
    is_settled = not history and settle(method, args, kwargs)
    found = _attempt(trace)
    if isinstance(found, Exception) and not is_settled and run_first_call(method, args, kwargs):
        found = _attempt(trace)
    if isinstance(found, Exception):
        reason = f"{type(net).__name__} cannot be captured as one graph: {_said(found)}"
        if raises and is_raised_by_model(found) and (own := own_error(method, args, kwargs)) is not None:
            raise RaisedError(reason) from own
        raise CaptureError(f"{reason}. {_ADVICE}") from found
    seen, module, inputs = found
    names = {str(id(inner)): name for name, inner in net.named_modules()}
    modules, positions = tidy(
        module,
        list(_paths(net, sources(module.graph), inputs, seen.replaced_buffers)),
        lambda key, source: names.get(key),
    )
    codes = {function.__code__ for function in state_of(net).functions}
    set_by_code = frozenset().union(
        *(stored_in(code, "ATTR") for code in codes)
    )  # of which Dynamo guards what the code reads
    classes = tuple(guards_of_classes(net.modules(), set_by_code, mentioned_in(codes)))
    call = GuardedCall(seen, forward, positions, net.modules(), _key(net, args, kwargs), classes)
    values = {node.name: node.meta["val"] for node in module.graph.nodes if "val" in node.meta}
    return Captured(copy_graph(module.graph), [], {}, call, modules, values, forward_only=not torch.is_grad_enabled())


def _attempt(trace: Callable[[], _Seen]) -> _Seen | Exception:
    """Return what a trace by Dynamo returns, or the error by which it has given up."""
    try:
        return trace()
    except Exception as error:
        if not has_given_up(error):
            raise
        return error


def _key(net: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable | None:
    try:
        return bind(net, signature_of(net), args, kwargs).key
    except (CaptureError, NotPlainError):
        return None


def sizes_of_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> frozenset[int]:
    """Return the sizes of the matrices of integers in a call: token ids vary in length, batches in number."""
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    sizes = chain.from_iterable(leaf.shape for leaf in leaves if leaf.dtype in _IDS and leaf.dim() == 2)
    return frozenset(size for size in sizes if isinstance(size, int))  # under torch.export some are symbols already


_IDS = (torch.int64, torch.int32)


def _paths(
    net: nn.Module, origins: Iterable[str], inputs: Iterable[Any], replaced: Collection[str]
) -> Iterator[str | None]:
    """Yield the path of each input of the graph that the call reads off the model, None for one that it does not.

    A buffer that the call replaces stays an input.
    """
    tensors = dict(chain(net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)))
    model = f"L[{inspect.unwrap(type(net).forward).__code__.co_varnames[0]!r}]"  # "self", by most authors
    for source, value in zip(origins, inputs, strict=True):
        path = ".".join(module_path(source, model)) if is_held_by_module(source) else ""
        is_read = tensors.get(path) is value and path.rpartition(".")[2] not in replaced
        yield path if is_read else None


def _has_forward(module: nn.Module) -> bool:
    """True if a module instance has a forward of its own that is not mfx's."""
    forward = module.__dict__.get("forward")
    return forward is not None and not (isinstance(forward, Overlay) and forward.is_submodule)


def _said(error: Exception) -> str:
    """Return the first line of Dynamo's message, and the line of the model that it is about."""
    lines = str(error).strip().splitlines() or ["no message"]
    what = next((line for line in lines if line.strip()), "no message")
    _, _, user = str(error).partition("from user code:")
    frames = [line.strip() for line in user.splitlines() if line.strip().startswith("File ")]
    return f"{type(error).__name__}: {what.strip()}" + (f" ({frames[-1]})" if frames else "")
