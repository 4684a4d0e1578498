"""Step times that a device's bandwidth and products allow: what launches and Python cost is left out.

Every operation of a plain step takes the longer of two times: that of its products at 55 % of the chip's peak, and that
of reading its arguments and writing its results at 85 % of its bandwidth. A checkpoint runs branches once more. mfx
does the same, and its kernels read and write a few tensors of the stream at every step: `BYTES`, which a test counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import mfx
from examples.benchmarks.on_gpu.methods import CHECKPOINT, EXACT, FLOAT, GAMMA_0, PLAIN, Training
from examples.benchmarks.on_gpu.models import Model, with_checkpoints
from mfx.engine.arithmetic import ARITHMETICS
from mfx.engine.memory.storage import Stream, walks_back
from mfx.options.gamma import Gamma

BANDWIDTH, PRODUCTS = 0.85, 0.55  # shares of the peak that are reached

# Bytes per element of the stream and step that the kernels read and write: forward, back, and for gradients. The store
# of digits takes one byte, as it does up to 37 steps at γ = 0.9.
BYTES: Mapping[tuple[str, torch.dtype], tuple[int, int, int]] = {
    (EXACT, torch.float32): (42, 42, 12),
    (EXACT, torch.bfloat16): (38, 38, 12),
    (FLOAT, torch.float32): (20, 20, 12),
    (FLOAT, torch.bfloat16): (20, 20, 12),
}


@dataclass(frozen=True)
class Chip:
    """A device: bytes per second, and products' operations per second by dtype."""

    name: str
    bandwidth: float
    products: Mapping[torch.dtype, float]


def _chip(name: str, terabytes: float, half: float, single: float) -> Chip:
    return Chip(name, terabytes * 1e12, {torch.bfloat16: half * 1e12, torch.float32: single * 1e12})


# Data sheets, dense; float32 in TF32 where there is that.
H100 = _chip("H100", 3.35, 989, 494)
CHIPS = (
    _chip("H200", 4.8, 989, 494),
    H100,
    _chip("B200", 8.0, 2250, 1100),
    _chip("A100", 2.04, 312, 156),
    _chip("L40S", 0.864, 362, 183),
    _chip("4090", 1.008, 165, 82.6),
    _chip("MI300X", 5.3, 1307, 654),
)


def chip(name: str) -> Chip:
    """Return the chip that a device's name tells of; an H100 if none."""
    return next((known for known in CHIPS if known.name in name), H100)


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
    """Attention as the one kernel that it is on a GPU; without a device it would be products and a softmax."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    return out


class _Seconds(TorchDispatchMode):
    """Sums the time of every operation on a chip."""

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.chip, self.total = chip, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its time."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given, results = ([t for t in tree_iter(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or not results or "empty" in func.name() or func.name() == "aten::detach":
            return out
        moved = sum(t.nbytes for t in (*given, *results)) / (BANDWIDTH * self.chip.bandwidth)
        formula = flop_registry.get(func.overloadpacket)
        work = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        peak = self.chip.products.get(results[0].dtype, self.chip.products[torch.float32])
        self.total += max(moved, work / (PRODUCTS * peak))
        return out


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step.

    Attributes:
        chip: the device's name.
        seconds: by method.
    """

    chip: str
    seconds: Mapping[str, float]

    def ratio(self, method: str, to: str = PLAIN) -> float | None:
        """Return a method's time over another's; None if it is not predicted."""
        return self.seconds[method] / self.seconds[to] if method in self.seconds else None


def predict(model: Model, on: Chip = H100) -> Prediction:
    """Predict a training step by the methods that run without a compiler; nothing is computed.

    Args:
        model: of models that are captured without a call, whose steps lie in modules that return the stream.
        on: the device.
    """
    net, x = model.built("meta"), model.input("meta")
    plain, again = (_seconds(each, x, on) for each in (net, with_checkpoints(net)))
    states = {method: _moved(method, net, x) for method in (EXACT, FLOAT)}
    each = {method: again + moved / (BANDWIDTH * on.bandwidth) for method, moved in states.items()}
    return Prediction(on.name, {PLAIN: plain, CHECKPOINT: again, GAMMA_0: again, **each})


def _seconds(net: nn.Module, x: Tensor, on: Chip) -> float:
    step = Training(net, x)
    with mock.patch.object(F, "scaled_dot_product_attention", _flash):
        step()  # gradients are there from the second step on
        with _Seconds(on) as counter:
            step()
    return counter.total


def _moved(method: str, net: nn.Module, x: Tensor) -> int:
    """Return the bytes that the kernels of all chains read and write in a step; where inputs are kept, none go back."""
    arithmetic = ARITHMETICS["exact" if method == EXACT else "float"]
    total = 0
    for chain in mfx.explain(mfx.momentumize(net)).chains:
        out = _output(net, x, chain.steps[0].path)
        stream = Stream(tuple(out.shape), out.dtype, len(chain.steps))
        walks = walks_back(arithmetic, Gamma.of(0.9), [stream])
        forward, back, gradients = BYTES[method if walks else FLOAT, out.dtype]
        total += len(chain.steps) * out.numel() * (forward + gradients + (back if walks else 0))
    return total


def _output(net: nn.Module, x: Tensor, path: str) -> Tensor:
    """Return what a module returns in a call of the net."""
    seen: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[0]


def table(predictions: Mapping[str, Prediction]) -> str:
    """Return predictions by the model's name as a Markdown table."""
    methods = (CHECKPOINT, FLOAT, EXACT)
    lines = [
        "| predicted, to plain | " + " | ".join(methods) + " | exact to checkpoint |",
        "|---|" + "--:|" * (len(methods) + 1),
    ]
    for name, found in predictions.items():
        ratios = [*(found.ratio(method) for method in methods), found.ratio(EXACT, CHECKPOINT)]
        lines.append(f"| {name}, {found.chip} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)
