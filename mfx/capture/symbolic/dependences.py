"""All that a graph depends on beside its arguments: it is for calls in which this is the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from mfx import compat
from mfx.capture.binding import Answer
from mfx.capture.snapshots import PLAIN
from mfx.capture.symbolic.bytecode import identity_checks
from mfx.capture.symbolic.classes import ClassOfValue
from mfx.modules.buffers import is_buffer
from mfx.modules.references import is_users
from mfx_passes.paths import is_inside

_NAMES = (
    "are_deterministic_algorithms_enabled",
    "get_autocast_cpu_dtype",
    "get_autocast_dtype",
    "get_autocast_gpu_dtype",
    "get_default_device",
    "get_default_dtype",
    "get_deterministic_debug_mode",
    "get_float32_matmul_precision",
    "get_num_threads",
    "is_anomaly_enabled",
    "is_autocast_cache_enabled",
    "is_autocast_cpu_enabled",
    "is_autocast_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "is_grad_enabled",
    "is_inference_mode_enabled",
)


class Dependences:
    """All that the code of a model has looked at while it was traced: tensors from before, and modes.

    Attributes:
        used: tensors that constants were computed from, by identity.
        kinds: dtype and device of parameters and buffers, by path.
        codes: code that has run, with its variables.
        never_traced: whether local variables that code compares by ``is`` had values that no trace makes, by name.
        given: nodes whose value, a dtype or device, the code was given.
    """

    def __init__(self) -> None:
        self.used: dict[int, Tensor] = {}
        self.kinds: dict[str, tuple[torch.dtype, torch.device]] = {}
        self.codes: dict[CodeType, dict[str, Any]] = {}
        self.never_traced: dict[tuple[CodeType, str], bool] = {}
        self.given: list[fx.Node] = []
        self._answers: dict[Any, Any] = {}
        self._thread = threading.get_ident()

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The questions that the code, torch.nn's included, asked of modes, with the answers."""
        return tuple((*question, answer) for question, answer in self._answers.items())

    @property
    def files(self) -> dict[int, dict[str, Any]]:
        """The variables of the user's files whose code has run, by identity: not those of code that a call makes."""
        names = {namespace.get("__name__"): namespace for namespace in self.codes.values()}
        users = {name: sys.modules[name] for name in names if is_users(name) and name in sys.modules}
        return {id(vars(module)): vars(module) for name, module in users.items() if vars(module) is names[name]}

    def look_at(self, path: str, tensor: Tensor) -> None:
        """Note that the code has looked at a parameter or buffer."""
        self.kinds[path] = tensor.dtype, tensor.device

    def look_at_variables(self, frame: FrameType) -> None:
        """Note the values of the variables that a frame's code compares by ``is``."""
        for check in identity_checks(frame.f_code):
            for name in check.variables:
                if (value := frame.f_locals.get(name)) is not None:
                    key = frame.f_code, name
                    self.never_traced[key] = self.never_traced.get(key, True) and _is_never_traced(value)

    def follow(self, root: nn.Module, inputs: Iterable[Tensor]) -> None:
        """Note what the dtypes and devices depend on that the code was given: parameters, buffers and autocast."""
        found = {node for node in self.given if any(source.op != "placeholder" for source in node.all_input_nodes)}
        if not found:
            return
        todo = list(found)
        while todo:
            todo += (sources := set(todo.pop().all_input_nodes) - found)
            found |= sources
        own = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        for node in found:
            target = str(node.target)
            for path in own if node.op in ("get_attr", "call_module") else ():
                if is_inside(path, target):
                    self.look_at(path, own[path])
        for kind in sorted({tensor.device.type for tensor in inputs}.intersection(compat.autocast_kinds())):
            for name in ("is_autocast_enabled", "get_autocast_dtype"):
                self._answers[name, (kind,), ()] = getattr(torch, name)(kind)

    def functions(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """Return the functions of torch that tell of modes, with what a trace has in their place."""
        functions = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
        return {function: partial(self._ask, name, function) for name, function in functions.items()}

    def _ask(self, name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        answer = function(*args, **kwargs)
        asking = sys._getframe(1).f_globals.get("__name__")
        if threading.get_ident() == self._thread and (is_users(asking) or str(asking).startswith("torch.nn.")):
            self._answers[name, args, tuple(kwargs.items())] = answer
        return answer


def _is_never_traced(value: Any) -> bool:
    """True for a value that neither is a tensor nor holds one: numbers, arrays, modules, functions, classes."""
    kinds = (*PLAIN, nn.Module, type, FunctionType, ModuleType)
    return not isinstance(value, ClassOfValue) and (isinstance(value, kinds) or is_buffer(value))
