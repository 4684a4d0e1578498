"""A counter of floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mfx.compat import unprofiled

_Formula = Callable[..., int]


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of everything that runs inside it.

    The formulas are those of ``torch.utils.flop_counter``: matrix products, convolutions, attention. Unlike torch's own
    counter it does not follow modules: a recomputed step would confuse its hooks.

    Attributes:
        flops: operations so far, a multiplication and an addition counted as two.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with unprofiled():  # a profiler has seen it on its way here
            result = func(*args, **kwargs)
        if (formula := _formulas().get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


@cache
def _formulas() -> Mapping[Any, _Formula]:
    from torch.utils import flop_counter

    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(flop_counter.sdpa_flop_count(q, k, v))

    def attention_backward(g: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return int(flop_counter.sdpa_backward_flop_count(g, q, k, v))

    aten, of_shapes = torch.ops.aten, flop_counter.shape_wrapper
    formulas = dict(flop_counter.flop_registry)
    for kernel in ("flash_attention_for_cpu", "fused_attention_overrideable", "attention_math_for_mps"):
        # torch (2.11 to 2.15) has no formulas for these
        for name, formula in ((kernel, attention), (f"{kernel}_backward", attention_backward)):
            if (operation := getattr(aten, f"_scaled_dot_product_{name}", None)) is not None:
                formulas.setdefault(operation, of_shapes(formula))  # type: ignore[no-untyped-call]
    return formulas
