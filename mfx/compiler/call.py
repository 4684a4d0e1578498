"""Calls of a net from code that torch.compile compiles, traced by Dynamo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mfx.compat import compiling as compat_compiling
from mfx.compiler.call_site import forward_by, site_for
from mfx.compiler.callee import Callee
from mfx.compiler.ops import run, settle
from mfx.compiler.output_spec import is_plain
from mfx.program.codegen import BackendCompiler, GraphCompiler
from mfx_passes import MfxError

_COMPILERS: list[tuple[Any, GraphCompiler]] = []  # with their backends, which compare but do not hash
_NONE = "mfx: None"  # stands for None, which code that Dynamo does not trace cannot take


class Plain:
    """A returned value in the tree structure of a result: such code can return nothing but tensors as leaves."""

    def __init__(self, value: Any) -> None:
        self.value = value


pytree.register_pytree_node(
    Plain, lambda plain: ([], plain.value), lambda _, value: value, serialized_type_name="mfx.Plain"
)


def call(forward: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a net from the graph that is being compiled; Dynamo traces this function."""
    if forward.bypassed:
        return type(forward.net).forward(forward.net, *args, **kwargs)
    if torch.compiler.is_exporting() or not forward.is_opaque:
        return _run_net_outside(forward, args, kwargs)
    arguments = pytree.tree_map(encode_none, (args, kwargs))
    parameters: set[Any] = set()
    held: tuple[list[Any], list[Any]] = [], []
    _gather(forward.net, *held, parameters, set())
    # A tensor that is both a buffer and a parameter counts as the parameter.
    held = held[0], [buffer for buffer in held[1] if buffer not in parameters]
    returned = _run(forward.key, forward.net.training, held, arguments)
    return pytree.tree_map(_unchanged, returned)  # without Plain


def _gather(
    module: nn.Module, parameters: list[Any], buffers: list[Any], seen_parameters: set[Any], seen_buffers: set[Any]
) -> None:
    """Collect the parameters and buffers of a module in its own order, each once.

    In the plainest Python, because Dynamo traces it: to follow the generators of `torch.nn.Module.parameters` through a
    model of many layers takes it a quarter of the time that the model takes to compile.
    """
    for tensors, found, seen in (
        (module._parameters, parameters, seen_parameters),
        (module._buffers, buffers, seen_buffers),
    ):
        for tensor in tensors.values():
            if tensor is not None and tensor not in seen:
                seen.add(tensor)
                found.append(tensor)
    for child in module._modules.values():
        if child is not None:
            _gather(child, parameters, buffers, seen_parameters, seen_buffers)


@compat_compiling.called_as_it_is
def _run(key: str, training: bool, held: tuple[list[Any], list[Any]], arguments: Any) -> Any:
    """Run the net: compilers call this on fake tensors, and Dynamo without a compiler on real ones."""
    forward, (args, kwargs) = forward_by(key), pytree.tree_map(decode_none, arguments)
    if not compat_compiling.has_fake(held):
        forward.refuse_copies()
        return pytree.tree_map(_wrap_plain, forward.run(args, kwargs))
    try:
        forward.refuse_copies()
        return _opaque(forward, args, kwargs, *held)
    except MfxError as error:  # which Dynamo does not show
        forward.warn(str(error))
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        forward.warn(f"{type(forward.net).__name__} raised an error when torch.compile looked at this call. {what}")
        raise


def _opaque(forward: Callee, args: Any, kwargs: Any, parameters: list[Any], buffers: list[Any]) -> Any:
    site, inputs = site_for(forward, args, kwargs, [*parameters, *buffers], _compiler())
    *results, token = run(site.key, inputs, [*parameters, *buffers], device=_device(parameters, buffers, inputs))
    if buffers:
        settle(token, buffers)
    return pytree.tree_map(_wrap_plain, site.assemble(results, [*inputs, *parameters, *buffers]))


def _device(*tensors: list[Any]) -> torch.device:
    """Return the device of a net: an accelerator if any of its tensors is on one."""
    devices = [tensor.device for some in tensors for tensor in some]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _compiler() -> GraphCompiler:
    """Return the compiler of the net's pieces, by the backend that compiles the code around it."""
    backend = compat_compiling.backend()
    for known, compiler in _COMPILERS:
        if known == backend:
            return compiler
    _COMPILERS.append((backend, BackendCompiler(backend)))
    return _COMPILERS[-1][1]


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a net made by mfx.momentumize cannot be part of this graph: because the graph is exported by strict "
    "tracing (use strict=False), or because the net is not one graph itself, or spread over processes"
)
def _run_net_outside(forward: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    forward.refuse_copies()
    return forward.run(args, kwargs)


def encode_none(leaf: Any) -> Any:
    """Replace None by a string that an opaque operation takes."""
    return _NONE if leaf is None else leaf


def decode_none(leaf: Any) -> Any:
    """Undo `encode_none`."""
    return None if isinstance(leaf, str) and leaf == _NONE else leaf


def _wrap_plain(leaf: Any) -> Any:
    return Plain(leaf) if is_plain(leaf) else leaf


def _unchanged(leaf: Any) -> Any:
    return leaf


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="an mfx.MomentumNet runs its functions a second time in the backward pass, which torch.compile cannot take "
    "into its graph; compile the functions, or leave fullgraph False"
)
def run_outside(net: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a net, anything with ``run``, outside of the compiled graph (a graph break)."""
    return net.run(x, args, kwargs)
