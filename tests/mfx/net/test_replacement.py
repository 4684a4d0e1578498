"""Modules replaced, added, removed and parametrized after momentumize: as on the model."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import mfx
from tests.mfx.models import Block, ConvNet, Mlp, Stack, assert_reversible, images, inputs


class LoRA(nn.Module):
    """A linear layer and a correction of low rank, as PEFT's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class OtherBlock(nn.Module):
    """One step where Block has two."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(x)


class Plain(nn.Linear):
    """A block that is not a residual step."""


REPLACEMENTS = {
    "a leaf": ("blocks.1.mix", lambda: nn.Linear(8, 8)),
    "an activation": ("blocks.1.mlp.act", lambda: nn.ReLU(inplace=True)),
    "a norm by nothing": ("blocks.1.norm1", nn.Identity),
    "a container": ("blocks.1.mlp", Mlp),
    "a container by a leaf": ("blocks.1.mlp", lambda: nn.Linear(8, 8)),
    "a block": ("blocks.1", Block),
    "a block by another kind": ("blocks.1", OtherBlock),
    "a block by no block": ("blocks.1", lambda: Plain(8, 8)),
    "all blocks": ("blocks", lambda: nn.ModuleList([Block(), OtherBlock(), OtherBlock(), Block()])),
    "outside": ("head", lambda: nn.Linear(8, 5)),
}


@pytest.mark.parametrize("called", [True, False], ids=["called", "fresh"])
@pytest.mark.parametrize("path, build", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_replacing(path, build, called):
    model = Stack()
    net = mfx.momentumize(model, gamma=0.0)
    if called:
        net(inputs()).sum().backward()
        net.eval()(inputs())
        net.train()
    new = build()
    for each in (model, net):
        parent, _, name = path.rpartition(".")
        setattr(each.get_submodule(parent), name, new)
    assert torch.equal(net(inputs()), model(inputs()))
    assert torch.equal(net.eval()(inputs()), model.eval()(inputs()))
    assert_reversible(net.train(), net.blocks[0].mlp if path == "blocks" else net.blocks[0].mix, inputs())


def test_appending_and_removing_blocks():
    model = Stack()
    net = mfx.momentumize(model, gamma=0.0)
    net(inputs())
    extra = Block()
    for each in (model, net):
        each.blocks.append(extra)
    assert torch.equal(net(inputs()), model(inputs()))
    for each in (model, net):
        del each.blocks[0]
    assert torch.equal(net(inputs()), model(inputs()))
    assert len(mfx.explain(net).chains[0].steps) == 6


def test_swapping_blocks():
    net, model = mfx.momentumize(ConvNet(), gamma=0.0), None
    net(images())
    net.layers[0], net.layers[2] = net.layers[2], net.layers[0]
    with mfx.original(net):
        model = net(images())
    assert torch.equal(net(images()), model)


@pytest.mark.parametrize("called", [True, False], ids=["called", "fresh"])
def test_lora(called):
    model = Stack()
    net = mfx.momentumize(model)
    if called:
        net(inputs())
    for block in net.blocks:
        block.mix = LoRA(block.mix)
        block.mlp.fc1 = LoRA(block.mlp.fc1)
    net(inputs()).sum().backward()
    assert all(block.mlp.fc1.up.weight.grad is not None for block in net.blocks)
    assert net.blocks[0].mix.base.weight.grad is None
    assert_reversible(net, net.blocks[0].mix, inputs())
    assert type(model.blocks[0].mix) is nn.Linear


def test_a_parameter_given_or_taken():
    model = Stack()
    net = mfx.momentumize(model, gamma=0.0)
    net(inputs())
    for each in (model, net):
        each.blocks[0].mix.bias = None
    assert torch.equal(net(inputs()), model(inputs()))


PARAMETRIZATIONS = {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm}


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("path", ["embed", "blocks.0.mix", "blocks.1.mlp.fc1"])
@pytest.mark.parametrize("apply", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_parametrizations(apply, path, when):
    torch.manual_seed(0)
    model = Stack()
    if when == "before":
        apply(model.get_submodule(path))
    net = mfx.momentumize(model, gamma=0.0)
    if when == "later":
        net(inputs())
    if when != "before":
        apply(net.get_submodule(path))
    with mfx.original(net):
        net.eval()
        expected = net(inputs())
    assert torch.equal(net(inputs()), expected)
    net.train()(inputs()).sum().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.startswith(path))


def test_removing_a_parametrization():
    net = mfx.momentumize(Stack())
    parametrizations.weight_norm(net.blocks[0].mix)
    y = net(inputs())
    parametrize.remove_parametrizations(net.blocks[0].mix, "weight")
    torch.testing.assert_close(net(inputs()), y)
    assert type(net.blocks[0].mix) is nn.Linear
