"""Floating-point operations of single operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

_Formula = Callable[..., int]


def flops_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    """What an operation takes, a multiplication and an addition counted as two; 0 for what no formula is known of.

    The formulas are those of ``torch.utils.flop_counter``: matrix products, convolutions, attention.

    Args:
        func: the operation, as ``__torch_dispatch__`` is given it.
        args: its arguments.
        kwargs: its arguments by name.
        result: what it returned.
    """
    formula = _formulas().get(getattr(func, "_overloadpacket", None))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


@cache
def _formulas() -> Mapping[Any, _Formula]:
    from torch.utils import flop_counter

    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(flop_counter.sdpa_flop_count(q, k, v))

    def attention_backward(g: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(flop_counter.sdpa_backward_flop_count(g, q, k, v))

    aten, of_shapes = torch.ops.aten, flop_counter.shape_wrapper
    on_a_cpu: dict[Any, _Formula] = {  # which torch (2.11 to 2.15) has no formulas for
        aten._scaled_dot_product_flash_attention_for_cpu: of_shapes(attention),  # type: ignore[no-untyped-call]
        aten._scaled_dot_product_flash_attention_for_cpu_backward: of_shapes(attention_backward),  # type: ignore[no-untyped-call]
    }
    return {**on_a_cpu, **flop_counter.flop_registry}
