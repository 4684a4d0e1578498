from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from mfx_passes import ChainGraphs, MomentumPass, Selection
from mfx_passes.momentum_pass import call_name
from mfx_passes.rewrite.portable_graph import copy_graph, dump_calls, load_calls
from tests.passes.cases import CASES, Plain, Taps, example, make
from tests.passes.harness import PlainRecurrence, code_of, rewrite_model, rewritten, traced


def momentum_pass(gamma: float = 0.0, **selection: object) -> MomentumPass:
    return MomentumPass(lambda graphs: PlainRecurrence(graphs, gamma), Selection(**selection))


def graph_module(name: str) -> fx.GraphModule:
    model = make(CASES[name])
    return fx.GraphModule(model, traced(model).graph)


@pytest.mark.parametrize("name", CASES)
def test_the_pass_rewrites_a_graph_module(name: str) -> None:
    module, inputs = graph_module(name), example(CASES[name])
    expected = make(CASES[name])(*copy.deepcopy(inputs))
    done = momentum_pass()(module)
    assert done.modified
    torch.testing.assert_close(done.graph_module(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_running_it_twice_is_running_it_once(name: str) -> None:
    module = graph_module(name)
    momentum_pass()(module)
    code = module.code
    assert not momentum_pass()(module).modified
    assert module.code == code


def test_what_it_was_told_to_leave_out_it_leaves_out_twice() -> None:
    module = graph_module("Stages")
    chosen = momentum_pass(only=("stages.1",))
    assert chosen(module).modified
    assert not chosen(module).modified


@pytest.mark.parametrize("options", [{"min_steps": 9}, {"skip": ("*",)}])
def test_a_graph_without_chains_comes_back_as_it_was(options: dict[str, object]) -> None:
    module = graph_module("PreActivation")
    code = module.code, code_of(module.graph)
    assert not momentum_pass(**options)(module).modified
    assert (module.code, code_of(module.graph)) == code


def test_it_fits_into_a_pass_manager() -> None:
    done = PassManager(passes=[momentum_pass()], steps=2)(graph_module("Plain"))
    assert done.modified
    assert [name for name in done.graph_module._modules if name.startswith("momentum")] == ["momentum_fs"]


def test_names_of_calls() -> None:
    assert call_name("encoder.layers#2", ()) == "momentum_encoder_layers_2"
    assert call_name("fs", {"momentum_fs", "momentum_fs_2"}) == "momentum_fs_3"


def calls(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if str(node.target).startswith("momentum"))


def test_a_call_says_where_it_comes_from() -> None:
    (call,) = calls(rewrite_model(make(Taps)).graph)
    assert "cases.py" in call.meta["stack_trace"]
    assert call.meta["custom"] == {"momentum_chain": "fs"}


def test_with_shapes_the_states_keep_theirs() -> None:
    result = rewrite_model(make(Taps), *example(Taps))
    (call,) = calls(result.graph)
    assert all(user.meta["val"].shape == (2, 3, 4) for user in call.users)


def test_the_velocity_is_computed_from_the_state() -> None:
    result = rewritten(traced(make(Plain)), velocity="v0")
    (call,) = calls(result.graph)
    assert call.args[3].target == "v0"
    assert call.args[3].args == call.args[0]


def test_whoever_changes_a_tap_gets_a_copy() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            for f in self.fs:
                side = f(x)
                x = x + side
            side.mul_(3)
            return x.view(-1).clamp_(min=0), side

    model, x = Model(), torch.randn(2, 4)
    result = rewrite_model(model, x)
    assert [node.target for node in result.graph.nodes if node.op == "call_method"].count("clone") == 2
    with torch.no_grad():
        assert all(map(torch.equal, result.run(x, gamma=0.0), model(x)))


def test_arguments_of_a_branch_have_different_names() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor, x_: Tensor) -> Tensor:
            y = self.fs[2](x)
            for f in self.fs[:2]:
                y = y + f(y) * x * x_
            return y

    graph = rewrite_model(Model()).chains[0].steps[0].branch
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    assert len(set(names)) == 3
    assert names[0] == "x"
    compile(graph.python_code("self").src, "branch", "exec")


@pytest.mark.parametrize("name", CASES)
def test_chains_survive_pickle_and_deepcopy(name: str) -> None:
    result, inputs = rewrite_model(make(CASES[name])), example(CASES[name])
    expected = result.run(*copy.deepcopy(inputs), gamma=0.9)
    chains = list(result.chains)
    for copied in (pickle.loads(pickle.dumps(chains)), copy.deepcopy(chains)):
        assert all(isinstance(graphs, ChainGraphs) for graphs in copied)
        result.chains = copied
        torch.testing.assert_close(result.run(*copy.deepcopy(inputs), gamma=0.9), expected, rtol=0, atol=0)


def test_graphs_of_any_size_can_be_pickled() -> None:
    case = traced(nn.Sequential(*(nn.ReLU() for _ in range(3000))))
    assert len(pickle.loads(pickle.dumps(case.graph)).nodes) == 3002


class Pooling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)


def test_functions_that_pickle_does_not_find_by_name() -> None:
    (before,) = traced(Pooling()).graph.find_nodes(op="call_function", target=F.max_pool2d)
    again = pickle.loads(pickle.dumps(copy_graph(before.graph)))
    assert len(again.find_nodes(op="call_function", target=F.max_pool2d)) == 1


def test_copies_have_the_same_names_and_descriptions() -> None:
    case = traced(make(CASES["Transformer"]))
    copied = copy_graph(case.graph)
    assert code_of(copied) == code_of(case.graph)
    for a, b in zip(case.graph.nodes, copied.nodes, strict=True):
        assert (a.name, a.meta["stack_trace"]) == (b.name, b.meta["stack_trace"]) or a.op == "output"


def test_calls_survive_a_round_trip() -> None:
    case = traced(make(CASES["Transformer"]))
    again = load_calls(pickle.loads(pickle.dumps(dump_calls(case.calls))), case.graph)
    for a, b in zip(case.calls, again, strict=True):
        assert (a.target, a.args, dict(a.kwargs), a.output, a.nodes) == (
            b.target,
            b.args,
            dict(b.kwargs),
            b.output,
            b.nodes,
        )


def test_a_step_reads_what_the_chain_in_it_reads_and_no_more() -> None:
    class Block(nn.Module):
        def __init__(self, *inside: nn.Module) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.Linear(4, 4), *inside)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * self.scale

    inner = nn.Sequential(*(Block(Block(), Block()) for _ in range(2)))
    outer = rewrite_model(inner).chains[-1]
    for number, step in enumerate(outer.steps):
        read = {f"{number}.{path}" for path in ("f.0", "scale", "f.1.f", "f.1.scale", "f.2.f", "f.2.scale")}
        assert {target for target in step.targets if not target.startswith("momentum")} == read
