"""Tensors whose rows differ in size have no one size that a state could have: what takes them runs as it is written."""

import pytest
import torch
from torch import nn

import mfx


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.linear(self.norm(x))
        return x + self.linear(self.norm(x))


class OfSequences(nn.Module):
    """Makes a nested tensor of sequences, whose lengths are values and in no graph; then goes on with plain ones."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), Block()

    def forward(self, x, lengths):
        nested = torch.nested.nested_tensor([row[:length] for row, length in zip(x, lengths.tolist(), strict=True)])
        return self.head(torch.stack([row.mean(0) for row in self.block(nested).unbind()]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_inside_of_a_model():
    torch.manual_seed(0)
    model, x, lengths = OfSequences(), torch.randn(2, 5, 4), torch.tensor([3, 5])
    net = mfx.momentumize(model, gamma=0.0)
    with pytest.warns(UserWarning, match=r"these chains were found: head\b"):
        out = net(x, lengths)
    assert torch.equal(out, model(x, lengths))
    out.sum().backward()
    assert [chain.name for chain in mfx.explain(net).chains] == ["head"]


class Packed(nn.Module):
    """Makes a nested tensor that a graph of Dynamo's could hold, and goes through its chain with it."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)).values()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_inside_of_a_graph():
    torch.manual_seed(0)
    model, x = Packed(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="Packed cannot be captured as one graph"):
        out = mfx.momentumize(model)(x)
    assert torch.equal(out, model(x)), "no state has rows of several sizes"
    with pytest.raises(mfx.MfxError, match="Packed cannot be captured as one graph"):
        mfx.momentumize(model, capture="dynamo")(x)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor_given_to_a_net(layout):
    net = mfx.momentumize(Block())
    with pytest.raises(mfx.MfxError, match=r"Block is given a nested tensor.* Give it a padded tensor and a mask"):
        net(torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)], layout=layout))
    assert net(torch.randn(1, 3, 4)).shape == (1, 3, 4)
