"""TorchDynamo's conversion of a frame, apart from whoever observes the call: unseen, without guards on observers.

Reads how Dynamo guards on function modes (read in torch 2.13 to 2.14).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import CodeType
from typing import Any
from unittest.mock import patch

from torch._dynamo.guards import CheckFunctionManager, GuardBuilder
from torch.utils._python_dispatch import TorchDispatchMode

from mfx.compat.aside import saved_tensor_hooks, unobserved
from mfx.compat.dynamo import without_trackers
from mfx.compat.hooks import global_hooks
from mfx.compat.modes import default_device


@contextmanager
def converting_unobserved(*, in_mode: bool) -> Iterator[None]:
    """Within this context, what Dynamo converts is not seen by observers, and is for calls with and without any.

    By itself Dynamo looks into a function mode, writes what it does into the graph, and guards on what it holds: one
    that counts would get a graph at every call. Without, the mode sees the functions of the graph when it runs.

    What the frame itself depends on stays: gradients, autocast and its cache, cached parametrizations, inference mode,
    and the default device, which to torch is a function mode, too.

    Args:
        in_mode: True if a dispatch mode is on where the guards will be checked. They are on the dispatch keys of
            tensors, which such a mode adds to.
    """

    def make_guards(*args: Any, **kwargs: Any) -> None:
        with _Passing() if in_mode else nullcontext():
            guards_of(*args, **kwargs)

    guards_of = CheckFunctionManager.__init__
    with (
        unobserved(),
        without_trackers(),
        patch.object(GuardBuilder, "TORCH_FUNCTION_STATE", _guard_on_device),
        patch.object(CheckFunctionManager, "__init__", make_guards),
    ):
        yield


class _Passing(TorchDispatchMode):
    """Lets all operations pass."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def observes(code: CodeType) -> bool:
    """True for code of an observer that is open now, which is no part of the function: it has nothing to convert.

    Torch calls it while operations and modules run as they are written: modes, saved-tensor hooks, and hooks on all
    modules.
    """
    if code.co_name in ("__torch_function__", "__torch_dispatch__"):
        return True
    return any(getattr(hook, "__code__", None) is code for hook in (*global_hooks(), *saved_tensor_hooks()))


def _guard_on_device(builder: Any, guard: Any) -> None:
    """Add a guard on the default device alone, in place of one on all function modes."""
    device = default_device()
    said = [f"the default device is {device}"]
    builder.guard_manager.root.add_lambda_guard(lambda _: default_device() == device, said, guard.user_stack)


_guard_on_device.guard_check_spec = getattr(GuardBuilder.TORCH_FUNCTION_STATE, "guard_check_spec", None)  # type: ignore[attr-defined]
