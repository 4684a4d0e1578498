"""Explanations as objects, as text and as data."""

import itertools
import json

import pytest
import torch
from torch import fx, nn

import mfx
from mfx.reports.explain.explain import branch_weights
from mfx.text import size
from tests.mfx.models import ConvNet, Masked, Stack, images, inputs


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.shortcut = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.shortcut(x)


class Mixed(nn.Module):
    """A chain, a projection shortcut, and a lone residual add."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Stack()
        self.body.head = nn.Linear(8, 8)
        self.short = Shortcut()
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = self.short(self.body(x))
        return x + self.last(x)


class Steps(nn.Module):
    """As many residual steps as are asked for."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, x):
        for step in self.steps:
            x = x + step(x)
        return x


def test_a_chain():
    model = Stack()
    for each in (model, mfx.momentumize(model)):
        explanation = mfx.explain(each)
        assert isinstance(explanation, mfx.Explanation)
        (chain,) = explanation.chains
        assert (chain.name, chain.gamma, chain.arithmetic) == ("blocks", 0.9, "exact")
        assert [step.path for step in chain.steps[:4]] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
        assert all(isinstance(node, fx.Node) for step in chain.steps for node in step.nodes)
        assert [node.target for node in chain.steps[1].nodes] == ["blocks.0.norm2", "blocks.0.mlp"]
        assert chain.steps[0].captures == ()
        assert all("models.py:" in step.source for step in chain.steps)
        assert set(explanation.graphs) == {"train"}
        assert explanation.rejections == ()


def test_captures():
    (chain,) = mfx.explain(Masked(), inputs(), torch.ones(8)).chains
    assert all(step.captures == ("mask",) for step in chain.steps)


def test_rejections():
    explanation = mfx.explain(Mixed())
    shortcut, lone = explanation.rejections
    assert "projection shortcut" in shortcut.reason
    assert shortcut.path == "short"
    assert shortcut.source.endswith(f"{__file__.rsplit('/', 1)[-1]}:{Shortcut.forward.__code__.co_firstlineno + 1}")
    assert isinstance(shortcut.node, fx.Node)
    assert "a single residual step" in lone.reason


def test_the_nets_own_options():
    net = mfx.momentumize(Stack(), gamma=0.25, arithmetic="float", skip="blocks.1")
    explanation = mfx.explain(net)
    assert [(chain.name, chain.gamma, chain.arithmetic) for chain in explanation.chains] == [
        ("blocks.0", 0.25, "float"),
        ("blocks.2", 0.25, "float"),
    ]
    assert [rejection.reason for rejection in explanation.rejections] == ["left out by only/skip"] * 2


def test_explaining_disturbs_nothing():
    model, fired = ConvNet(), []
    model.layers[0].register_forward_hook(lambda *_: fired.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    for _ in range(2):
        mfx.explain(model)
        mfx.explain(model, images())
    assert fired == []
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert "forward" not in model.__dict__
    net = mfx.momentumize(model)
    mfx.explain(net, images())
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


class Nudged(nn.Module):
    """Branches that do not depend on the state, so that the output is linear in each of them."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.values = nn.ParameterList(nn.Parameter(torch.rand(8, dtype=torch.float64)) for _ in range(steps))

    def forward(self, x):
        for value in self.values:
            x = x + (value + 0 * x)
        return x


@pytest.mark.parametrize("velocity", ["zero", "residual"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [2, 7])
def test_weights_against_an_experiment(velocity, gamma, steps):
    net = mfx.momentumize(Nudged(steps), gamma=gamma, velocity=velocity)
    x = inputs(dtype=torch.float64)
    base = net(x).detach()
    measured = []
    for value in net.values:
        with torch.no_grad():
            value.add_(1.0)
            measured.append((net(x) - base).mean().item())
            value.sub_(1.0)
    (chain,) = mfx.explain(net).chains
    assert chain.weights == pytest.approx(measured, rel=1e-6)
    if velocity == "zero":
        assert chain.weights == pytest.approx([1 - gamma ** (steps - t) for t in range(steps)])


@pytest.mark.parametrize("magnitude", [0.25, 0.5])
def test_weights_of_random_signs_have_the_spread_of_all_signs(magnitude):
    depth = 6
    weights = []
    for signs in itertools.product((-1, 1), repeat=depth - 1):
        gammas = [0.0, *(magnitude * sign for sign in signs)]
        v, x = torch.zeros(depth), torch.zeros(depth)  # f of each step is a dimension of its own
        for gamma, f in zip(gammas, torch.eye(depth), strict=True):
            v = gamma * v + (1 - gamma) * f
            x = x + v
        weights.append(x)
    weights = torch.stack(weights)
    (chain,) = mfx.explain(mfx.momentumize(Steps(depth), gamma=mfx.BDIA(magnitude))).chains
    torch.testing.assert_close(torch.tensor(chain.weights), weights.mean(0))
    torch.testing.assert_close(torch.tensor(chain.spread), weights.std(0, correction=0))
    assert chain.shown_gamma == f"±{magnitude}"


def test_random_signs_are_explained_in_words():
    signed, plain = (mfx.explain(mfx.momentumize(Steps(6), gamma=gamma)) for gamma in (mfx.BDIA(0.25), 0.25))
    words = "gamma has mean 0 and each branch counts 1 in the mean"
    for found, has in ((signed, True), (plain, False)):
        assert (words in " ".join(str(found).split())) is has
        assert (words in found._repr_html_()) is has
        assert ("±0.25" in str(found)) is has


def test_branch_weights_of_residual_start_sum_what_the_first_branch_adds():
    assert branch_weights(3, 0.5, residual_start=True) == pytest.approx((1.75, 0.75, 0.5))


@pytest.mark.parametrize("build", [Stack, Mixed, lambda: ConvNet(depth=40), lambda: nn.Linear(2, 2)])
def test_text_fits_and_says_it_all(build):
    explanation = mfx.explain(build())
    text = str(explanation)
    assert max(map(len, text.splitlines())) <= 100
    for chain in explanation.chains:
        assert f"{chain.name} " in text
        assert f"{chain.weights[0]:.2f}" in text
    for rejection in explanation.rejections:
        assert rejection.node.name in text
    assert text.startswith(explanation.model)


class Long(nn.Module):
    """Names that do not fit a line."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"b" * 70: Mixed(), "c" * 70: Mixed()})
        self.add_module("a" * 90, inner)

    def forward(self, x):
        for inner in self.get_submodule("a" * 90).values():
            x = inner(x)
        return x


def test_long_names_fit():
    text = str(mfx.explain(Long()))
    assert max(map(len, text.splitlines())) <= 100
    assert "…" in text


def test_html_is_escaped():
    explanation = mfx.explain(type("A<b>&", (Stack,), {})())
    assert "A<b>&" in str(explanation)
    shown = explanation._repr_html_()
    assert "A&lt;b&gt;&amp;" in shown
    assert "<b>" not in shown


@pytest.mark.parametrize("build", [Stack, Mixed, ConvNet])
def test_as_data(build):
    explanation = mfx.explain(build())
    data = json.loads(json.dumps(explanation.to_dict()))
    assert data["model"] == build.__name__
    assert [chain["name"] for chain in data["chains"]] == [chain.name for chain in explanation.chains]
    assert [len(chain["steps"]) for chain in data["chains"]] == [len(chain.steps) for chain in explanation.chains]
    assert len(data["rejections"]) == len(explanation.rejections)


def test_explain_takes_a_module():
    for wrong, name in ((Stack, "the class Stack"), ("Stack", "a str"), (None, "a NoneType")):
        with pytest.raises(mfx.MfxError, match=rf"explain takes a torch.nn.Module, not {name}\."):
            mfx.explain(wrong)


def test_a_graph_module_can_be_explained():
    module = mfx.trace(Stack())
    assert [len(chain.steps) for chain in mfx.explain(module).chains] == [6]
    net = mfx.momentumize(module, gamma=0.5)
    (chain,) = mfx.explain(net).chains
    assert (len(chain.steps), chain.gamma) == (6, 0.5)


class Timed(nn.Module):
    """Two steps, and what nobody calls one: an activation with a cube, an embedding of time that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.time, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, t):
        time = torch.tanh(t)
        x = self.first(x) * time
        x = x + self.second(x)
        x = x + self.head(torch.tanh(x))
        x = self.first(x)
        x = torch.tanh(x + 0.044 * x**3)
        return self.first(x) + self.time(time)


def test_the_verdict_counts_residual_steps_and_not_what_only_looks_like_one():
    explanation = mfx.explain(Timed(), inputs(), inputs())
    assert len(explanation.rejections) == 2
    assert explanation.left_steps == ()
    kept = [f"{size(use.kept)}" for use in (explanation.estimate.momentum, explanation.estimate.plain)]
    assert explanation.verdict == f"Timed: 2 of 2 residual steps in 1 chain: {kept[0]} kept instead of {kept[1]}"
    assert str(explanation).startswith(f"{explanation.verdict}\n")
    assert "2 more sums only look like a residual step: mfx explain -v" in str(explanation)
    assert "x**3" not in str(explanation)
    assert explanation.rejections[0].node.name in explanation.details()
    assert [found["is_step"] for found in explanation.to_dict()["rejections"]] == [False, False]


def test_shortcuts_and_lone_steps_are_residual_steps():
    explanation = mfx.explain(Mixed())
    assert explanation.left_steps == explanation.rejections
    assert explanation.verdict.startswith(f"Mixed: {len(explanation.chains[0].steps)} of ")
    assert "nothing is lost" not in str(explanation)
    assert mfx.explain(nn.Linear(2, 2)).verdict == "Linear: no chain of residual steps, 0 residual steps left alone"


class Nested(nn.Module):
    """Each level is a step of the one around it."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.inner = Nested(levels - 1) if levels > 1 else nn.Linear(8, 8)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(torch.tanh(x))
        return x + self.inner(torch.sin(x))


def test_nested_chains_are_indented_and_bytes_add_up():
    explanation = mfx.explain(Nested(3), torch.randn(4, 8))
    assert [chain.depth for chain in explanation.chains] == [0, 1, 2]
    names = [row[0] for row in explanation.contents.memory.rows]
    assert [len(name) - len(name.lstrip(" ")) for name in names[:3]] == [0, 0, 2]
    assert [name.lstrip(" ")[:1] == "└" for name in names[:4]] == [False, True, True, False]
    outermost, total = explanation.chains[0].memory, explanation.estimate
    around = dict(zip(names, explanation.contents.memory.rows, strict=True))["around the chains"]
    assert around[1] == size(total.plain.kept - outermost.plain)
    assert around[2] == size(total.momentum.kept - outermost.kept)


def test_hooks_are_spoken_of_only_where_there_are_some():
    model = Stack()
    assert "hooks" not in str(mfx.explain(model, inputs()))
    model.blocks[1].register_forward_hook(lambda *_: None)
    explanation = mfx.explain(model, inputs())
    assert explanation.unheard == ("blocks.1",)
    assert "hooks on these modules do not run, since sums in them are part of a chain: blocks.1" in str(explanation)


def test_what_a_momentum_cannot_save_is_said_once():
    explanation = mfx.explain(Nested(2), torch.randn(4, 8))
    assert str(explanation).replace("\n", " ").count("too short for gamma > 0") == 1
