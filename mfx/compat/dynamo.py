"""Privates of TorchDynamo by which a call is captured and its graph is read.

All were read in torch 2.13 to 2.14.
"""

from __future__ import annotations

import dis
import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import CodeType, FunctionType
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo import pgo

from mfx.compat import (
    aside_from_caller,
    fake_mode,
    global_hooks,
    patching,
    plain_transformer_layers,
    unlogged,
    without_closed_observers,
)
from mfx.compat.dynamo_class_attributes import class_attributes_as_in_python
from mfx.compat.dynamo_containers import containers_as_in_python
from mfx.compat.dynamo_differences import (
    check_draws,
    check_gradients_returned,
    check_numpy,
    checkpoints_are_calls,
    own_tensors_may_require_gradients,
)
from mfx.compat.dynamo_kept_results import kept_results_refused

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
FUSED_LAYER = torch._transformer_encoder_layer_fwd  # what nn.TransformerEncoderLayer is in inference

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
_ONCE = ("exception", "warning_once", "info_once")


class DynamoCapture:
    """A call that Dynamo captured: its guards, and the code around its graph. No value of the call stays alive."""

    def __init__(self, output: Any, guards: Any) -> None:
        self._guards, self._hooks = guards, global_hooks()
        self._variables = output.graph_capture_output.f_globals
        self._graph_name = output.backend_input.backend_id
        self._named = _named(output.graph_capture_output.bytecode)
        self._function: Any = output.forward_callable(compiled_fn=lambda: None, extra_globals=self._known)

    def holds(self, variables: Mapping[str, Any]) -> bool:
        """True if Dynamo's guards hold for these local variables of the function."""
        with _capture_conditions():
            return global_hooks() == self._hooks and bool(self._guards.check(dict(variables)))

    @property
    def _known(self) -> dict[str, Any]:
        """The variables that the code names, of the model's module; of others, modules: collections, for a deque."""
        modules = {name: sys.modules[name] for name in self._named if name in sys.modules}
        return modules | {name: self._variables[name] for name in self._named if name in self._variables}

    def callable(self, graph_function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function that was called, with ``graph_function`` in the place of the graph."""
        own, variables = self._function, self._variables
        known = {**own.__globals__, **self._known, self._graph_name: graph_function}
        call: Any = FunctionType(own.__code__, known, own.__name__, own.__defaults__, own.__closure__)
        call.__kwdefaults__ = own.__kwdefaults__
        stored = {each.argval for each in dis.get_instructions(own.__code__) if each.opname == "STORE_GLOBAL"}
        if not stored:
            return call  # type: ignore[no-any-return]

        def and_store(*args: Any, **kwargs: Any) -> Any:
            known.update({name: variables[name] for name in stored & variables.keys()})
            try:
                return call(*args, **kwargs)
            finally:
                variables.update({name: known[name] for name in stored & known.keys()})

        return and_store

    @property
    def replaced_buffers(self) -> set[str]:
        """Names of buffers that the call replaces: ``module._buffers.update({name: …})`` in Dynamo's code."""
        names: set[str] = set()
        before, last, reading = "", "", False
        for instruction in dis.get_instructions(self._function.__code__):
            before, last = last, str(instruction.argval)
            if (before, last) == ("_buffers", "update"):
                reading = True
            elif instruction.opname == "BUILD_MAP":
                reading = False
            elif reading and instruction.opname == "LOAD_CONST" and isinstance(instruction.argval, str):
                names.add(instruction.argval)
        return names


def _named(code: CodeType) -> set[str]:
    """Return the names of the global variables that code, and the functions that it makes, read or write."""
    names = {each.argval for each in dis.get_instructions(code) if each.opname.endswith(("_GLOBAL", "_NAME"))}
    return names.union(*(_named(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def trace_call(
    function: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    history: MutableMapping[Any, Any] | None,
    any_float: bool,
    varying: Collection[int] = (),
) -> tuple[DynamoCapture, fx.GraphModule, Sequence[Any]]:
    """Capture one call of a bound method by Dynamo, as one graph or not at all; return it, the graph and its inputs.

    Args:
        function: the method.
        args: arguments of the call.
        kwargs: arguments by name.
        history: the sizes and integers of earlier calls, to which this call's are added; the graph holds for any value
            of those that differ. None: the graph holds for those of this call alone.
        any_float: the graph then also holds for any value of other numbers that differ and that Python code reads off
            attributes and arguments. It reads each of them off a tensor, where a compiler of the graph breaks it.
        varying: sizes that are taken to differ in other calls; with a history only.

    Raises:
        Exception: what Dynamo raises where it has to break the graph.
    """
    from torch._dynamo.convert_frame import fullgraph_capture
    from torch._dynamo.utils import dynamo_timed, get_metrics_context
    from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

    config = {
        "assume_static_by_default": True,
        "specialize_float": not any_float,
        "automatic_dynamic_shapes": history is not None,
        "skip_nnmodule_hook_guards": False,  # a hook that comes later must be seen
        "ignore_logging_functions": set(silent_methods()),
        "capture_scalar_outputs": True,
        "capture_dynamic_output_shape_ops": True,
        "allow_rnn": True,  # LSTM, GRU and RNN are one operation each
    }
    with (
        _capture_conditions(),
        quiet(),
        own_tensors_may_require_gradients(),
        checkpoints_are_calls(),
        containers_as_in_python(),
        class_attributes_as_in_python(),
        kept_results_refused(),
        remembering({} if history is None else history, varying),
        torch._dynamo.config.patch(config),
        get_metrics_context(),
        dynamo_timed("mfx"),
    ):
        with torch_function_mode_stack_state_mgr:  # knows the default device
            output = fullgraph_capture(function, tuple(args), dict(kwargs))
        if output.backend_input is None:
            raise RuntimeError("the model computes nothing with tensors")
        # Dynamo has put the graph into the variables of the model's module, where it would stay for ever.
        output.graph_capture_output.f_globals.pop(output.backend_input.backend_id, None)
        check_gradients_returned(output.backend_input.graph_module.graph)
        check_draws(output)
        check_numpy(output.backend_input.graph_module.graph)
        try:
            guards = output.graph_capture_output.build_guards(function.__func__.__code__, guard_hooks())
        except IndexError as error:  # of Dynamo's own, looking for where a size comes from
            what = "a tensor made in it, nested perhaps, has a size that no argument tells"
            raise torch._dynamo.exc.TorchDynamoException(what) from error
    traced = output.backend_input
    return DynamoCapture(output, guards.guard_manager), traced.graph_module, traced.example_inputs


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings about what Dynamo does itself: it reads ``.grad`` of every tensor that it is given.

    Inside of torch.export it also warns of the side effects that it replays. What fails during the capture is an
    exception and need not be logged.
    """
    with warnings.catch_warnings(), unlogged():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        warnings.filterwarnings("ignore", message="Dynamo does not know how to trace")  # a break, which is told of
        warnings.filterwarnings("ignore", message="While compiling, we found certain side effects happened")
        yield


def silent_methods() -> Iterator[Any]:
    """Yield the methods of loggers that write nothing or write once: others break a graph, which would lose them."""
    yield from (getattr(logging.Logger, name) for name in _ONCE if hasattr(logging.Logger, name))
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if not isinstance(logger, logging.Logger):
            continue
        for name, level in _LEVELS.items():
            if not logger.isEnabledFor(level) or logger.name.startswith("transformers"):  # which says what it has done
                yield getattr(logger, name)


def guard_hooks() -> Any:
    """Return what has Dynamo leave out guards on modules without an instance ``forward``: see `_is_about_forward`."""
    from torch._dynamo.hooks import Hooks

    return Hooks(guard_filter_fn=lambda guards: [not _is_about_forward(guard) for guard in guards])


def _is_about_forward(guard: Any) -> bool:
    """True if a guard wants a module without an instance ``forward``: mfx may give a submodule one."""
    if guard.guard_type != "NOT_PRESENT_IN_GENERIC_DICT":
        return False
    attribute: str = guard.orig_guard.create_fn.keywords["attr"]  # printed in some versions only
    return attribute == "forward"


@contextmanager
def _capture_conditions() -> Iterator[None]:
    """Set up the surroundings in which a call is captured and its guards are checked.

    `nn.Transformer` then takes the same path whatever the values are and whether or not gradients are on. What a caller
    has open (a counter of FLOPs or bytes) is not a condition of a graph, nor are the hooks by which
    `torch.utils.flop_counter` follows modules.
    """
    with patching(), plain_transformer_layers(), without_trackers(), aside_from_caller():
        yield


@contextmanager
def without_trackers() -> Iterator[None]:
    """Within this context, the hooks are gone by which `torch.utils.flop_counter` follows modules."""
    from torch.nn.modules import module

    with _without_trackers(module._global_forward_pre_hooks), _without_trackers(module._global_forward_hooks):
        yield


def _without_trackers(hooks: dict[int, Any]) -> AbstractContextManager[Any]:
    return patch.dict(hooks, without_closed_observers(hooks, {}), clear=True) if hooks else nullcontext()


_IN_DICT = re.compile(r"\.__dict__\['_(modules|parameters|buffers)'\]")


def sources(graph: fx.Graph) -> list[str]:
    """Return the source of each input of a graph, as an expression that Dynamo writes; "" for sizes."""
    return [_source(node) for node in graph.find_nodes(op="placeholder")]


def _source(node: fx.Node) -> str:
    return name_of(getattr(node, "_dynamo_source", None))


def name_of(source: Any) -> str:
    """Return a source as an expression that Dynamo writes; "" without one.

    What a module holds has one name, also where the module sets attributes, and Dynamo (2.11 to 2.15) reads the tables
    of modules, parameters and buffers from its ``__dict__``.
    """
    name = getattr(source, "name", "")
    return _IN_DICT.sub(r"._\1", str(name() if callable(name) else name))


def module_sources(graph: fx.Graph) -> Iterator[Any]:
    """Yield the sources of the modules around the parameters and buffers that are inputs of a graph."""
    seen: set[str] = set()
    for node in graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        while (source := getattr(source, "base", None)) is not None:
            name = name_of(source)
            if name not in seen and not name.endswith(("._modules", "._parameters", "._buffers", ".__dict__")):
                yield source
            seen.add(name)


def with_plain_sizes(value: Any) -> Any:
    """Return a fake tensor with the sizes of the captured call; None for what is not a tensor of known size."""
    if not isinstance(value, Tensor) or value.is_nested:
        return None
    sizes = [plain for size in value.shape if (plain := _plain(size)) is not None]
    if len(sizes) < value.dim():
        return None
    with fake_mode():
        return torch.empty(sizes, dtype=value.dtype, device=value.device)


def _plain(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return None if hint is None else int(hint)


@contextmanager
def remembering(history: MutableMapping[Any, Any], varying: Collection[int]) -> Iterator[None]:
    """Let Dynamo compare calls with these earlier ones only, and add the ones it captures.

    Its own memory is kept per function, so all models of a class would share it. Inputs of a ``varying`` size are
    remembered as if an earlier call had had another one.
    """
    states = defaultdict(pgo.CodeState, history)
    update = pgo.update_automatic_dynamic

    def update_and_vary(*args: Any, **kwargs: Any) -> Any:
        entry = update(*args, **kwargs)
        if isinstance(entry.size, tuple):
            entry.size = tuple(pgo.auto_dynamic if size in varying else size for size in entry.size)
        return entry

    with patch.object(pgo, "_CODE_STATE", states), patch.object(pgo, "update_automatic_dynamic", update_and_vary):
        yield
    history.update(states)
