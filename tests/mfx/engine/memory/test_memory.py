"""The bytes alive between and during forward and backward do not grow with depth."""

import pytest
import torch
from torch import nn

import mfx
from mfx.engine import StepFunction
from tests.mfx.engine.chains import block, make_root, make_steps, run

WIDE = 64
UNIT = 256 * WIDE * 4  # bytes of one stream tensor: float32


def measure(root, steps, **kw):
    x = torch.randn(256, WIDE)
    run(root, steps, x, **kw).x.sum().backward()  # what happens once only
    root.zero_grad()
    with mfx.ActivationMeter(exclude=list(root.parameters())) as meter:
        out = run(root, steps, x, **kw)
        kept = meter.live
        loss = out.x.sum()
        del out
        loss.backward()
        del loss
    assert meter.live == 0
    return kept / UNIT, meter.peak / UNIT


# One unit is the output. Float keeps v beside it; exact keeps x and v in eight bytes each, and the store in two.
# Float is measured up to where its first anchor would be.
@pytest.mark.parametrize("arithmetic, kept, depths", [("float", 2, (7, 15)), ("exact", 5.5, (40, 80))])
def test_kept_and_peak_do_not_grow_with_depth(arithmetic, kept, depths):
    results = []
    for depth in depths:
        root = make_root(depth, lambda: block(WIDE))
        results.append(measure(root, make_steps(root), arithmetic=arithmetic))
    assert [round(k, 1) for k, _ in results] == [kept, kept]
    assert results[1][1] <= results[0][1] + 0.1


@pytest.mark.parametrize("arithmetic, depths", [("float", (7, 15)), ("exact", (40, 80))])
def test_retained_backward_does_not_grow_with_depth(arithmetic, depths):
    peaks = []
    for depth in depths:
        root = make_root(depth, lambda: block(WIDE))
        steps = make_steps(root)
        with mfx.ActivationMeter(exclude=list(root.parameters())) as meter:
            run(root, steps, torch.randn(256, WIDE), arithmetic=arithmetic).x.sum().backward(retain_graph=True)
        peaks.append(meter.peak / UNIT)
    assert peaks[1] <= peaks[0] + 0.1


def test_nested_chains_do_not_grow_with_the_outer_depth():
    peaks = []
    for depth in (8, 15):
        root = make_root(depth, lambda: block(WIDE))
        root.inner = nn.ModuleList([make_root(12, lambda: block(WIDE)) for _ in range(depth)])

        def step(i):
            def branch(r, x):
                return (run(r.inner[i], make_steps(r.inner[i]), r.blocks[i](x), arithmetic="float").x,)

            return StepFunction(f"{i}", ("residual",), branch, branch, (), (f"blocks.{i}", f"inner.{i}"))

        peaks.append(measure(root, [step(i) for i in range(depth)], arithmetic="float")[1])
    assert peaks[1] <= peaks[0] + 0.1
