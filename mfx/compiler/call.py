"""A call of a net in code that torch.compile compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from mfx.compat import compiling as compat_compiling
from mfx.compiler.call_site import forward_by, site_for
from mfx.compiler.ops import run, settle
from mfx.compiler.output_spec import is_plain
from mfx.program.codegen import BackendCompiler
from mfx_passes import MfxError

if TYPE_CHECKING:
    from mfx.compiler.callee import Callee
    from mfx.program.codegen import GraphCompiler
from torch import Tensor

_COMPILERS: list[tuple[Any, GraphCompiler]] = []  # with their backends, which can be compared but not hashed
_NONE = "mfx: None"  # which cannot be handed to code that Dynamo does not look into


class Plain:
    """A value that is part of the structure of what is returned: nothing but tensors can come out of such code."""

    def __init__(self, value: Any) -> None:
        self.value = value


pytree.register_pytree_node(
    Plain, lambda plain: ([], plain.value), lambda _, value: value, serialized_type_name="mfx.Plain"
)


def call(forward: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a net from the graph that is being compiled; Dynamo looks on."""
    if forward.bypassed:
        return type(forward.net).forward(forward.net, *args, **kwargs)
    if torch.compiler.is_exporting() or not forward.is_opaque:
        return _run_outside(forward, args, kwargs)
    arguments = pytree.tree_map(encode_none, (args, kwargs))
    parameters: set[Any] = set()
    held: tuple[list[Any], list[Any]] = [], []
    _gather(forward.net, *held, parameters, set())
    # A buffer that is a parameter's tensor, too, is the parameter.
    held = held[0], [buffer for buffer in held[1] if buffer not in parameters]
    returned = _run(forward.key, forward.net.training, held, arguments)
    return pytree.tree_map(_itself, returned)  # without Plain


def _gather(
    module: nn.Module, parameters: list[Any], buffers: list[Any], seen_parameters: set[Any], seen_buffers: set[Any]
) -> None:
    """The parameters and buffers of a module in its own order, each once.

    In the plainest Python: Dynamo looks on, and to follow the generators of `torch.nn.Module.parameters` through a
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


@compat_compiling.not_looked_into
def _run(key: str, training: bool, held: tuple[list[Any], list[Any]], arguments: Any) -> Any:
    """Called by compilers with tensors without values, and for real where there is no compiler but Dynamo."""
    forward, (args, kwargs) = forward_by(key), pytree.tree_map(_unmarked, arguments)
    if not compat_compiling.is_looked_at(held):
        return pytree.tree_map(_wrapped, forward.run(args, kwargs))
    try:
        return _opaque(forward, args, kwargs, *held)
    except MfxError as error:  # of which Dynamo says nothing
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
    return pytree.tree_map(_wrapped, site.assemble(results, [*inputs, *parameters, *buffers]))


def _device(*tensors: list[Any]) -> torch.device:
    """Where a net is: on an accelerator if any of its tensors is."""
    devices = [tensor.device for some in tensors for tensor in some]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _compiler() -> GraphCompiler:
    """What compiles the pieces of the net: the backend that compiles the code around it."""
    backend = compat_compiling.backend()
    for known, compiler in _COMPILERS:
        if known == backend:
            return compiler
    _COMPILERS.append((backend, BackendCompiler(backend)))
    return _COMPILERS[-1][1]


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="a net made by mfx.momentumize can be no part of this graph: because the graph is exported by strict "
    "tracing (use strict=False), or because the net is no one graph itself, or spread over processes"
)
def _run_outside(forward: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward.run(args, kwargs)


def encode_none(leaf: Any) -> Any:
    """Replace None by a mark that an opaque operation takes."""
    return _NONE if leaf is None else leaf


def _unmarked(leaf: Any) -> Any:
    return None if isinstance(leaf, str) and leaf == _NONE else leaf


def _wrapped(leaf: Any) -> Any:
    return Plain(leaf) if is_plain(leaf) else leaf


def _itself(leaf: Any) -> Any:
    return leaf


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="an mfx.MomentumNet runs its functions a second time in the backward pass, which torch.compile cannot take "
    "into its graph; compile the functions, or leave fullgraph False"
)
def run_outside(net: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a net outside of the graph that is being compiled."""
    return net.run(x, args, kwargs)
