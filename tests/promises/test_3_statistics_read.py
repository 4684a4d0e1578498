"""State that a forward changes beside its results, and that its steps read: at γ = 0 it is the model's to the bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mfx
from tests.sampling import grid

DIM = 4


class Net(nn.Module):
    """Four steps; one of them changes state, and all of them, or the later ones, read it."""

    def __init__(self, kind, where, first_read):
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))
        self.norm, self.hidden = nn.BatchNorm1d(DIM), [nn.BatchNorm1d(DIM)]
        self.register_buffer("constant", torch.randn(6, DIM))
        self.register_buffer("mean", torch.zeros(DIM))
        self.register_buffer("var", torch.ones(DIM))
        self.own_mean, self.own_var, self.table = torch.zeros(DIM), torch.ones(DIM), 4 * torch.randn(5, DIM)
        self.change, self.read = KINDS[kind]
        self.where, self.first_read = where, first_read

    def forward(self, x):
        for number, step in enumerate(self.steps):
            h = torch.tanh(step(x))
            if number == self.where:
                self.change(self)
            x = x + (h * (1 + self.read(self)) if number >= self.first_read else h)
        return x

    def state(self):
        own = (self.own_mean, self.own_var, self.table)
        return [tensor.clone() for tensor in (*self.buffers(), *self.hidden[0].buffers(), *own)]


def without_gradient(net):
    with torch.no_grad():
        net.own_mean = F.normalize(net.own_mean + 1, dim=0, out=net.own_mean)


def own_mean(net):
    return 2 * net.own_mean


def native(net):
    norm = torch.ops.aten.native_batch_norm.default
    norm(net.constant, None, None, net.own_mean, net.own_var, True, 0.1, 1e-5)


def instance_norm(net):
    F.instance_norm(net.constant[None].transpose(1, 2), net.own_mean, net.own_var, use_input_stats=True)


KINDS = {
    "module": (lambda net: net.norm(net.constant), lambda net: 2 * net.norm.running_mean),
    "module not registered": (lambda net: net.hidden[0](net.constant), lambda net: net.hidden[0].running_mean),
    "of buffers": (
        lambda net: F.batch_norm(net.constant, net.mean, net.var, training=True),
        lambda net: 2 * net.mean,
    ),
    "of attributes": (lambda net: F.batch_norm(net.constant, net.own_mean, net.own_var, training=True), own_mean),
    "instances": (instance_norm, own_mean),
    "native": (native, own_mean),
    "in place": (lambda net: net.mean.add_(1.0), lambda net: net.mean),
    "in place, a list": (lambda net: torch._foreach_add_([net.own_mean, net.own_var], 1.0), own_mean),
    "in place, data": (lambda net: net.own_mean.data.add_(1.0), own_mean),
    "in place, a view": (lambda net: net.own_mean[1:].add_(1.0), own_mean),
    "in place, without gradient": (without_gradient, own_mean),
    "rows renormalized": (
        lambda net: F.embedding(torch.arange(3), net.table, max_norm=1.0),
        lambda net: net.table[0],
    ),
}


def trained(net):
    """Return outputs, gradients and state of two steps, the second with a call between forward and backward."""
    x, found = torch.linspace(-1, 1, 8).reshape(2, DIM), []
    for again in (False, True):
        net.zero_grad()
        y = net(x)
        if again:
            net(x / 2)
        y.pow(2).sum().backward()
        found += [y, *(parameter.grad for parameter in net.steps.parameters()), *net.state()]
    return found


@pytest.mark.filterwarnings("ignore:.*(has no chain|no chain of residual adds|cannot be captured)")
@grid(24, kind=[*KINDS], capture=["auto", "dynamo"], where=[0, 1, 3], first_read=[0, 2])
def test_state_that_steps_read_is_that_of_their_time(kind, capture, where, first_read):
    net = mfx.momentumize(Net(kind, where, first_read), gamma=0.0, capture=capture)
    assert all(map(torch.equal, trained(net), trained(Net(kind, where, first_read))))


def test_a_chain_goes_on_behind_the_change():
    net = mfx.momentumize(Net("in place", 1, 0), gamma=0.0)
    trained(net)
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_norm_that_steps_share_and_one_of_them_reads(capture):
    class Shared(Net):
        def forward(self, x):
            for number, step in enumerate(self.steps):
                h = step(x)
                x = x + torch.tanh(h * (1 + self.norm.running_mean) if number == 2 else self.norm(h))
            return x

    net = mfx.momentumize(Shared("module", 0, 0), gamma=0.0, capture=capture)
    assert all(map(torch.equal, trained(net), trained(Shared("module", 0, 0))))
