"""Floating-point operations of what runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FlopCount"]


class FlopCount(TorchDispatchMode):
    """Counts by the formulas of ``torch.utils.flop_counter`` (matrix products, convolutions, attention).

    Unlike torch's own counter it does not follow modules, whose hooks a step that runs twice would confuse.

    Attributes:
        total: operations so far, a multiplication and an addition counted as two.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _formulas().get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


@cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    from torch.utils import flop_counter

    def attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape)

    def attention_backward(g: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return flop_counter.sdpa_backward_flop_count(g.shape, q.shape, k.shape, v.shape)

    on_a_cpu = {  # which torch has no formulas for
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    return {**on_a_cpu, **flop_counter.flop_registry}
