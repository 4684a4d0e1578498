"""Random residual models through `mfx.momentumize`, against themselves and against their own recurrence."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor, nn

import mfx
from tests import sampling
from tests.passes.random_models import ChainSpec, D, Model, models

EXAMPLES = int(os.environ.get("MFX_RANDOM_MODELS", "40"))  # of the long run


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """So many random models, others every day."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        options = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        return seed(sampling.number())(options(given(models())(test)))

    return decorate


def outputs_and_grads(model: nn.Module, call: Callable[..., list[Tensor]]) -> tuple[list[Tensor], dict[str, Any]]:
    """The outputs, and the gradients of a loss that weighs every element of every output differently."""
    torch.manual_seed(1)
    x, memory = (torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    constant = torch.randn(2, 3, D, dtype=torch.float64)
    model.zero_grad()
    outputs = call(x, memory, constant)
    sum((torch.randn_like(out) * out).sum() for out in outputs).backward()
    named = {"x": x, "memory": memory, **dict(model.named_parameters())}
    return [out.detach() for out in outputs], {name: value.grad for name, value in named.items()}


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual: Any, expected: Any) -> None:
    # States are float64 or have 40 fraction bits: at most 1e-10 after these few steps. Gradients are of order 1 to 100.
    (outputs, grads), (outputs_, grads_) = actual, expected
    torch.testing.assert_close(outputs, outputs_, rtol=1e-9, atol=1e-9)
    assert grads.keys() == grads_.keys()
    for name, grad in grads_.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-9 * max(1.0, float(grad.norm())))


@examples(2)
def test_random_model(specs: tuple[ChainSpec, ...]) -> None:
    check(specs)


@pytest.mark.zoo
@examples(EXAMPLES)
def test_many_random_models(specs: tuple[ChainSpec, ...]) -> None:
    check(specs)


def check(specs: tuple[ChainSpec, ...]) -> None:
    torch.manual_seed(0)
    model = Model(specs).double()
    original = outputs_and_grads(model, model)
    by_hand = outputs_and_grads(model, lambda *inputs: model.momentum(*inputs, 0.9))

    for arithmetic in ("exact", "float"):
        unchanged = mfx.momentumize(model, gamma=0.0, arithmetic=arithmetic)
        assert_equal(outputs_and_grads(unchanged, unchanged), original)
        net = mfx.momentumize(model, gamma=0.9, arithmetic=arithmetic)
        kept = mfx.momentumize(model, gamma=0.9, arithmetic=arithmetic, memory_budget=1.0)
        actual, reference = outputs_and_grads(net, net), outputs_and_grads(kept, kept)
        (assert_equal if arithmetic == "exact" else assert_close)(actual, reference)
        assert_close(actual, by_hand)


def test_gamma_zero_gradients_with_a_head_between_the_steps() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
            self.head = nn.Linear(D, D)

        def forward(self, x: Tensor, memory: Tensor, constant: Tensor) -> list[Tensor]:
            x = x + self.fs[0](x)
            early = self.head(x)
            for f in self.fs[1:]:
                x = x + f(x)
            return [x * memory, early]

    torch.manual_seed(0)
    model = Model().double()
    net = mfx.momentumize(model, gamma=0.0)
    original = outputs_and_grads(model, model)
    assert_close(outputs_and_grads(net, net), original)
    assert_equal(outputs_and_grads(net, net), original)
