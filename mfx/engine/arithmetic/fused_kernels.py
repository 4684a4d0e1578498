"""The kernels of exact arithmetic as one graph each, for a compiler that makes one loop of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Tracer
from typing_extensions import override

from mfx.compat import has_modes
from mfx.engine.arithmetic.blocks import flat, is_plain
from mfx.engine.arithmetic.integers import ONE
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels
from mfx.engine.arithmetic.signed import Signed, UpdateGamma
from mfx.options.gamma import Gamma

_WORTH = 2**14  # elements; for fewer of them a CPU saves less than compiling takes


class FusedKernels(Kernels):
    """Functions that a compiler has made of graphs.

    γ and the number of elements are not part of a graph, so one graph serves them all.

    Args:
        compiler: makes a function of a graph. The functions are called with plain tensors, one-dimensional and of one
            size, and write into some of them; the last one may be of another size.
    """

    def __init__(self, compiler: Callable[[Graph], Callable[..., Any]]) -> None:
        self._compiler = compiler
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    @override
    def advance(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, out: Tensor, kind: str, gamma: UpdateGamma) -> None:
        if isinstance(gamma, Signed) or not _is_worth_it(x, v, top, y, out):
            return BLOCK_KERNELS.advance(x, v, top, y, out, kind, gamma)
        return self._run(_advance, kind, x, v, top, y, out, numbers=_numbers(gamma, x.device))

    @override
    def retreat_x(self, x: Tensor, v: Tensor, out: Tensor) -> None:
        if not _is_worth_it(x, v, out):
            return BLOCK_KERNELS.retreat_x(x, v, out)
        return self._run(_retreat_x, "", x, v, out)

    @override
    def retreat_v(self, x: Tensor, v: Tensor, top: Tensor, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        if isinstance(gamma, Signed) or not _is_worth_it(x, v, top, y):
            return BLOCK_KERNELS.retreat_v(x, v, top, y, kind, gamma)
        return self._run(_retreat_v, kind, x, v, top, y, numbers=_numbers(gamma, x.device))

    def _run(self, kernel: Any, kind: str, *tensors: Tensor, numbers: Tensor | None = None) -> None:
        dtypes = tuple([tensor.dtype for tensor in tensors])
        compiled = self._compiled.get(key := (kernel, kind, dtypes))
        if compiled is None:
            graph = _graph(partial(kernel, kind, dtypes), len(dtypes), has_numbers=numbers is not None)
            compiled = self._compiled[key] = self._compiler(graph)
        with torch.no_grad():
            parts = [flat(tensor, tensors[0]) for tensor in tensors]
            compiled(None, *parts, *([] if numbers is None else [numbers]))


def _is_worth_it(*tensors: Tensor) -> bool:
    """True if the tensors are large enough, ordinary memory, and no mode observes operations."""
    first = tensors[0]
    if first.numel() < (_WORTH if first.device.type == "cpu" else 1):
        return False
    return all(map(is_plain, tensors)) and not has_modes()


@lru_cache(maxsize=256)
def _numbers(gamma: Gamma, device: torch.device) -> Tensor:
    """Return 1−γ, n and d of γ = n/d as a tensor, which is made on the device: a copy would wait for it."""
    values = gamma.complement, gamma.numerator, gamma.denominator
    return torch.stack([torch.full((), value, dtype=torch.float64, device=device) for value in values])


def _graph(kernel: Callable[..., None], count: int, *, has_numbers: bool) -> Graph:
    """Return the operations of a kernel on so many tensors as a graph."""
    graph = Graph()
    tracer = Tracer()
    tracer.graph = graph
    names = [*(f"t{i}" for i in range(count)), *(["numbers"] if has_numbers else [])]
    inputs = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
    kernel(*inputs)
    tracer.create_proxy("output", "output", ((),), {})
    return graph


# The functions below are called with proxies. Formulas as in `kernels` and `digit_store`; the dtypes are those of the
# tensors.


def _advance(kind: str, dtypes: Any, x: Any, v: Any, top: Any, y: Any, out: Any, numbers: Any) -> None:
    complement, n, d = _unpacked(numbers)
    v_next, top_next = _scaled(v, top, n, d)
    v_next = v_next + _increment(y, x, kind, complement)
    x_next = x + v_next
    for tensor, value in ((v, v_next), (top, top_next), (x, x_next), (out, _read(x_next, dtypes[-1]))):
        tensor.copy_(value)


def _retreat_x(kind: str, dtypes: Any, x: Any, v: Any, out: Any) -> None:
    before = x - v
    x.copy_(before)
    out.copy_(_read(before, dtypes[-1]))


def _retreat_v(kind: str, dtypes: Any, x: Any, v: Any, top: Any, y: Any, numbers: Any) -> None:
    complement, n, d = _unpacked(numbers)
    before, top_before = _scaled(v - _increment(y, x, kind, complement), top, d, n)
    v.copy_(before)
    top.copy_(top_before)


def _unpacked(numbers: Any) -> tuple[Any, Any, Any]:
    return numbers[0], numbers[1].to(torch.int64), numbers[2].to(torch.int64)


def _scaled(v: Any, top: Any, n: Any, d: Any) -> tuple[Any, Any]:
    """Return V·n/d and the top after that."""
    q = torch.div(v, d, rounding_mode="floor")
    w = v + (top - q) * d
    t = torch.div(w, n, rounding_mode="floor")
    return w + (q - t) * n, t


def _increment(y: Any, x: Any, kind: str, complement: Any) -> Any:
    y = y.to(torch.float64)
    if kind == "residual":
        return torch.round(y * (complement * ONE)).to(torch.int64)
    f = torch.round(y * ONE).to(torch.int64) - x
    return torch.round(f.to(torch.float64) * complement).to(torch.int64)


def _read(x: Any, dtype: torch.dtype) -> Any:
    value = x.to(torch.float64) * (1 / ONE)
    # As a CPU does where there is no conversion from float64.
    return value.to(torch.float32).to(dtype) if dtype.itemsize < 4 else value.to(dtype)
