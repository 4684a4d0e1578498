"""Looking at rewritten graphs; graph modules in and out; the way back."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn

import mfx
from mfx.program.chain_call import Momentum
from tests.mfx.models import ConvNet, Masked, Stack, assert_reversible, counting, images, inputs


def momentum_calls(module: fx.GraphModule) -> list[Momentum]:
    targets = [node.target for node in module.graph.nodes if node.op == "call_module"]
    return [call for target in targets if isinstance(call := module.get_submodule(target), Momentum)]


def pickled(net):
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("build, x, steps", [(Stack, inputs(), 6), (ConvNet, images(), 3)])
def test_one_momentum_call_per_chain(build, x, steps):
    net = mfx.momentumize(build())
    net(x)
    net.eval()(x)
    for module in mfx.graphs(net).values():
        assert isinstance(module, fx.GraphModule)
        (call,) = momentum_calls(module)
        assert len(call.graphs.steps) == steps
        assert module.code.count("self.momentum_") == 1
    assert net.code.count("self.momentum_") == 1
    assert sum("momentum" in str(node.target) for node in net.graph.nodes) == 1
    assert "self.momentum_" in net.print_readable(print_output=False)


def test_the_graphs_run_on_the_nets_own_modules():
    net = mfx.momentumize(Stack())
    (module,) = mfx.graphs(net).values()
    assert torch.equal(module(inputs()), net(inputs()))
    assert module.head is net.head


def test_every_branch_can_be_printed():
    net = mfx.momentumize(Stack())
    (call,) = momentum_calls(mfx.graphs(net)["train"])
    assert "mlp" in str(call.graphs.steps[1].branch)
    assert "blocks: 6 steps, gamma=0.9, exact" in repr(mfx.graphs(net)["train"])


class Named(Stack):
    """Has a graph, a code and a print_readable of its own."""

    code = "class attribute"

    def __init__(self) -> None:
        super().__init__()
        self.graph = {"nodes": 3}

    def print_readable(self) -> str:
        return "mine"


def test_attributes_of_the_model_win():
    model = Named()
    net = mfx.momentumize(model)
    net(inputs())
    assert (net.graph, net.code, net.print_readable()) == ({"nodes": 3}, "class attribute", "mine")
    assert "momentum_blocks" in mfx.graphs(net)["train"].code
    assert mfx.momentumize(net).graph == {"nodes": 3}
    assert copy.deepcopy(net).graph == {"nodes": 3}


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer"])
def test_registered_attributes_of_the_model_win(kind):
    model = Stack()
    if kind == "module":
        model.graph = nn.Linear(2, 2)
    elif kind == "parameter":
        model.graph = nn.Parameter(torch.zeros(1))
    else:
        model.register_buffer("graph", torch.zeros(1))
    assert mfx.momentumize(model).graph is not None
    assert type(mfx.momentumize(model).graph) is type(model.graph)


def test_momentumize_twice_takes_the_new_options():
    model = Stack()
    net = mfx.momentumize(model, gamma=0.5)
    again = mfx.momentumize(net, gamma=0.0)
    assert torch.equal(again(inputs()), model(inputs()))
    assert not torch.equal(net(inputs()), model(inputs()))
    assert [chain.gamma for chain in mfx.explain(again).chains] == [0.0]
    assert mfx.explain(again).chains[0].steps[0].path == "blocks.0"


def test_momentumize_around_a_net():
    inner = mfx.momentumize(Stack(), gamma=0.5)
    outer = mfx.momentumize(nn.Sequential(nn.Linear(8, 8), inner), gamma=0.0)
    plain = nn.Sequential(outer[0], Stack())
    plain.load_state_dict(outer.state_dict())
    assert torch.equal(outer(inputs()), plain(inputs()))


# --- the way back ----------------------------------------------------------------------------------------------------


def test_original():
    model = Stack()
    net = mfx.momentumize(model)
    y = net(inputs())
    with mfx.original(net) as same:
        assert same is net
        assert torch.equal(net(inputs()), model(inputs()))
        with mfx.original(net):
            assert torch.equal(net(inputs()), model(inputs()))
        assert torch.equal(net(inputs()), model(inputs()))
    assert torch.equal(net(inputs()), y)


def test_original_ends_with_an_error():
    net = mfx.momentumize(Stack())
    y = net(inputs())
    with pytest.raises(ZeroDivisionError), mfx.original(net):
        _ = 1 / 0
    assert torch.equal(net(inputs()), y)


def test_original_reaches_inner_nets():
    model = Stack()
    outer = nn.Sequential(mfx.momentumize(model))
    with mfx.original(outer):
        assert torch.equal(outer(inputs()), model(inputs()))


def test_original_needs_a_net():
    with pytest.raises(mfx.MfxError, match="Stack has not been momentumized"), mfx.original(Stack()):
        pass


def test_graphs_needs_a_net():
    with pytest.raises(mfx.MfxError, match=r"Stack has not been momentumized; call mfx.momentumize\(model\) first"):
        mfx.graphs(Stack())


# --- graph modules ---------------------------------------------------------------------------------------------------


def test_trace():
    model = Stack()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    module = mfx.trace(model)
    assert isinstance(module, fx.GraphModule)
    assert torch.equal(module(inputs()), model(inputs()))
    assert [m.training for m in model.modules()] == flags
    assert not module.get_submodule("blocks.1.norm1").training
    assert module.get_submodule("blocks.0.norm1").training
    assert dict(module.named_parameters())["head.weight"] is model.head.weight


def test_trace_fixes_arguments_with_defaults():
    module = mfx.trace(Masked())
    assert [node.name for node in module.graph.nodes if node.op == "placeholder"] == ["x"]


@pytest.mark.parametrize("make", [mfx.trace, fx.symbolic_trace], ids=["mfx.trace", "torch.fx"])
def test_momentumize_a_graph_module(make):
    model = Stack()
    module = make(model)
    code = module.code
    net = mfx.momentumize(module)
    assert isinstance(net, fx.GraphModule)
    assert (module.code, module(inputs()).tolist()) == (code, model(inputs()).tolist())
    assert torch.equal(net(inputs()), mfx.momentumize(model)(inputs()))
    assert list(net.state_dict()) == list(module.state_dict())
    assert net.head.weight is model.head.weight
    assert len(momentum_calls(net)) == 1
    assert list(mfx.graphs(net)) == ["train"]
    assert_reversible(net, net.get_submodule("blocks.0.mix"), inputs())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_of_a_graph_module(make_copy):
    net = mfx.momentumize(mfx.trace(Stack()))
    y = net(inputs())
    copied = make_copy(net)
    with torch.no_grad():
        net.head.weight.zero_()
    assert torch.equal(copied(inputs()), y)
    assert_reversible(copied, copied.get_submodule("blocks.0.mix"), inputs())


def test_a_graph_module_without_chains():
    module = mfx.trace(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="Linear has no chain of residual adds"):
        assert mfx.momentumize(module) is module


def test_recomputing_is_false_outside():
    net = mfx.momentumize(Stack())
    with counting(net.head) as calls:
        net(inputs()).sum().backward()
    assert calls == [False]
    assert mfx.recomputing() is False


def test_a_net_is_seen_in_print():
    model = Stack()
    before = repr(model)
    net = mfx.momentumize(model, gamma=0.5)
    line = "  momentumized by mfx: gamma=0.5, 6 steps in 1 chain\n"
    assert repr(net) == before.replace("(\n", f"(\n{line}", 1)
    assert repr(model) == before
    assert repr(copy.deepcopy(net)) == repr(pickle.loads(pickle.dumps(net))) == repr(net)
    assert "gamma=0.25" in repr(mfx.momentumize(net, gamma=0.25))
