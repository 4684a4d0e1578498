"""Privates of autograd, the dispatcher and storages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph as autograd_graph
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

NO_TASK = -1

# For an operation that draws random numbers and reads memory that only the CPU can address.
OPAQUE_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)


# Returns the number of the backward pass that this thread is in, ``NO_TASK`` outside one (torch 2.11 to 2.15). It is
# asked for every saved tensor.
current_task: Callable[[], int] = torch._C._current_graph_task_id

# What ``torch.enable_grad`` and its kin call (read in torch 2.14): around every step that runs again.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def when_task_ends(callback: Callable[[], None]) -> None:
    """Have ``callback`` called when the backward pass that this thread is in has ended (torch 2.11 to 2.15)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def around_engine(call: Callable[..., Any]) -> None:
    """From now on, run all of autograd's backward passes by ``call``, with what runs one in front (torch 2.11 to 2.15).

    Calls that are there already stay, each once.
    """
    if call not in _AROUND:
        _AROUND.append(call)
        engine = autograd_graph._engine_run_backward
        run = wraps(engine)(partial(call, engine))
        torch.autograd._engine_run_backward = autograd_graph._engine_run_backward = run  # type: ignore[attr-defined]


_AROUND: list[Callable[..., Any]] = []


def is_batched(tensor: Tensor) -> bool:
    """True if a tensor stands for several, as in a backward pass with ``is_grads_batched`` (torch 2.11 to 2.15)."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def above_autograd() -> AbstractContextManager[object]:
    """Return a context in which autograd records operations, also inside an operation (torch 2.11 to 2.15)."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def memory_of(storage: torch.UntypedStorage) -> int:
    """Return a number that no other living storage has, also if it holds nothing (torch 2.11 to 2.15)."""
    return int(storage._cdata)


def keeps_graph() -> bool:
    """True if the backward pass that this thread is in keeps its graph, or there is none (torch 2.11 to 2.15)."""
    return current_task() == NO_TASK or torch._C._autograd._get_current_graph_task_keep_graph()


def operations_so_far() -> int:
    """Return the number of operations that this thread has recorded for a backward pass (torch 2.11 to 2.15)."""
    return int(torch._C._autograd._get_sequence_nr())


def bytes_made_since(number: int, roots: Iterable[Tensor | GradientEdge]) -> tuple[int, int]:
    """Return what recorded operations took that ``roots`` come from (torch 2.11 to 2.15).

    Nothing is unpacked: what an operation saves is told by names, sizes by what autograd notes of values. Views take
    none.

    Args:
        number: of the first operation that counts, see `operations_so_far`.
        roots: tensors, or edges of the graph.

    Returns:
        The bytes that the operations saved, and the most that one of them reads and gives.
    """
    waiting = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
    saved: dict[Any, int] = {}
    seen, passing = set(), 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen or not _is_since(node, number):
            continue
        seen.add(node)
        before = [following for following, _ in node.next_functions if following is not None]
        waiting += before
        inputs = [other for other in before if _is_since(other, number)]
        passing = max(passing, sum(map(_bytes_given, [node, *inputs])))
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                is_own = name.removeprefix("_raw_saved_").startswith(("result", "output", "out"))
                saved.update((other, _bytes_given(other)) for other in ([node] if is_own else inputs))
        if hasattr(type(node), "saved_tensors"):  # a function written in Python: anything
            saved.update((other, _bytes_given(other)) for other in (node, *inputs))
    return sum(saved.values()), passing


def _is_since(node: Any, number: int) -> bool:
    return not hasattr(node, "variable") and int(node._sequence_nr()) >= number


def _bytes_given(node: Any) -> int:
    """Return the bytes of an operation's values; those of a view are its base's."""
    if node.name().startswith(_VIEWS):
        return max((_bytes_given(before) for before, _ in node.next_functions if before is not None), default=0)
    return sum(math.prod(value.shape) * value.dtype.itemsize for value in node._input_metadata)


_VIEWS = tuple(
    f"{name}Backward"
    for name in (
        "Alias", "AsStrided", "Detach", "Diagonal", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Split",
        "SplitWithSizes", "Squeeze", "T", "Transpose", "Unbind", "Unsqueeze", "UnsafeView", "View", "ViewAsReal",
    )
)  # fmt: skip


def leaves_of(tensors: Sequence[Tensor]) -> set[int]:
    """Return the identities of the leaves of the autograd graph of some tensors (torch 2.11 to 2.15)."""
    nodes = {tensor.grad_fn for tensor in tensors}
    leaves = {id(tensor) for tensor in tensors if tensor.grad_fn is None}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for following, _ in node.next_functions:
            if following not in nodes:
                nodes.add(following)
                waiting.append(following)
    return leaves


def accumulates() -> bool:
    """True if autograd is accumulating a gradient on a leaf in this thread (torch 2.11 to 2.15)."""
    return hasattr(torch._C._current_autograd_node(), "variable")


def shapes_accumulated_next() -> set[torch.Size]:
    """Return the shapes of the leaves to which the node that autograd runs hands gradients (torch 2.11 to 2.15)."""
    node = torch._C._current_autograd_node()
    following = () if node is None else node.next_functions
    return {leaf.shape for after, _ in following if (leaf := getattr(after, "variable", None)) is not None}


def put_accumulate_hook_first(leaf: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Register a hook that runs before a leaf's other hooks on its accumulated gradient (torch 2.11 to 2.15)."""
    handle: RemovableHandle = leaf.register_post_accumulate_grad_hook(hook)
    hooks: dict[int, Any] = leaf._post_accumulate_grad_hooks
    others = [(number, other) for number, other in hooks.items() if number != handle.id]
    for number, other in others:  # autograd reads the plain dictionary under an ordered one
        del hooks[number]
        hooks[number] = other
    return handle


def next_node() -> int:
    """Return the number that autograd gives the next node of a graph made in this thread (torch 2.11 to 2.15)."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def running_node() -> int:
    """Return the number of the node that autograd runs in this thread, -1 if it runs none (torch 2.11 to 2.15)."""
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else node._sequence_nr()
