"""The ways to train a model that `gpu.py` compares, and one step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

import mfx
from examples.benchmarks.on_gpu.models import with_checkpoints

Call = Callable[[Tensor], Tensor]
PLAIN, CHECKPOINT = "plain", "checkpoint"
GAMMA_0, FLOAT, EXACT = "mfx, γ = 0", "mfx, float", "mfx, exact"
EAGER = (PLAIN, CHECKPOINT, GAMMA_0, FLOAT, EXACT)
BUDGET = 0.5
COMPILED = ("compiled", f"compiled, budget {BUDGET}", *(f"compiled, {name}" for name in EAGER[1:]))


def made(method: str, model: nn.Module) -> Call:
    """Return a model trained by a method, over the same parameters."""
    if method in COMPILED:
        torch.compiler.reset()  # else, after a few models with the same code, Dynamo compiles no more
    if method == "compiled":
        return torch.compile(model)
    if method == COMPILED[1]:
        return torch.compile(model, backend=_within_budget)
    if method.startswith("compiled, "):
        return torch.compile(made(method.removeprefix("compiled, "), model))  # type: ignore[arg-type]
    options: dict[str, dict[str, Any]] = {GAMMA_0: {"gamma": 0.0}, FLOAT: {"arithmetic": "float"}, EXACT: {}}
    if method in options:
        return mfx.momentumize(model, **options[method])
    return with_checkpoints(model) if method == CHECKPOINT else model


def _within_budget(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    with functorch.patch(activation_memory_budget=BUDGET):
        return compile_fx(graph, inputs)


class Training:
    """A training step without an optimizer: forward, and backward from a fixed gradient of the output.

    Gradients of parameters are there from the first step on and accumulate, so that they are no part of a peak.
    """

    def __init__(self, call: Call, x: Tensor) -> None:
        self.call, self.x = call, x
        self._gradient: Tensor | None = None

    def __call__(self) -> None:
        """Make the step."""
        y = self.call(self.x)
        if self._gradient is None:
            self._gradient = torch.full_like(y, 1 / y.numel())
        y.backward(self._gradient)
