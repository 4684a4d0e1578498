"""A symbolic tracer that walks through all modules that may hold residual adds."""

from __future__ import annotations

import functools
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, SupportsIndex

import torch
from torch import fx, nn

from mfx import compat
from mfx.capture.arguments import call_by_name
from mfx.capture.captured import CaptureError
from mfx.capture.decisions import Guesses, check_decision
from mfx.capture.outputs import says_something
from mfx.capture.symbolic.applied_functions import functions_are_nodes
from mfx.capture.symbolic.bytecode import unpacked_indices
from mfx.capture.symbolic.call_values import UNKNOWN, CallValues
from mfx.capture.symbolic.caught_errors import catches_errors
from mfx.capture.symbolic.classes import type_of_value
from mfx.capture.symbolic.constants import Constants
from mfx.capture.symbolic.dependences import Dependences
from mfx.capture.symbolic.entered_modes import EnteredModes
from mfx.capture.symbolic.identity import identity_refused
from mfx.capture.symbolic.leaf_modules import TORCH_FUNCTIONS, einops_functions, is_looked_into, timm_functions
from mfx.capture.symbolic.leaves import Leaves
from mfx.capture.symbolic.leftovers import Leftovers
from mfx.capture.symbolic.lengths import check_length, known_length
from mfx.capture.symbolic.made_objects import MadeObjects
from mfx.capture.symbolic.made_tensors import written_constants
from mfx.capture.symbolic.outputs import Outputs
from mfx.capture.symbolic.own_calls import own_calls_seen
from mfx.capture.symbolic.packing import packing_functions, packing_namespaces
from mfx.capture.symbolic.path_taken import PathTaken
from mfx.capture.symbolic.proxies import Value
from mfx.capture.symbolic.recorded import is_made_of_fields, last_node, nodes_after, to_nodes
from mfx.capture.symbolic.refusals import OutputError, Refusals, UntraceableError, WrongGuessError
from mfx.capture.symbolic.user_code import is_of_model, said_by, user_stack
from mfx.modules.buffers import storage_of
from mfx.modules.random_state import undisturbed
from mfx.modules.restore import tensors_restored
from mfx_passes import ModuleCall


class SymbolicTracer(fx.Tracer):
    """Traces a module with all tensors symbolic, parameters and buffers included.

    Args:
        inputs: names of the arguments that are tensors.
        constants: values of the other arguments, by name; the trace holds for these values only.
        steps: modules that are called as a whole, whatever they are.
        is_leaf: True for further modules that are called as a whole.
        leaves: modules that cannot be walked through; a trace adds those in which it fails.
        values: what is known of the call that the trace is made for.
        guesses: the values to take for conditions on tensors; None if the trace is to refuse these.
        namespaces: the variables of files whose functions the model's code may call.

    Attributes:
        calls: the module calls that were walked through, in the order they ended.
        constants: the tensors that the graph reads and the model does not have.
        walked: path and module of every module that was walked through, the root first.
        refusals: what the model asked for and a trace does not know.
        outputs: what the model prints and logs.
        leftovers: the proxies of the trace.
        path: the conditions that were met, and the values taken for them.
        written: the memory of constants that the graph changes in place.
        depends: what the model's code has looked at.
        at_boundary: called with the path of a walked module whenever its code goes on to, or comes back from, another
            one that is walked through.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        constants: Mapping[str, Any],
        steps: Collection[nn.Module] = (),
        is_leaf: Callable[[nn.Module], bool] = lambda module: False,
        leaves: Leaves | None = None,
        values: CallValues | None = None,
        guesses: Guesses | None = None,
        namespaces: Collection[dict[str, Any]] = (),
    ) -> None:
        super().__init__(autowrap_functions=(*einops_functions(), *timm_functions(), *TORCH_FUNCTIONS))
        for module in (torch, *packing_namespaces()):  # torch is where torch.finfo is looked up
            compat.search_autowrapped_in(self, vars(module))
        for namespace in namespaces:
            compat.search_autowrapped_in(self, namespace)
        self._steps, self._is_leaf = steps, is_leaf
        self.leaves = Leaves(allowed=False) if leaves is None else leaves
        self.values = values
        self._inputs, self._constants = inputs, constants
        self.calls: list[ModuleCall] = []
        self.walked: dict[str, nn.Module] = {}
        self.refusals = Refusals()
        self.path = PathTaken(guesses, self.refusals)
        self.outputs = Outputs(self, self.refusals)
        self.leftovers = Leftovers()
        self.written: set[int] = set()
        self.depends = Dependences()
        self.at_boundary: Callable[[str], None] = lambda path: None
        self._thread = threading.get_ident()
        self._parameters: dict[str, fx.Proxy] = {}
        self._made: MadeObjects | None = None

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record the forward pass of ``root``, a module; see `torch.fx.Tracer.trace`."""
        assert isinstance(root, nn.Module)
        tensors = (*root.named_parameters(), *root.named_buffers())
        self._tensor_paths = {id(tensor): path for path, tensor in reversed(tensors)}
        self._storages = {storage_of(tensor) for _, tensor in tensors} - {0}
        self.walked = {"": root}
        self.constants, self._submodules = Constants(root), dict(root.named_modules())
        if self.values is not None:
            self.values.constants = self.constants
        self._modes = EnteredModes(self.refusals)
        replaced = {**packing_functions(), **compat.trace_hidden_from(), **self.depends.functions()}
        seen = {"type": type_of_value, "id": identity_refused(self.refusals)}
        wrapped = compat.autowrap_in_this_thread(seen, replaced)
        watched, recorded, hidden = self._modes.watched(), self.outputs.recorded(), compat.trace_hidden()
        try:
            with watched, recorded, wrapped, hidden, functions_are_nodes(), own_calls_seen(root, self._call):
                graph = super().trace(root, concrete_args)
            if self.values is not None:
                self.values.find(graph)
                self.depends.follow(root, self.values.inputs.values())
        finally:
            self._parameters, self._made = {}, None
            if self.values is not None:
                self.values.put_back()
        self.at_boundary("")
        self.outputs.check()
        self.refusals.check()
        # What forward is annotated to return says nothing a graph needs, and a string breaks its pickle in torch 2.13.
        graph.output_node().type = None
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[[], Any], list[Any]]:
        """Make a placeholder for every argument but those with a constant value."""
        placeholders = {name: self.create_proxy("placeholder", name, (), {}) for name in self._inputs}

        def forward() -> Any:
            result = call_by_name(root_fn, self.root, {**placeholders, **self._constants})
            if self.values is not None:  # else TorchDynamo is asked first, which knows what classes do
                self._made = MadeObjects(self)
            return result

        # The tracer looks into the globals and annotations of what it calls, so they must be the model's.
        return functools.wraps(root_fn)(forward), []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for modules of torch.nn and einops that cannot hold residual adds: they are called as a whole."""
        if m in self._steps or m in self.leaves or self._is_leaf(m):
            return True  # the last runs a chain already
        is_layer = type(m).__module__.startswith("einops.") or super().is_leaf_module(m, module_qualified_name)
        return isinstance(m, torch.jit.ScriptModule) or (is_layer and not is_looked_into(m))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call; for a module that is walked through, record its nodes, too."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # torch.fx patches modules for all threads
        if type(m).__call__ is nn.Module.__call__:
            return self._call(m, m.forward, args, kwargs)
        self.path_of_module(m)  # an error for one that is not of the model
        return m.forward(*args, **kwargs)  # a part of the call that own_calls_seen tells of

    def _call(self, m: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        if m not in self.leaves and not self.is_leaf_module(m, path):
            if not self.leaves.may_take(m):
                return self._walk(m, path, run, args, kwargs)
            output = self._walk_if_possible(m, path, run, args, kwargs)
            if m not in self.leaves:
                return output
        output = super().call_module(m, run, args, kwargs)
        if m not in self.leaves or self.values is None:
            return output
        return self.values.call_leaf(m, output, args, kwargs)

    def _walk(self, m: nn.Module, path: str, run: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        self.walked[path] = m
        last = last_node(self.graph)
        self.at_boundary(self.path_inside)
        # Hooks are run when the module is called, not when it is traced: a proxy means nothing to them.
        output = super().call_module(m, run, args, kwargs)
        self.at_boundary(path)
        nodes = frozenset(nodes_after(self.graph, last))
        self.calls.append(ModuleCall(path, to_nodes(args), to_nodes(kwargs), to_nodes(output), nodes))
        return output

    def _walk_if_possible(self, m: nn.Module, path: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Walk through a module; where that fails, it becomes a leaf and nothing is recorded."""
        attributes = {module: dict(module.__dict__) for module in m.modules()}
        last = last_node(self.graph)
        calls, walked, stack = len(self.calls), dict(self.walked), self.module_stack.copy()
        refused, decided, used = self.refusals.count, len(self.path.decisions), dict(self.depends.used)
        try:
            with undisturbed(m) as drawn, tensors_restored(m) as replaced:
                output = self._walk(m, path, run, args, kwargs)
            if drawn or replaced:
                what = f"draws random numbers ({', '.join(drawn)})" if drawn else f"replaces {', '.join(replaced)}"
                raise CaptureError(f"it {what} while it runs")
            self.refusals.check(refused)
            return output
        except (OutputError, WrongGuessError):
            raise  # a leaf in a branch would print twice; another guess may do
        except BaseException as error:  # whatever its forward says to symbolic values
            if not is_of_model(error):
                raise
            if self.path.is_misled_by(error, decided):
                raise WrongGuessError(str(error)) from error
            self.refusals.forget_after(refused)
            del self.path.decisions[decided:]
            self.depends.used = used
            for module, before in attributes.items():
                module.__dict__.clear()
                module.__dict__.update(before)
            made = list(nodes_after(self.graph, last))
            if says_something(made):
                self.refusals.refuse(OutputError("a module that is called as a whole prints, logs or warns"))
            for node in reversed(made):
                self.graph.erase_node(node)
            del self.calls[calls:]
            self.walked, self.module_stack = walked, stack
            self.leaves.add(m, said_by(error, m))
            return None

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy for a parameter or buffer: the graph does not depend on its value."""
        path = self._tensor_paths.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if path is None or threading.get_ident() != self._thread:
            return attr_val
        known = self._parameters.get(path)  # not torch's cache, which is part of a reference cycle
        if known is None or compat.is_erased(known.node):
            self._parameters[path] = self.create_proxy("get_attr", path, (), {})
        return self._parameters[path]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy for the value of a node."""
        value = Value(node, self)
        self.leftovers.add(value)
        return value

    @property
    def path_inside(self) -> str:
        """The path of the module whose code runs now."""
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node; the graph makes mappings of other classes than dict, for torch makes a dict."""
        cls: Any = type(a)
        if cls.__module__ == "numpy" and isinstance(a, SupportsIndex):  # a product of sizes, for instance
            return operator.index(a)
        if cls is OrderedDict:
            return self.create_proxy("call_function", cls, (list(a.items()),), {}).node
        if cls is not dict and issubclass(cls, dict):
            if not is_made_of_fields(a):
                self.refusals.refuse(UntraceableError(f"a {cls.__name__} would become a dict"))
            return self.create_proxy("call_function", cls, (), dict(a)).node
        is_tensor = isinstance(a, torch.Tensor | torch.ScriptObject) and not isinstance(a, nn.Parameter)
        if is_tensor and id(a) not in self._tensor_paths:
            self.refuse_view(a)
            if a not in self.tensor_attrs:
                self.tensor_attrs[a] = self.constants.add(a)
        try:
            return super().create_arg(a)
        except NotImplementedError as error:
            if self._made is not None and (made := self._made.node_of(a)) is not None:
                return made
            self.refusals.refuse(UntraceableError(f"a traced operation has an {error}"))

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Record a node with the stack of the user's code (cheaper than torch's own stack traces)."""
        self.refusals.forget_probe()
        self._modes.check()
        if args[:2] == ("call_method", "backward"):
            self._modes.refuse_differentiation("makes a backward pass, which adds to gradients")
        node = super().create_node(*args, **kwargs)
        frames: list[FrameType] = []
        node.meta["stack_trace"] = user_stack(self.depends.codes, frames)
        for frame in frames:
            self.depends.look_at_variables(frame)
        is_tried = any(catches_errors(frame, is_innermost=frame is frames[0]) for frame in frames)
        if is_tried and node.op.startswith("call_"):
            self._try(node)
        if self.constants:
            self.written |= set(map(storage_of, written_constants(node, self.constants, self._submodules)))
        return node

    def _try(self, node: fx.Node) -> None:
        """Raise the error that a node raises in the call that is traced, which the model's code catches."""
        if self.values is None:
            self.refusals.refuse(
                UntraceableError("it catches errors of operations; a call (example_inputs) tells if there are any")
            )
        error, is_known = self.values.error_of(node)
        if not is_known:
            self.refusals.refuse(UntraceableError("it catches errors of an operation that depends on data"))
        if error is not None:
            self.graph.erase_node(node)
            raise error

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterate over a value whose length is known, or told by the code that unpacks it."""
        count = known_length(obj.node)
        indices = unpacked_indices(sys._getframe(2)) if count is None else range(count)
        if indices is None:
            length = self.length_of(obj)
            if length is None:
                self.refusals.refuse(UntraceableError("a traced value is iterated over, whose length is not known"))
            indices = range(length)
        elif count is None:
            least = None in indices
            options = {"is_least": True} if least else {}
            self.create_proxy("call_function", check_length, (obj, len(indices) - least), options)
        return iter([None if i is None else operator.getitem(obj, i) for i in indices])

    def look_at(self, tensor: torch.Tensor) -> None:
        """Take note that the model's code looks at a tensor, which may be a parameter or buffer."""
        if (path := self._tensor_paths.get(id(tensor))) is not None:
            self.depends.look_at(path, tensor)

    def refuse_view(self, tensor: Any) -> None:
        """Refuse a tensor in the memory of a parameter or buffer: the graph would not know that it changes with it."""
        if isinstance(tensor, torch.Tensor) and storage_of(tensor) in self._storages:
            self.refusals.refuse(UntraceableError("it reads a view of a parameter or buffer that it keeps"))

    def refuse_kept_result(self, function: str) -> None:
        """Refuse a function that keeps its results, or to advance an iterator, outside of runs on fake tensors."""
        if compat.runs_for_real():
            what = f"it calls {function}, which keeps its results (functools.lru_cache) or is used up"
            self.refusals.refuse(UntraceableError(f"{what}; a graph would not do so"))

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Return the truth value of a size or of what was computed of sizes."""
        value = self.number_of(obj)
        if value is not UNKNOWN:
            return bool(value)
        decision = self.path.decide(self.path_inside)
        arguments = obj, decision.value, len(self.path.decisions) - 1, decision.line
        self.create_proxy("call_function", check_decision, arguments, {})  # which checks the guess
        return decision.value

    def number_of(self, obj: fx.Proxy) -> Any:
        """Return a size, or what was computed of sizes, in the call that is traced; `UNKNOWN` if it is not known."""
        if obj.__dict__.get("attr") == "requires_grad":  # another thing in each call, whatever its shapes are
            self.refusals.refuse(UntraceableError("it depends on whether a traced value requires a gradient"))
        return UNKNOWN if self.values is None else self.values.number(obj.node)

    def constant_of(self, obj: fx.Proxy) -> Any:
        """Return a dtype or device in the call that is traced; `UNKNOWN` if it is not known."""
        value = UNKNOWN if self.values is None else self.values.of(obj.node)
        if value is not UNKNOWN:
            self.depends.given.append(obj.node)
        return value

    def length_of(self, obj: fx.Proxy) -> int | None:
        """Return the length of a value in the call that is traced; None if it is not known."""
        length = known_length(obj.node)
        return self.values.length(obj.node) if length is None and self.values is not None else length
