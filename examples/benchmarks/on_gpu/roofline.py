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

import mfx
from examples.benchmarks.on_gpu.methods import CHECKPOINT, EXACT, FLOAT, GAMMA_0, PLAIN, Training
from examples.benchmarks.on_gpu.models import Model, with_checkpoints
from mfx.engine.arithmetic import ARITHMETICS
from mfx.engine.memory.storage import Stream, walks_back
from mfx.options.gamma import Gamma
from mfx.reports.plan.roofline import BANDWIDTH, CHIPS, H100, Chip, SecondsCounter, bytes_of_kernels

# Bytes per element of the stream and step that the kernels read and write: forward, back, and for gradients. The store
# of digits takes one byte, as it does up to 37 steps at γ = 0.9.
BYTES: Mapping[tuple[str, torch.dtype], tuple[int, int, int]] = {
    (method, dtype): bytes_of_kernels(kind, dtype)
    for method, kind in ((EXACT, "exact"), (FLOAT, "float"))
    for dtype in (torch.float32, torch.bfloat16)
}


def chip(name: str) -> Chip:
    """Return the chip that a device's name tells of; an H100 if none."""
    return next((known for known in CHIPS if known.name in name), H100)


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
    """Attention as the one kernel that it is on a GPU; without a device it would be products and a softmax."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
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
        with SecondsCounter(on) as counter:
            step()
    return counter.seconds


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
