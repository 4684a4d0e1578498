"""Nets keep their activations, as ordinary backpropagation does, while the caller has disabled saved-tensor hooks."""

import warnings

import pytest
import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks

import mfx
from tests.sampling import grid

DEPTH = 13  # walked back at γ = 0.9


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.f = branch

    def forward(self, x):
        return x + self.f(x)


def _branch():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 4))


def flat():
    torch.manual_seed(0)
    return nn.Sequential(*(Block(_branch()) for _ in range(DEPTH)))


def nested():
    torch.manual_seed(0)
    return nn.Sequential(*(Block(nn.Sequential(Block(_branch()), Block(_branch()), _branch())) for _ in range(3)))


def trained(net, *, disabled):
    """Return outputs, gradients and buffers of two training steps, and the messages of warnings."""
    torch.manual_seed(1)
    found = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            x = torch.randn(5, 4).requires_grad_()
            if disabled:
                with disable_saved_tensors_hooks("not here"):
                    y = net(x)
            else:
                y = net(x)
            y.square().sum().backward()
            found += [y.detach(), x.grad]
    found += [*(p.grad for p in net.parameters()), *net.buffers()]
    return found, [str(each.message) for each in said if "saved-tensor hooks" in str(each.message)]


OPTIONS = [{}, {"recompute": "all"}, {"offload": "cpu"}, {"memory_budget": "1MiB"}, {"memory_budget": 1.0}]


@grid(6, build=[flat, nested], gamma=[0.0, 0.9], options=OPTIONS)
def test_it_computes_the_same_and_says_so_once(build, gamma, options):
    net = mfx.momentumize(build(), gamma=gamma, **options)
    same = mfx.momentumize(build(), gamma=gamma, memory_budget=1.0) if gamma else build()
    found, said = trained(net, disabled=True)
    expected, _ = trained(same, disabled=False)
    assert all(map(torch.equal, found, expected))
    assert len(said) == (0 if options == {"memory_budget": 1.0} else 1)
    assert all("memory_budget=1.0" in message for message in said)


def test_without_gradients_nothing_is_said():
    net = mfx.momentumize(flat(), gamma=0.9)
    with torch.no_grad(), disable_saved_tensors_hooks("not here"), warnings.catch_warnings():
        warnings.simplefilter("error")
        net(torch.randn(5, 4))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_afterwards_activations_are_left_out_again(gamma):
    net = mfx.momentumize(flat(), gamma=gamma)
    trained(net, disabled=True)
    runs = []
    net[0].f[0].register_forward_hook(lambda *_: runs.append(mfx.recomputing()))
    net(torch.randn(5, 4)).sum().backward()
    assert runs == [False, True]
