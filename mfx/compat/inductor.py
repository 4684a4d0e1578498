"""Privates of Inductor: one loop for a graph of elementwise operations.

All were read in torch 2.13 to 2.14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from mfx import compat

_EXAMPLE = 2**17  # elements; the compiled loop is for any number of them
_NARROW = 2**31  # fewer elements are counted in 32 bits, where that is quicker


def elementwise(graph: Graph) -> Callable[..., None]:
    """Compile a graph of elementwise operations, which writes into its inputs, to one loop by Inductor.

    The function is called without Dynamo and autograd: their checks in every call take ten times as long as the loop
    over a few thousand elements. So the caller must see to it that the inputs are plain tensors, one-dimensional, and
    always of the same dtypes.

    Args:
        graph: its inputs are tensors of one size; only the last may be of another one.

    Returns:
        A function of None (see `mfx.program.codegen.GraphCompiler`) and the inputs.
    """
    made: dict[tuple[torch.device, bool, int], Callable[[list[Tensor]], Any]] = {}

    def run(root: None, *tensors: Tensor) -> None:
        first, last = tensors[0], tensors[-1]
        size = first.numel()
        constants = 0 if last.numel() == size else last.numel()
        key = first.device, size < _NARROW, constants
        if key not in made:
            made[key] = _compiled(graph, tensors, size if size >= _NARROW else _EXAMPLE, bool(constants))
        made[key](list(tensors))

    return run


def _compiled(graph: Graph, tensors: Sequence[Tensor], size: int, has_constants: bool) -> Callable[[list[Tensor]], Any]:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.utils import BoxedBool
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    with compat.without_modes(), torch.no_grad():
        mode = FakeTensorMode(shape_env=ShapeEnv())
        any_size: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK])
        same = tensors[:-1] if has_constants else tensors
        examples = [torch.empty(size, dtype=t.dtype, device=t.device) for t in same]
        inputs = [mode.from_tensor(example, symbolic_context=any_size) for example in examples]
        inputs += [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors[len(same) :]]
        with mode:
            traced = make_fx(GraphModule(nn.Module(), graph), decomposition_table=select_decomp_table())(*inputs)
        compiled: Any = compile_fx_inner(traced, inputs, cudagraphs=BoxedBool(False))
    return lambda values: compiled(values)
