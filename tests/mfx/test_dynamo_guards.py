"""A graph that Dynamo captured is used again as long as it holds."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mfx
from mfx.net import forward_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Part(nn.Module):
    """Holds a chain, so it gets a forward of its own in the net; called as a module, it is guarded by Dynamo."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x):
        return self.part(x).sum()


def test_a_second_call_captures_nothing():
    net = mfx.momentumize(Model(), gamma=0.5, capture="dynamo")
    for _ in range(3):
        net(torch.randn(2, 4)).backward()
    assert "forward" in net.part.__dict__  # else this tests nothing
    assert len(forward_of(net).all_entries) == 1


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_around_a_call_sees_the_rewritten_call_alone():
    net, x = mfx.momentumize(Model(), gamma=0.5, capture="dynamo"), torch.randn(2, 4)
    for _ in range(2):
        with Products() as products:
            net(x)
        assert products.count == 3  # one for each block; none from looking at the model
    net(x)
    assert len(forward_of(net).all_entries) == 1
