"""Gradients are those of ordinary backpropagation, or a step that was not reproducible is reported."""

import copy
import itertools
import random
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import fx, nn
from torchvision.models import resnet18

import mfx
from tests.mfx.models import ConvNet, Stack, images, inputs
from tests.promises.models import MODELS, differences, trained
from tests.sampling import grid

# States are walked back in the deep one; in the shallow one and at γ = 0 the steps' inputs are kept.
PLACES = {"deep": (16, 0.9), "shallow": (2, 0.9), "zero": (16, 0.0)}
NOTICED = "did not lead back to where the forward pass began|did not compute the values of the"


NUMPY = np.random.default_rng(0)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("build, shape", MODELS.values(), ids=MODELS)
def test_they_are_those_of_ordinary_backpropagation_bit_for_bit(build, shape, gamma):
    torch.manual_seed(0)
    model = build()
    kept = mfx.momentumize(copy.deepcopy(model), gamma=gamma, memory_budget=1.0)
    net = mfx.momentumize(model, gamma=gamma, memory_budget=0.0, verify="raise")
    assert differences(trained(net, shape), trained(kept, shape)) == []


def test_the_comparison_sees_the_last_bits():
    build, shape = MODELS["a stack of blocks"]
    torch.manual_seed(0)
    model = build()
    kept = mfx.momentumize(copy.deepcopy(model), memory_budget=1.0)
    rounded = mfx.momentumize(model, arithmetic="float")  # which rebuilds states to 6e-6 only
    assert any(name.startswith("gradient") for name in differences(trained(rounded, shape), trained(kept, shape)))


@fx.wrap
def by_python(x):
    return x * (1 + random.SystemRandom().random() / 4)  # Python's own generator is put back


@fx.wrap
def by_numpy(x):
    return x * (1 + float(NUMPY.random()) / 4)


class ByPython(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = x + block.mlp(block.norm2(x))
            x = x + block.mix(by_python(x))
        return x


class ByNumpy(Stack):
    def forward(self, x):
        for block in self.blocks:
            x = x + block.mlp(block.norm2(x))
            x = x + block.mix(by_numpy(x))
        return x


def hooked(depth):
    """A hook gives other values at every call."""
    model, count = Stack(depth), itertools.count(1)
    model.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, output: output * (1 + next(count) / 16))
    return model


SOURCES = {
    "hook": hooked,
    "the system's dice": ByPython,
    "numpy": ByNumpy,
}


@grid(9, build=SOURCES, place=list(PLACES), dtype=[torch.float32, torch.bfloat16, torch.float64])
def test_raise(build, place, dtype):
    depth, gamma = PLACES[place]
    torch.manual_seed(0)
    net = mfx.momentumize(build(depth).to(dtype), gamma=gamma, verify="raise")
    loss = net(inputs(dtype=dtype)).sum()
    with pytest.raises(mfx.MfxError, match=NOTICED) as caught:
        loss.backward()
    assert "chain " in str(caught.value)
    assert "random numbers that are not torch's" in str(caught.value)


@grid(4, build=SOURCES, place=list(PLACES))
def test_warn_once(build, place):
    depth, gamma = PLACES[place]
    torch.manual_seed(0)
    net = mfx.momentumize(build(depth), gamma=gamma)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            net(inputs()).sum().backward()
    (warning,) = caught
    assert str(warning.message).startswith("mfx: chain ")
    assert issubclass(warning.category, UserWarning)


@grid(4, build=SOURCES, place=list(PLACES))
def test_off(build, place):
    depth, gamma = PLACES[place]
    net = mfx.momentumize(build(depth), gamma=gamma, verify="off")
    net(inputs()).sum().backward()  # warnings are errors here


def test_the_step_is_named_where_it_is_known():
    net = mfx.momentumize(hooked(2), gamma=0.0, verify="raise")
    with pytest.raises(mfx.MfxError, match=r"chain blocks, step blocks\.0: the recomputation"):
        net(inputs()).sum().backward()


HONEST = {
    "dropout": lambda: (Stack(depth=16, dropout=0.5), inputs(batch=8)),
    "functional dropout": lambda: (Stack(depth=16, functional=0.5), inputs(batch=8)),
    "batch norm": lambda: (ConvNet(depth=40), images()),
    "resnet18": lambda: (resnet18(), torch.randn(2, 3, 32, 32)),
    "vit_tiny": lambda: (
        timm.create_model("vit_tiny_patch16_224", img_size=32, proj_drop_rate=0.1, attn_drop_rate=0.1),
        torch.randn(2, 3, 32, 32),
    ),
}


@grid(10, build=HONEST, dtype=[torch.float32, torch.bfloat16], gamma=[0.9, 1 / 64, 0.0])
def test_honest_networks_stay_silent(build, dtype, gamma):
    torch.manual_seed(0)
    model, x = build()
    net = mfx.momentumize(model.to(dtype), gamma=gamma, verify="raise")
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(2):
        net(x.to(dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("place", PLACES)
def test_not_a_number_is_no_reason(place):
    depth, gamma = PLACES[place]
    net = mfx.momentumize(Stack(depth), gamma=gamma, verify="raise")
    x = inputs()
    x[0, 0] = torch.nan
    out = net(x)
    assert out.isfinite().all(1).tolist() == [False, True]
    out.sum().backward()


# --- what must not change between forward and backward --------------------------------------------------------------


class Captured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))

    def forward(self, x, mask):
        for fc in self.fcs:
            x = x + fc(x) * mask
        return x


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["weight", "mask", "buffer"])
def test_tensors_changed_between_forward_and_backward(what, place):
    depth, gamma = PLACES[place]
    mask = torch.ones(8)
    if what == "buffer":
        net, args = mfx.momentumize(ConvNet(2 * depth).eval(), gamma=gamma), (images(),)
    else:
        model = Captured()
        model.fcs = model.fcs[:depth]
        net, args = mfx.momentumize(model, gamma=gamma), (inputs(), mask)
    loss = net(*args).sum()
    with torch.no_grad():
        if what == "weight":
            net.fcs[0].weight.mul_(2)
        elif what == "mask":
            mask.mul_(2)
        else:
            net.layers[1].bn.running_var.mul_(2)
    message = {
        "weight": r"fcs\.0\.weight was changed between forward and backward.* call backward before changing it",
        "mask": "a tensor that its steps read beside the stream was modified in place between the forward and the",
        "buffer": r"bn\.running_var was changed between forward and backward",
    }
    with pytest.raises(mfx.MfxError, match=message[what]):
        loss.backward()


class Counted(nn.Module):
    def forward(self, x):
        for k in (2, 3, 5):
            x = x + x * k
        return x


def test_integers_and_complex_numbers_are_refused_with_a_reason():
    net = mfx.momentumize(Counted())
    for x, name in ((torch.arange(8), "int64"), (torch.randn(8, dtype=torch.complex64), "complex64")):
        fresh = mfx.momentumize(Counted())
        with pytest.warns(UserWarning, match=rf"is left as it was: the stream is {name}, not floating point"):
            out = fresh(x)
        assert torch.equal(out, Counted()(x))  # the model's own function
        assert {r.reason for r in mfx.explain(Counted(), x).rejections} == {f"the stream is {name}, not floating point"}
    assert net(torch.ones(2)).tolist() != [72.0, 72.0]


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        y = torch.view_as_complex(x.reshape(2, 4, 2))
        for fc in self.fcs:
            y = y + torch.view_as_complex(fc(torch.view_as_real(y).reshape(2, 8)).reshape(2, 4, 2))
        return torch.view_as_real(y)


def test_a_complex_stream_inside():
    net = mfx.momentumize(Half())
    with pytest.warns(UserWarning, match="the stream is complex64, not floating point"):
        out = net(inputs())
    with mfx.original(net):
        assert torch.equal(net(inputs()), out)
