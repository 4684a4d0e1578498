"""Runs of modules that a trace calls as a whole, to know what they return: without data, else on made-up values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mfx import compat
from mfx.capture.symbolic.refusals import OutputError, outputs_refused
from mfx.capture.symbolic.user_code import ErrorsPassedOver
from mfx.modules.iterators import iterators_left_alone
from mfx.modules.python_state import PythonState, python_state_restored
from mfx.modules.random_state import undisturbed
from mfx.modules.restore import restored_if_changed, tensors_restored

_RUNS = 3  # on different values, of a module that looks at them: to see if the shapes that it returns depend on these
_MORE_RUNS = 24  # the same, if shapes inside of it depend on values: some are then often alike by chance


def run_leaf(
    module: nn.Module, args: Any, kwargs: Any, mode: Any, without_data: Callable[[Tensor], Tensor]
) -> tuple[Any, dict[nn.Module, set[str]]]:
    """Run a module; return its output without data, and the attributes that it set. What else it does is undone.

    Args:
        module: the module.
        args: arguments of the call, with tensors without data.
        kwargs: arguments by name.
        mode: the mode in which these were made.
        without_data: returns a tensor of that mode for one with data.

    Raises:
        TypeError: its calls cannot be part of a graph.
    """
    with ErrorsPassedOver(), compat.untraced():
        with _without_effects(module) as state, mode:
            output = _checked_output(module, args, kwargs)
        return output, _own(state)
    # It looks at data.
    with compat.untraced(), _without_effects(module) as state:
        output, runs, shapes = None, 0, _ShapesOfValues()
        while runs < _RUNS or (shapes.seen and runs < _MORE_RUNS):
            given = map_aggregate((args, kwargs), partial(_made_up, positive=shapes.seen and runs % 2 == 1))
            with shapes:
                other = _checked_output(module, *given)
            output = other if output is None else output
            if _shapes(other) != _shapes(output):
                raise TypeError(f"the shape of what {type(module).__name__} returns depends on values")
            runs += 1
    with compat.untraced():
        fake = pytree.tree_map_only(Tensor, without_data, output)
    return fake, _own(state)


def _checked_output(module: nn.Module, args: Any, kwargs: Any) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    versions = [tensor._version for tensor in tensors]
    output = module.forward(*args, **kwargs)
    if versions != [tensor._version for tensor in tensors]:
        raise TypeError(f"{type(module).__name__} changes its arguments in place")
    memory = {tensor.untyped_storage()._cdata for tensor in tensors}
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata in memory:
            raise TypeError(f"{type(module).__name__} returns a view of its argument")
    return output


def _own(state: PythonState) -> dict[nn.Module, set[str]]:
    """Return the attributes that a module has set, if it has changed nothing that is not its own."""
    if state.outside:
        raise OutputError(f"it changes {', '.join(state.outside)}, which is not its own")
    return state.assigned


@contextmanager
def _without_effects(module: nn.Module) -> Iterator[PythonState]:
    """Undo what a module does beside its output, its prints and its hooks included."""
    with ExitStack() as stack:
        for inner in module.modules():
            for table in compat.forward_hook_tables(inner):
                stack.callback(table.update, dict(table))
                table.clear()
        stack.enter_context(outputs_refused())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_only_torch_draws(module))
        stack.enter_context(compat.differentiation_observed(partial(_refuse_differentiation, module)))
        state = stack.enter_context(python_state_restored(module))
        stack.enter_context(iterators_left_alone(state))
        stack.enter_context(tensors_restored(module))
        copies = {id(buffer): buffer.clone() for buffer in module.buffers()}  # BatchNorm does not say that it writes
        for inner in module.modules():
            inner._buffers.update({name: copies[id(b)] for name, b in inner._buffers.items() if b is not None})
        stack.enter_context(restored_if_changed())
        yield state


@contextmanager
def _only_torch_draws(module: nn.Module) -> Iterator[None]:
    """Put random generators back; a recomputation puts back torch's only, so a leaf must not draw from others."""
    with undisturbed(module) as drawn:
        yield
    if others := [name for name in drawn if name != "torch" and not name.startswith("torch.")]:
        raise TypeError(f"{type(module).__name__} draws random numbers that are not torch's ({', '.join(others)})")


def _refuse_differentiation(module: nn.Module, what: str) -> None:
    raise TypeError(f"{type(module).__name__} {what}; a recomputation could not repeat that")


class _ShapesOfValues(TorchDispatchMode):
    """Notes whether an operation within this context returned a tensor whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.dynamic_output_shape in func.tags
        return func(*args, **(kwargs or {}))


def _shapes(output: Any) -> list[Any]:
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(output)]


def _made_up(fake: Any, *, positive: bool) -> Any:
    """Return a tensor with values that are ordinary for its dtype: small numbers, valid indices, a mask of both.

    Positive ones, as shares are, have logarithms and roots: where all is NaN, nothing depends on values.
    """
    if not isinstance(fake, Tensor):
        return fake
    if fake.dtype == torch.bool:
        return torch.rand(fake.shape, device=fake.device) < 0.5
    small = torch.rand if positive else torch.randn
    make = small if fake.is_floating_point() or fake.is_complex() else torch.zeros
    made = make(fake.shape, dtype=fake.dtype, device=fake.device)
    return made.requires_grad_(fake.requires_grad)
