"""Every torch private that mfx leans on, with the version it was read in."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "NO_TASK",
    "OPAQUE_TAGS",
    "above_autograd",
    "autocast_as",
    "autocast_state",
    "class_before_sharding",
    "compiled_model",
    "current_task",
    "fake_mode",
    "fake_mode_of",
    "has_modes",
    "is_fake",
    "is_group",
    "is_inductor",
    "is_sharded",
    "keeps_graph",
    "leaves_of",
    "memory_of",
    "modes",
    "modes_left",
    "outside_of_export",
    "plain_transformer_layers",
    "runs_for_real",
    "shards_of",
    "share_shards",
    "under_transform",
    "when_task_ends",
    "without_modes",
]

NO_TASK = -1

# Of an operation that draws random numbers, and looks at memory that only the CPU knows of.
OPAQUE_TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)


def current_task() -> int:
    """A number for the backward pass that this thread is in, ``NO_TASK`` outside one (torch 2.11 to 2.15)."""
    return torch._C._current_graph_task_id()


def when_task_ends(callback: Callable[[], None]) -> None:
    """Have ``callback`` called when the backward pass that this thread is in has ended (torch 2.11 to 2.15)."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def under_transform() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is around (torch 2.11 to 2.15)."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


AutocastState = tuple[torch.dtype, bool, bool]


def autocast_state(device_type: str) -> AutocastState:
    """Autocast for ``device_type``: its dtype, whether it is on, whether it caches (torch 2.11 to 2.15)."""
    return (
        torch.get_autocast_dtype(device_type),
        torch.is_autocast_enabled(device_type),
        torch.is_autocast_cache_enabled(),
    )


def modes() -> tuple[bool, ...]:
    """What a model may switch while it runs: gradients, autocast, and which kernels of attention may be taken."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@contextmanager
def modes_left() -> Iterator[None]:
    """After the block, modes are what they were, even if it failed before it could leave those that it had entered."""
    grad, *_, flash, efficient, math, cudnn = modes()
    depth, states = _autocast_depth(), {kind: autocast_state(kind) for kind in ("cpu", "cuda")}
    try:
        yield
    except BaseException:
        for _ in range(_autocast_depth() - depth):
            torch.autocast_decrement_nesting()
        if not depth:
            torch.clear_autocast_cache()
        for kind, (dtype, enabled, caches) in states.items():
            torch.set_autocast_dtype(kind, dtype)
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_cache_enabled(caches)
        torch.backends.cuda.enable_flash_sdp(flash)
        torch.backends.cuda.enable_mem_efficient_sdp(efficient)
        torch.backends.cuda.enable_math_sdp(math)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        raise
    finally:
        torch.set_grad_enabled(grad)


def _autocast_depth() -> int:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def autocast_as(device_type: str, state: AutocastState) -> AbstractContextManager[object]:
    """A context that puts autocast for ``device_type`` into that state."""
    dtype, enabled, caches = state
    return torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=caches)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, which FSDP2 swaps for plain tensors while it computes."""
    return hasattr(tensor, "device_mesh")


def shards_of(module: nn.Module) -> Any:
    """What ``fully_shard`` keeps about ``module``, None if it was not applied to it (torch 2.13 to 2.15)."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nobody has sharded anything before importing it
    return module._get_fsdp_state() if fsdp is not None and isinstance(module, fsdp.FSDPModule) else None


def class_before_sharding(module: nn.Module) -> type:
    """The class that ``module`` had before ``fully_shard`` (torch 2.13 to 2.15)."""
    sharded, _, before, *_ = type(module).__mro__
    assert sharded.__bases__[1] is before
    return before


def is_group(shards: Any) -> bool:
    """Whether several modules were sharded in one call (torch 2.13 to 2.15)."""
    return len(shards._modules) > 1


def share_shards(module: nn.Module, copied: nn.Module, copies: Mapping[int, Any]) -> None:
    """Let ``copied`` have the shards of ``module``, as modules that share parameters have them (torch 2.13 to 2.15).

    ``copies`` has the copies of the modules inside, by identity.
    """
    from torch.distributed._composable_state import _insert_module_state

    shards = shards_of(module)
    copied.__class__ = type(module)
    _insert_module_state(copied, shards)
    for group in shards._fsdp_param_groups:
        for info in (param._module_info for param in group.fsdp_params):
            holders = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
            for holder, name in holders:
                if id(holder) in copies:
                    info.shared_modules.append(copies[id(holder)])
                    info.shared_param_names.append(name)


def above_autograd() -> AbstractContextManager[object]:
    """A context in which operations are recorded by autograd, also inside an operation (torch 2.11 to 2.15)."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def memory_of(storage: torch.UntypedStorage) -> int:
    """A number that tells a storage from all others alive, also where it holds nothing (torch 2.11 to 2.15)."""
    return int(storage._cdata)


def compiled_model(module: nn.Module) -> nn.Module | None:
    """The model that ``torch.compile`` made this module of; None if it is no such module (torch 2.11 to 2.15)."""
    dynamo = sys.modules.get("torch._dynamo")  # whoever has compiled something has imported it
    return module._orig_mod if dynamo is not None and isinstance(module, dynamo.OptimizedModule) else None


def keeps_graph() -> bool:
    """Whether the backward pass that this thread is in was told to keep its graph (torch 2.11 to 2.15)."""
    return current_task() == NO_TASK or torch._C._autograd._get_current_graph_task_keep_graph()


def fake_mode_of(tensors: Sequence[Tensor]) -> Any:
    """The mode in which tensors without values were made, None if there are none (torch 2.11 to 2.15)."""
    return torch._guards.detect_fake_mode(list(tensors))


def has_modes() -> bool:
    """Whether anybody looks on at operations, in a mode of this thread's (torch 2.11 to 2.15)."""
    return torch._C._len_torch_dispatch_stack() > 0


def without_modes() -> AbstractContextManager[object]:
    """A context in which operations are what they are without anybody looking on (torch 2.11 to 2.15)."""
    return _disable_current_modes()


def leaves_of(tensors: Sequence[Tensor]) -> set[int]:
    """Identities of the leaves of the autograd graph that tensors are computed from (torch 2.11 to 2.15)."""
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


@contextmanager
def plain_transformer_layers() -> Iterator[None]:
    """Have ``nn.TransformerEncoderLayer`` go the way that training takes, without its fused shortcut for inference.

    The shortcut decides by looking at shapes, which a symbolic trace does not have (torch 2.11 to 2.15).
    """
    from torch.nn.modules import transformer

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # The length is asked for by nothing but the guess whether a mask is causal: a hint that changes no value.
        with (
            patch.object(transformer, "_get_seq_len", _no_length),
            patch.object(transformer, "_detect_is_causal_mask", _is_marked_causal),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _no_length(src: Tensor, batch_first: bool) -> None:
    return None


def _is_marked_causal(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextmanager
def fake_mode() -> Iterator[Any]:
    """A mode in which tensors have shapes, dtypes and devices but no values; what fails in it is not logged.

    Read in torch 2.11 to 2.15.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, unlogged():
        yield mode


@contextmanager
def unlogged() -> Iterator[None]:
    """Within this context, what fails on tensors without values is an exception alone, and no lines on stderr, too."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


@contextmanager
def outside_of_export() -> Iterator[None]:
    """If torch.export looks on: without its modes, in which new tensors have no values and which Dynamo minds.

    Read in torch 2.13 to 2.14.
    """
    if not torch.compiler.is_exporting():
        yield
        return
    modes = _get_current_function_mode_stack()
    _replace_function_modes([mode for mode in modes if type(mode).__module__ not in _EXPORT])
    try:
        with _disable_current_modes():
            yield
    finally:
        _replace_function_modes(modes)


_EXPORT = ("torch._export.non_strict_utils", "torch.export._safeguard", "torch.fx.experimental.proxy_tensor")


def _replace_function_modes(modes: Sequence[Any]) -> None:
    for _ in _get_current_function_mode_stack():
        _pop_mode()
    for mode in modes:
        _push_mode(mode)


def is_fake(value: object) -> bool:
    """Whether a value is a tensor without data, made in a fake mode (torch 2.11 to 2.15)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def runs_for_real() -> bool:
    """False while torch.compile, torch.export or another fake mode looks at the code instead of running it."""
    return not torch.compiler.is_compiling() and torch._guards.detect_fake_mode() is None


def is_inductor(backend: object) -> bool:
    """Whether a backend of torch.compile, or its name, is Inductor; torch.compile itself names it so (2.11 to 2.14)."""
    return getattr(backend, "compiler_name", backend) == "inductor"
