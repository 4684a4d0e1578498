"""train() and eval() of the net, or of parts of it, do what they do on the model."""

import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

import mfx
from tests.mfx.models import ConvNet, Stack, images, inputs


class Deep(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.drop = StochasticDepth(0.5, "row")

    def forward(self, x):
        for fc in self.fcs:
            x = x + self.drop(fc(x))
        return x


RANDOM = {
    "nn.Dropout": lambda: Stack(dropout=0.5),
    "F.dropout": lambda: Stack(functional=0.5),
    "stochastic depth": Deep,
}


@pytest.mark.parametrize("build", RANDOM.values(), ids=RANDOM)
def test_randomness_in_training_only(build):
    net, x = mfx.momentumize(build()), inputs(batch=8)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))


@pytest.mark.parametrize("build", RANDOM.values(), ids=RANDOM)
def test_at_gamma_zero_the_masks_are_the_models_own(build):
    model = build()
    net, x = mfx.momentumize(model, gamma=0.0), inputs(batch=8)
    for training in (True, False):
        torch.manual_seed(3)
        expected = model.train(training)(x)
        torch.manual_seed(3)
        assert torch.equal(net.train(training)(x), expected)


@pytest.mark.parametrize("path", ["blocks.1", "blocks", "blocks.1.mlp", ""])
@pytest.mark.parametrize("kind", ["dropout", "functional"])
def test_parts_in_eval_mode(path, kind):
    model = Stack(**{kind: 0.5})
    net = mfx.momentumize(model, gamma=0.0)
    for module in (model, net):
        module.get_submodule(path).eval()
        torch.manual_seed(3)
    expected = model(inputs())
    torch.manual_seed(3)
    assert torch.equal(net(inputs()), expected)


def test_batch_norm():
    model = ConvNet()
    net = mfx.momentumize(model, gamma=0.0)
    statistics = model.layers[1].bn.running_mean
    before = statistics.clone()
    net.eval()
    net(images()).sum().backward()
    assert torch.equal(statistics, before)
    net.train()
    net.layers[1].bn.eval()
    net(images()).sum().backward()
    assert torch.equal(statistics, before)
    net.layers[1].bn.train()
    net(images()).sum().backward()
    assert not torch.equal(statistics, before)
    assert model.layers[1].bn.num_batches_tracked == 1
    assert model.layers[0].bn.num_batches_tracked == 2


def test_the_shown_graph_follows_the_last_call():
    net = mfx.momentumize(Stack(functional=0.5))
    assert list(mfx.graphs(net)) == ["train"]
    trained = net.graph
    net.eval()
    net(inputs())
    assert net.graph is not trained
    assert list(mfx.graphs(net)) == ["train", "eval"]
    net.train()
    net(inputs())
    assert net.graph is trained
    assert len(mfx.graphs(net)) == 2


def test_looking_at_graphs_changes_no_mode():
    net = mfx.momentumize(Stack())
    net.eval()
    net(inputs())
    net.blocks[0].train()
    flags = [module.training for module in net.modules()]
    mfx.graphs(net)
    net.print_readable(print_output=False)
    mfx.explain(net)
    assert [module.training for module in net.modules()] == flags


class OtherInEval(Stack):
    def forward(self, x):
        return super().forward(x) if self.training else self.head(self.blocks[0](self.embed(x)))


def test_other_chains_in_eval_mode_are_refused():
    net = mfx.momentumize(OtherInEval())
    message = r"other chains in one call .*train and eval mode; .*'blocks': 6.*only= or skip="
    for _ in range(2):  # the refused graph serves no later call either
        with pytest.raises(mfx.MfxError, match=message):
            net.eval()(inputs())
    net.train()(inputs())
    with pytest.raises(mfx.MfxError, match=message):
        net.eval()(inputs())


def test_an_attribute_the_trace_looked_at():
    model = Stack()
    net = mfx.momentumize(model, gamma=0.0)
    net(inputs())
    for module in (model, net):
        module.blocks[1].p = 0.5
        torch.manual_seed(3)
    expected = model(inputs())
    torch.manual_seed(3)
    assert torch.equal(net(inputs()), expected)


def test_a_schedule_does_not_pile_up_graphs():
    net = mfx.momentumize(Stack())
    for i in range(20):
        net.blocks[0].p = i / 40
        net(inputs())
    assert len(mfx.graphs(net)) <= 8
