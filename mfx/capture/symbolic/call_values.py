"""The values of the nodes of a trace in one call: tensors without data, and sizes as numbers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from mfx import compat
from mfx.capture.captured import CaptureError
from mfx.capture.outputs import read_clock
from mfx.capture.symbolic.constants import Constants
from mfx.capture.symbolic.leaf_runs import run_leaf
from mfx.capture.symbolic.user_code import ErrorsPassedOver
from mfx.modules.restore import restored_if_changed

UNKNOWN = object()


class Length(int):
    """The length of a value, which a trace has used as a number."""


_CONSTANT = (type(None), str, torch.dtype, torch.device)  # what a module returns whatever its input is


class CallValues:
    """The values of nodes in one call, as far as they can be had without running the model.

    Args:
        root: the model.
        inputs: the tensors of the call, by placeholder.

    Attributes:
        constants: what the graph reads and the model does not have.
        numbers: the sizes that a trace has used as numbers, by node: it holds for calls with the same ones only.
        lacking: the attributes that the trace has found tensors to lack: it holds for arguments that lack them, too.
        is_exact: True if the trace has asked whether an operation fails: it holds for these very shapes only.
    """

    def __init__(self, root: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.numbers: dict[fx.Node, Any] = {}
        self.lacking: set[str] = set()
        self.constants = Constants(root)
        self._root = root
        self.inputs = inputs
        self._mode = compat.new_fake_mode()
        try:
            self._fakes = {name: self._without_data(tensor) for name, tensor in inputs.items()}
        except Exception as error:  # whatever torch says to an unusual kind of tensor
            raise CaptureError(
                f"an argument has no counterpart without data: {type(error).__name__}: {error}"
            ) from error
        self.is_exact = False
        self._known: dict[fx.Node, Any] = {}
        self._errors: dict[fx.Node, BaseException] = {}
        self._outputs: dict[Any, tuple[Any, dict[nn.Module, set[str]]]] = {}
        self._set_by_leaves: dict[nn.Module, dict[str, Any]] = {}

    def of(self, node: fx.Node) -> Any:
        """Return the value of a node, `UNKNOWN` if it depends on data."""
        if node not in self._known:
            self.find(node.graph)
        return self._known.get(node, UNKNOWN)

    def error_of(self, node: fx.Node) -> tuple[BaseException | None, bool]:
        """Return the error that a node raises, None without one, and whether this is known."""
        self.is_exact = True
        if self.of(node) is not UNKNOWN:
            return None, True
        error = self._errors.pop(node, None)  # the trace raises it, and it refers to the frames that it passes
        return error, error is not None and not compat.is_of_fakes(error)

    def number(self, node: fx.Node) -> Any:
        """Return the value of a node if it is no tensor, for a trace that then holds for this value only."""
        value = self.of(node)
        if isinstance(value, Tensor) or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return UNKNOWN
        if value is not UNKNOWN:
            self.numbers[node] = value
        return value

    def lacks(self, node: fx.Node, attribute: str) -> bool:
        """True if a node's value is a tensor, neither a parameter nor a buffer, and no argument has an attribute."""
        if node.op == "get_attr" or not isinstance(self.of(node), Tensor):
            return False
        if any(hasattr(tensor, attribute) for tensor in self.inputs.values()):
            return False
        self.lacking.add(attribute)
        return True

    def length(self, node: fx.Node) -> int | None:
        """Return the length of a node's value, for a trace that then holds for this length only; None if unknown."""
        value = self.of(node)
        if not isinstance(value, tuple | list | Tensor) or (isinstance(value, Tensor) and not value.dim()):
            return None
        self.numbers.setdefault(node, Length(len(value)))
        return len(value)

    def tensors(self, graph: fx.Graph) -> dict[str, Tensor]:
        """Return the values that are tensors, by name of the node."""
        known = {node.name: self._known.get(node) for node in graph.nodes}
        return {name: value.detach() for name, value in known.items() if isinstance(value, Tensor)}

    def find(self, graph: fx.Graph) -> None:
        """Find the values of all nodes that are in the graph by now."""
        missing = [node for node in graph.nodes if node not in self._known]
        if missing:
            with (  # without the mode that notes what the model changes: all is put back
                compat.untraced(),
                compat.without_modes(),
                torch.random.fork_rng(devices=()),
                restored_if_changed(),
                self._mode,
            ):
                for node in missing:
                    self._known[node] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = self._arguments((node.args, node.kwargs))
        if node.target is read_clock or any(leaf is UNKNOWN for leaf in pytree.tree_leaves((args, kwargs))):
            return UNKNOWN
        with ErrorsPassedOver() as passed:  # whatever an operation says to tensors without data
            match node.op:
                case "placeholder":
                    return self._fakes[str(node.target)]
                case "get_attr":
                    holder, _, name = str(node.target).partition(".")
                    root, path = (self.constants, name) if holder == self.constants.name else (self._root, node.target)
                    found = operator.attrgetter(str(path))(root)
                    return self._mode.from_tensor(found) if isinstance(found, Tensor) else found
                case "call_module":  # without its hooks, which are the user's
                    return self._root.get_submodule(str(node.target)).forward(*args, **kwargs)
                case "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                case "call_function":
                    return node.target(*args, **kwargs)  # type: ignore[operator]
                case "output":
                    return args[0]
        if passed.error is not None:
            self._errors[node] = passed.error.with_traceback(None)
        return UNKNOWN

    def _without_data(self, tensor: Tensor) -> Tensor:
        """Return a tensor without data; to be called outside of the mode, where detach gives one with data."""
        fake: Tensor = self._mode.from_tensor(tensor if tensor.is_leaf else tensor.detach())
        return fake if tensor.is_leaf else fake.requires_grad_()

    def _arguments(self, arguments: Any) -> Any:
        return map_aggregate(arguments, lambda arg: self._known[arg] if isinstance(arg, fx.Node) else arg)

    def call_leaf(self, module: nn.Module, output: fx.Proxy, args: Any, kwargs: Any) -> Any:
        """Return what a trace has for the output of a module that is called as a whole: proxies in their structure.

        The module is run for that on tensors without data, else on made-up ones. What else it does is undone, but for
        the attributes that it sets: these are gone until `put_back`, as their values are not known to the trace.

        Args:
            module: the module.
            output: the proxy for its output as a whole.
            args: arguments of the call, with proxies.
            kwargs: arguments by name.

        Raises:
            TypeError: the call cannot be part of a graph.
        """
        self._known[output.node] = UNKNOWN  # it is run below
        given = map_aggregate((args, kwargs), lambda arg: self.of(arg.node) if isinstance(arg, fx.Proxy) else arg)
        leaves = pytree.tree_leaves(given)
        if any(leaf is UNKNOWN for leaf in leaves):
            raise TypeError(f"the arguments of {type(module).__name__} are not known before the call")
        key = (module, *(_described(leaf) for leaf in leaves))
        if key not in self._outputs:
            self.put_back()
            self._outputs[key] = run_leaf(module, *given, self._mode, self._without_data)
        value, assigned = self._outputs[key]
        self._known[output.node] = value
        for inner, names in assigned.items():
            kept = self._set_by_leaves.setdefault(inner, {})
            kept.update({name: inner.__dict__.pop(name) for name in names if name in inner.__dict__})
        return _proxies(output, value)

    def put_back(self) -> None:
        """Put back the attributes that leaves set, with the values from before the trace."""
        for module, attributes in self._set_by_leaves.items():
            module.__dict__.update(attributes)
        self._set_by_leaves.clear()


def _described(leaf: Any) -> Any:
    """Return what a module's output may depend on, but for data."""
    return (leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)


def _proxies(output: fx.Proxy, value: Any) -> Any:
    """Return the structure of a module's output, with proxies for what depends on the call."""
    if isinstance(value, Tensor):
        return output
    leaves, spec = pytree.tree_flatten_with_path(value)
    if len(leaves) == 1 and not leaves[0][0] and not isinstance(value, (*_CONSTANT, int, float, bool)):
        raise TypeError(f"a module returns {type(value).__name__}, which is no part of a graph")
    return pytree.tree_unflatten(
        [leaf if isinstance(leaf, _CONSTANT) else _at(output, path) for path, leaf in leaves], spec
    )


def _at(output: fx.Proxy, path: tuple[Any, ...]) -> Any:
    """Return a proxy for one part of an output."""
    part: Any = output
    for key in path:
        part = getattr(part, key.name) if isinstance(key, pytree.GetAttrKey) else part[_index(key)]
    return part


def _index(key: Any) -> Any:
    return key.idx if isinstance(key, pytree.SequenceKey) else key.key
