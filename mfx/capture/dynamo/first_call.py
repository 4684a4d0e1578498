"""The first call of a model before it is captured: what it does only once, and what it notes."""

from __future__ import annotations

import builtins
import contextvars
import dis
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfx import compat
from mfx.capture.symbolic.user_code import ErrorsPassedOver
from mfx.modules.holders import Holder
from mfx.modules.kept_results import results_not_kept
from mfx.modules.python_state import PythonState
from mfx.modules.restore import restored_if_changed, restored_if_fake


def _is_plain(value: Any) -> bool:
    kinds = (Tensor, bool, int, float, str, type(None))
    return all(isinstance(leaf, kinds) for leaf in pytree.tree_leaves(value))


def run_first_call(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run a model on fake tensors, for what it does at its first call only (install hooks, fill tables).

    What a second such call changes once more is put back, and so is what is not the model's own.
    """
    if not all(map(_is_plain, args)):
        return
    # Without what may change in the call, a cache for instance.
    kwargs = {name: value for name, value in kwargs.items() if _is_plain(value)}
    net = method.__self__  # type: ignore[attr-defined]
    before = PythonState(net)
    _run_on_fakes(method, args, kwargs)
    if not before.changes():
        return
    after_first = PythonState(net)
    _run_on_fakes(method, args, kwargs)
    again = {holder.key for holder in after_first.changes()}
    for holder in before.changes():
        if holder.key in again or _holds_fake(holder) or not before.owners(holder.value):
            holder.put_back()


def settle(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Have a model note what its first call notes in attributes, if its calls compute the same before and after.

    The graph then holds for later calls, too: models of Hugging Face note the kind of the labels. Whether the same is
    computed is seen by two runs on fake tensors: the same operations, on the same tensors.
    """
    net = method.__self__  # type: ignore[attr-defined]
    if not (all(map(_is_plain, args)) and all(map(_is_plain, kwargs.values())) and _notes(net)):
        return
    before = PythonState(net)
    first = _run_on_fakes(method, args, kwargs)
    changes = before.changes()
    if not changes:
        return
    after = PythonState(net)
    second = _run_on_fakes(method, args, kwargs)
    if first is None or first != second or after.changes() or any(map(_holds_fake, changes)):
        for holder in before.changes():
            holder.put_back()


def _notes(net: nn.Module) -> bool:
    """True if a forward in a model sets attributes."""
    forwards: list[Any] = [getattr(kind, "forward", None) for kind in {type(module) for module in net.modules()}]
    forwards = [inspect.unwrap(forward) for forward in forwards]  # none of a scripted module's class
    codes = [code for forward in forwards if (code := getattr(forward, "__code__", None)) is not None]
    return any(instruction.opname == "STORE_ATTR" for code in codes for instruction in dis.get_instructions(code))


class _Operations(TorchDispatchMode):
    """Every operation with its arguments: constants as they are, tensors by where they come from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []
        self._made: dict[int, int] = {}
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        self.seen.append((func, str(spec), [self._name(leaf) for leaf in leaves]))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in self._made:
                self._made[id(leaf)] = len(self._made)
                self._alive.append(leaf)
        return result

    def start(self, leaves: Sequence[Any]) -> None:
        """Know the leaves of the arguments by their position, and count from here on."""
        self.seen.clear()
        self._made = {id(leaf): position - len(leaves) for position, leaf in enumerate(leaves)}
        self._alive = list(leaves)

    def _name(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._made.get(id(leaf), "fake" if compat.is_fake(leaf) else id(leaf)), tuple(leaf.shape)
        return leaf if isinstance(leaf, bool | int | float | str) else str(leaf)


def _run_on_fakes(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """Run a model on fake tensors; return its operations, None if it failed."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    net = method.__self__  # type: ignore[attr-defined]
    with (
        restored_if_fake(net),
        results_not_kept(net),
        compat.fake_mode() as mode,
        restored_if_changed(),
        compat.patched(builtins, "print", _nothing),
        compat.patched(logging.Logger, "handle", _nothing),
        torch.no_grad(),
        ErrorsPassedOver(),
        _Operations() as operations,
    ):
        fake = [mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        operations.start(fake)
        fake_args, fake_kwargs = pytree.tree_unflatten(fake, spec)
        contextvars.copy_context().run(method, *fake_args, **fake_kwargs)
        seen: list[Any] = operations.seen
        return seen
    return None


def _holds_fake(holder: Holder) -> bool:
    return any(map(compat.is_fake, pytree.tree_leaves(holder.kind.read(holder.value))))


def _nothing(*args: object, **kwargs: object) -> None:
    pass
