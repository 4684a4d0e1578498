"""Branches are compiled once per structure, whatever they are called and wherever their modules lie."""

import operator

import pytest
import torch
from torch import fx, nn

from mfx.program.codegen import BackendCompiler


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A backend that counts what it compiles."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def branch(path, message):
    """``assert x.dim() == 2, message; return (path(x),)``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    dim = graph.call_method("dim", (x,))
    graph.call_function(torch._assert, (graph.call_function(operator.eq, (dim, 2)), message))
    graph.output((graph.call_module(path, (x,)),))
    return graph


def test_equal_branches_share_one():
    root, backend, x = nn.Module(), Counting(), torch.randn(3, 4)
    root.first, root.second = nn.Linear(4, 4), nn.Linear(4, 4)
    compiler = BackendCompiler(backend)
    # A symbolic trace writes its own nodes' names into messages.
    functions = {path: compiler(branch(path, f"got Proxy(getattr_{n})")) for n, path in enumerate(["first", "second"])}
    for path, function in functions.items():
        (found,) = function(root, x)
        assert torch.equal(found, root.get_submodule(path)(x))
    assert backend.graphs == 1


def test_other_branches_do_not():
    root, backend, x = nn.Module(), Counting(), torch.randn(3, 4)
    root.first, root.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    compiler = BackendCompiler(backend)
    for path in ("first", "second"):
        (found,) = compiler(branch(path, "two dimensions"))(root, x)
        assert torch.equal(found, root.get_submodule(path)(x))
    assert backend.graphs == 2


def test_a_module_that_is_replaced_is_another_one():
    root, x = nn.Module(), torch.randn(3, 4)
    root.first = nn.Linear(4, 4)
    function = BackendCompiler("eager")(branch("first", "two dimensions"))
    function(root, x)
    root.first = nn.Linear(4, 2)
    (found,) = function(root, x)
    assert torch.equal(found, root.first(x))
