"""The first call of a model before it is captured: what it does only once, and what it notes."""

from __future__ import annotations

import builtins
import contextvars
import dis
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfx import compat
from mfx.capture.caught_outputs import outputs_caught
from mfx.capture.symbolic.user_code import ErrorsPassedOver, is_raised_by_user
from mfx.modules.holders import Holder
from mfx.modules.kept_results import results_not_kept
from mfx.modules.python_state import state_of
from mfx.modules.random_state import undisturbed
from mfx.modules.restore import restored_if_changed, restored_if_fake

_DEPTH = 4  # of objects and containers in a result that is compared


def _is_plain(value: Any) -> bool:
    kinds = (Tensor, bool, int, float, str, type(None))
    return all(isinstance(leaf, kinds) for leaf in pytree.tree_leaves(value))


def run_first_call(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Run a model on fake tensors, for what it does at its first call only (install hooks, fill tables).

    What a second such call changes once more is put back, and so is what is not the model's own. What only the first
    one prints, logs or warns is said for real.

    Returns:
        True if the model may be another one than before.
    """
    if not all(map(_is_plain, args)):
        return False
    # Without what may change in the call, a cache for instance.
    kwargs = {name: value for name, value in kwargs.items() if _is_plain(value)}
    net = method.__self__  # type: ignore[attr-defined]
    before, initialized = state_of(net), _initialized(net)
    first = _run_on_fakes(method, args, kwargs)
    kept = _initialized(net) != initialized
    if not before.changes():
        return kept
    after_first = state_of(net)
    second = _run_on_fakes(method, args, kwargs)
    again = {holder.key for holder in after_first.changes()}
    ended = first.operations is not None and second.operations is not None
    gives_another = ended and first.result != second.result  # a graph would never give what the first call gives
    for holder in before.changes():
        if gives_another or holder.key in again or _holds_fake(holder) or not before.owners(holder.value):
            holder.put_back()
        else:
            kept = True
    for each in first.said if kept else ():
        if each not in second.said:  # nor will a real call say it
            each.again()
    return kept


def _initialized(net: nn.Module) -> list[tuple[str, int]]:
    """Return what a first call may initialize beside attributes: modules, parameters and buffers."""
    named = chain(net.named_modules(), net.named_parameters(), net.named_buffers())
    return [(name, id(value)) for name, value in named]


def settle(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Have a model note what its first call notes in attributes, if its calls do the same before and after.

    The graph then holds for later calls, too: models of Hugging Face note the kind of the labels. Two runs on fake
    tensors tell: the same operations on the same tensors, the same results, the same prints, logs and warnings.

    Returns:
        True if a first call is known to change nothing.
    """
    net = method.__self__  # type: ignore[attr-defined]
    if not (all(map(_is_plain, args)) and all(map(_is_plain, kwargs.values())) and _notes(net)):
        return False
    before, initialized = state_of(net), _initialized(net)
    first = _run_on_fakes(method, args, kwargs)
    changes = before.changes()
    if not changes:
        return _initialized(net) == initialized
    after = state_of(net)
    second = _run_on_fakes(method, args, kwargs)
    if first.operations is None or first != second or after.changes() or any(map(_holds_fake, changes)):
        for holder in before.changes():
            holder.put_back()
    return False


def own_error(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> BaseException | None:
    """Return the error that a model, or a hook of its user's, raises itself in a call, None if none is known.

    A run on fake tensors tells; what it changes is put back.
    """
    if not all(map(_is_plain, (*args, *kwargs.values()))):
        return None
    net = method.__self__  # type: ignore[attr-defined]
    before = state_of(net)
    with undisturbed(net):
        error = _run_on_fakes(method, args, kwargs).error
    for holder in before.changes():
        holder.put_back()
    return error if error is not None and is_raised_by_user(error) else None


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

    def names_in(self, value: Any) -> list[Any]:
        """Return where the tensors in a value come from."""
        return [self._name(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]

    def _name(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return self._made.get(id(leaf), "fake" if compat.is_fake(leaf) else id(leaf)), tuple(leaf.shape)
        return leaf if isinstance(leaf, bool | int | float | str) else str(leaf)


@dataclass(frozen=True)
class _Said:
    """A text that a model has printed, logged or warned on fake tensors, and a function that does so for real."""

    text: Any
    again: Callable[[], Any] = field(compare=False)


@dataclass(frozen=True)
class _Run:
    """A run of a model on fake tensors.

    Args:
        operations: its operations, and where the tensors come from that it returned; None if it failed.
        result: what it returned, as `_described` has it.
        said: what it printed, logged and warned.
        error: what it failed with.
    """

    operations: list[Any] | None
    result: Any
    said: list[_Said]
    error: BaseException | None = field(default=None, compare=False)


def _run_on_fakes(method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Run:
    """Run a model on fake tensors, without a word; return what it did."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    net = method.__self__  # type: ignore[attr-defined]
    said: list[_Said] = []
    run, real_print = _Run(None, None, said), builtins.print

    def note_print(*values: Any, **options: Any) -> None:
        texts = tuple(map(str, values))
        said.append(_Said(texts, partial(real_print, *texts, **options)))

    def note_log(logger: logging.Logger, record: logging.LogRecord) -> None:
        said.append(_Said((record.levelno, record.getMessage()), lambda: logger.handle(record)))

    def note_write(name: str, data: Any, write: Callable[[], Any]) -> None:
        said.append(_Said((name, data), write))

    with (
        warnings.catch_warnings(record=True) as warned,
        restored_if_fake(net),
        results_not_kept(net),
        compat.fake_mode() as mode,
        restored_if_changed(),
        outputs_caught(note_print, note_log, note_write),
        torch.no_grad(),
        ErrorsPassedOver() as passed,
        _Operations() as operations,
    ):
        warnings.simplefilter("always")
        fake = [mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        operations.start(fake)
        fake_args, fake_kwargs = pytree.tree_unflatten(fake, spec)
        result = contextvars.copy_context().run(method, *fake_args, **fake_kwargs)
        run = _Run([*operations.seen, operations.names_in(result)], _described(result), said)
    said += [
        _Said(
            (each.category, str(each.message)),
            partial(warnings.warn_explicit, each.message, each.category, each.filename, each.lineno),
        )
        for each in warned
    ]
    return replace(run, error=passed.error)


def _described(value: Any, depth: int = _DEPTH) -> Any:
    """Return the kind of a value and what it holds, but for tensors, in a form that can be compared."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, bool | int | float | str | type(None)):
        return type(value), value
    leaves, spec = pytree.tree_flatten(value)
    is_object = len(leaves) == 1 and leaves[0] is value
    kind, items = (type(value), getattr(value, "__dict__", {}).items()) if is_object else (str(spec), leaves)
    return kind, [_described(item, depth - 1) for item in items] if depth else None


def _holds_fake(holder: Holder) -> bool:
    return any(map(compat.is_fake, pytree.tree_leaves(holder.kind.read(holder.value))))
