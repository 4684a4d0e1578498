"""Bytes that the kernels read and write, and those that they allocate, counted in the interpreter."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import mfx
from mfx.engine import StepFunction
from mfx.engine.arithmetic import triton_states
from tests.mfx.engine.arithmetic.kernels.conftest import ON_GPU
from tests.mfx.engine.chains import run
from tests.mfx.models import Stack, inputs

pytestmark = pytest.mark.skipif(ON_GPU, reason="the interpreter counts")
SIZE = 700  # elements: two blocks, one of them not full


@pytest.fixture
def traffic(monkeypatch):
    """The bytes of every load and store from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = []

    def watch(name, mask_at):
        operate = getattr(InterpreterBuilder, name)

        def counting(self, ptrs, *args):
            bits = ptrs.get_element_ty().primitive_bitwidth
            counted.append(int(args[mask_at].data.sum()) * bits // 8)
            return operate(self, ptrs, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    watch("create_masked_load", 0)
    watch("create_masked_store", 1)
    return counted


# Beside the branch: X, V and a byte of the store are read and written in either direction, with y and the stream, and
# the gradients of x and v become those of v and y, which are one tensor in float32. Autograd adds two gradients.
@pytest.mark.parametrize(
    "arithmetic, dtype, expected, most",
    [
        ("exact", torch.float32, 2 * (34 + 8) + 12 + 12, 130),
        ("exact", torch.bfloat16, 2 * (34 + 4) + 12 + 6, 120),
        ("float", torch.float32, 2 * 20 + 12 + 12, 130),
        ("float", torch.bfloat16, 2 * 20 + 12 + 6, 120),
    ],
)
@pytest.mark.parametrize("kind", ["residual", "map"])
def test_bytes_of_a_step(traffic, arithmetic, dtype, kind, expected, most):
    def count(depth):
        traffic.clear()
        steps = [StepFunction(f"{i}", (kind,), lambda root, x: (x.sin(),), None, (), ()) for i in range(depth)]
        x = torch.randn(SIZE).to(dtype).requires_grad_()
        run(None, steps, x, arithmetic=arithmetic, verify="off").x.sum().backward()
        return sum(traffic)

    a_step = (count(25) - count(17)) / 8 / SIZE  # both walk back
    autograds_sum = 3 * dtype.itemsize  # counted as one operation in test_chains
    own_gradient = 2 * dtype.itemsize if kind == "map" else 0  # of x, less that of y
    assert a_step + autograds_sum == expected + own_gradient <= most


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_explain_knows_what_is_allocated(monkeypatch, arithmetic):
    launch = triton_states._launch

    def alone(*args, **kwargs):
        with _disable_current_modes():  # the interpreter itself is made of operations, and leaves cycles
            launch(*args, **kwargs)
        gc.collect(0)

    monkeypatch.setattr(triton_states, "_launch", alone)
    net, x = mfx.momentumize(Stack(depth=12), arithmetic=arithmetic), inputs(16)
    predicted = mfx.explain(net, x).estimate.momentum
    for _ in range(2):
        net.zero_grad()
        with mfx.ActivationMeter(net.parameters()) as meter:
            out = net(x)
            kept = meter.live
            out.backward(torch.ones_like(out))
    assert (predicted.kept, predicted.peak) == (kept, meter.peak)
