from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.passes.harness import Result, code_of, rewrite_model

D = 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor, flags: list[bool], unused: Tensor | None = None) -> dict[str, Tensor]:
        weights = self.q(x).softmax(-1)
        return {"out": weights * mask if flags[0] else weights, "weights": weights}


class Careless(nn.Module):
    """Changes its input, the buffer it owns, and a value of its own, in place."""

    def __init__(self, *, what: str) -> None:
        super().__init__()
        self.what = what
        self.fc = nn.Linear(D, D)
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "buffer":
            self.seen.add_(1)
        if self.what == "input":
            self.relu(x)
        y = self.fc(x)
        if self.what == "own":
            self.relu(y)
        return y


class Net(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Linear(D, D)
        self.blocks = nn.ModuleList([module, nn.Linear(D, D)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.blocks[0](x)
        return x + self.blocks[1](x)


def modules_of(result: Result, t: int) -> list[str]:
    return [node.target for node in result.chains[0].steps[t].branch.nodes if node.op == "call_module"]


def flat(result: Result) -> list[str]:
    return [call.target for call in result.rewritten.flat]


def test_a_whole_module_within_one_branch_is_called_again() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(D, D), nn.Sequential(nn.GELU(), nn.Linear(D, D)))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    result = rewrite_model(Net(Two()))
    assert modules_of(result, 0) == ["blocks.0"]
    assert not flat(result)


def test_structured_arguments_and_outputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            for attn in self.attn:
                result = attn(x, mask=mask, flags=[True])
                x = x + result["out"]
            return x, result["weights"]

    model = Model()
    inputs = torch.randn(2, D), torch.randn(2, D)
    result = rewrite_model(model, *inputs)
    assert modules_of(result, 0) == ["attn.0"]
    assert result.chains[0].steps[0].sides == ()
    assert len(result.chains[0].steps[1].sides) == 1
    assert "mask = mask, flags = [True]" in code_of(result.chains[0].steps[0].branch)
    assert "'weights'" not in code_of(result.chains[0].steps[0].branch)
    assert all(map(torch.equal, result.run(*inputs, gamma=0.0), model(*inputs)))


def test_a_module_that_changes_its_own_values_is_folded() -> None:
    assert modules_of(rewrite_model(Net(Careless(what="own"))), 0) == ["blocks.0"]


def test_a_buffer_that_no_branch_reads_is_changed_outside_of_the_chain() -> None:
    model = Net(Careless(what="buffer"))
    result = rewrite_model(model)
    assert flat(result) == ["blocks.0"]
    assert "add_" in [node.name for node in result.graph.nodes]


def test_a_module_that_changes_its_input_is_not_folded() -> None:
    result = rewrite_model(Net(Careless(what="input")))
    assert flat(result) == ["blocks.0"]


def test_a_module_that_spans_steps_stays_flat() -> None:
    class Span(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.fs[0](x)
            return x + self.fs[1](x)

    result = rewrite_model(nn.Sequential(Span(), Span()))
    assert flat(result) == ["0", "1"]
    assert len(result.chains[0].steps) == 4


def test_modules_outside_of_chains_are_called_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(D, D), nn.ReLU(inplace=True))
            self.net = Net(nn.Linear(D, D))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(self.stem(x))

    result = rewrite_model(Model())
    assert "self.stem(x)" in code_of(result.graph)


def test_an_argument_that_is_not_read_does_not_become_a_capture() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleList(Attention() for _ in range(3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            before = mask
            for attn in self.attn:
                out = attn(x, mask, [True], before)["out"]
                before = out * 2
                x = x + out
            return x + before

    model = Model()
    inputs = torch.randn(2, D), torch.randn(2, D)
    result = rewrite_model(model, *inputs)
    assert [len(graphs.steps) for graphs in result.chains] == [3]
    assert torch.equal(result.run(*inputs, gamma=0.0), model(*inputs))


def test_descriptions_travel_with_the_call() -> None:
    result = rewrite_model(Net(nn.Sequential(nn.Linear(D, D), nn.ReLU())))
    (call,) = (node for node in result.chains[0].steps[0].branch.nodes if node.op == "call_module")
    assert "test_fold.py" in call.meta["stack_trace"]
    assert [path for path, _ in call.meta["nn_module_stack"].values()][-1] == "blocks.0"
