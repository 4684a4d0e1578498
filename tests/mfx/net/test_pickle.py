"""A net is pickled, saved and copied whatever its graphs hold: those that cannot be pickled are captured anew."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mfx
from mfx.net.forward import forward_of
from mfx.program.chain_call import Momentum
from tests.sampling import grid


@torch.library.custom_op("mfx_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, gradient: gradient * 2)


class Triple(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


def nested():
    def inner(x):
        return x.sin()

    return inner


OPERATIONS = {
    "operator": lambda x: torch.ops.aten.relu.default(x),
    "operator with an overload": lambda x: torch.ops.aten.add.Tensor(x, x, alpha=2),
    "operator packet": lambda x: torch.ops.aten.relu(x),
    "in torch.ops": lambda x: torch.ops.mfx_tests.double(x),
    "custom operator": lambda x: double(x),
    "dtype and memory format": lambda x: x.to(torch.float64).to(torch.float32, memory_format=torch.contiguous_format),
    "device": lambda x: x.to(torch.device("cpu")),
    "layout": lambda x: x + torch.zeros(8, layout=torch.strided),
    "autograd function": lambda x: Triple.apply(x),
    "nested function": lambda x: nested()(x),
    "functional": lambda x: F.max_pool1d(x, 1),
    "ellipsis": lambda x: x[..., :8],
    "size": lambda x: x.reshape(x.shape),
    "region of another mode": lambda x: x * no_grad_sin(x),
}


def no_grad_sin(x):
    with torch.no_grad():
        return x.sin()


class Net(nn.Module):
    def __init__(self, operation):
        super().__init__()
        torch.manual_seed(0)
        self.operation = operation
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = x + OPERATIONS[self.operation](block(x))
        return x


class Lengths(Net):
    """Asserts something about a number that is read off a tensor."""

    def forward(self, x):
        n = int(torch.max(x.detach().abs()).ceil().item())
        return super().forward(x * torch.ones(n).sum())


def saved(net):
    torch.save(net, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": lambda net: pickle.loads(pickle.dumps(net)), "torch.save": saved, "deepcopy": copy.deepcopy}


def assert_goes_on(net, copied, x):
    assert torch.equal(copied(x), net(x))
    assert copied.graph.find_nodes(op="call_module")  # what is shown is a graph again
    mfx.set_gamma(net, 0.25)
    mfx.set_gamma(copied, 0.25)
    assert torch.equal(copied(x), net(x))


@grid(len(OPERATIONS), operation=list(OPERATIONS), how=list(COPIES))
def test_whatever_a_graph_holds(operation, how):
    net, x = mfx.momentumize(Net(operation), gamma=0.5), torch.randn(4, 8)
    net(x).sum().backward()
    mfx.set_gamma(net, 0.75)
    copied = COPIES[how](net)
    assert mfx.graphs(net)
    assert_goes_on(net, copied, x)


@pytest.mark.parametrize("how", COPIES)
def test_after_a_capture_by_dynamo(how):
    net, x = mfx.momentumize(Lengths("operator"), gamma=0.5), torch.randn(4, 8)
    net(x).sum().backward()
    assert_goes_on(net, COPIES[how](net), x)


def add_lambda(graph):
    """As an annotation may hold it."""
    graph.output_node().meta["custom"] = {"note": lambda: None}


def test_graphs_that_can_be_pickled_are_kept():
    net = mfx.momentumize(Net("operator"), gamma=0.5)
    assert len(forward_of(COPIES["pickle"](net)).table.graphs) == 1
    add_lambda(forward_of(net).table.graphs[0].captured.graph)
    assert len(forward_of(COPIES["pickle"](net)).table.graphs) == 0


def test_a_rewritten_graph_module_that_cannot_be_pickled():
    module = mfx.momentumize(fx.symbolic_trace(Net("operator")), gamma=0.5)
    (call,) = (child for child in module.children() if isinstance(child, Momentum))
    add_lambda(call.graphs.steps[0].branch)
    with pytest.raises(mfx.MfxError, match=r"holds an object that cannot be pickled.*state_dict"):
        pickle.dumps(module)
    module = mfx.momentumize(fx.symbolic_trace(Net("operator")), gamma=0.5)
    x = torch.randn(4, 8)
    assert torch.equal(COPIES["pickle"](module)(x), module(x))


def test_another_process_loads_it(tmp_path):
    net, x = mfx.momentumize(Net("operator with an overload"), gamma=0.5), torch.randn(4, 8)
    torch.save((net, x, net(x)), tmp_path / "net.pt")
    code = (
        f"import torch; net, x, y = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False); "
        "assert torch.equal(net(x), y)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
