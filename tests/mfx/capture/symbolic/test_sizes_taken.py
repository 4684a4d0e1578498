"""A graph whose trace has used sizes as numbers is for calls of other shapes, too, if these have the same ones."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mfx
from mfx.net import routes
from tests.models.step import assert_bit_equal, train_step

WIDTH = 8


class Sized(nn.Module):
    """Blocks whose code uses sizes as numbers; `read` takes the batch."""

    def __init__(self, read: Callable[[Tensor], float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.inner:
            x = x + layer(x).tanh() * self.read(x)
        return x


def is_large(x: Tensor) -> float:
    return 2.0 if x.shape[0] > 4 else 3.0


def are_equal(x: Tensor) -> float:
    rows, columns = x.size(0), x.size(-1)
    return 2.0 if rows == columns else 3.0


def as_number(x: Tensor) -> float:
    return float(int(x.shape[0]))


def length(x: Tensor) -> float:
    return float(len(x))


# Batches, and which of them needs a graph of its own.
CASES = {
    "condition": (is_large, {2: True, 3: False, 4: False, 5: True, 9: False, 1: False}),
    "comparison": (are_equal, {2: True, 8: True, 3: False, 9: False}),
    "number": (as_number, {2: True, 3: True, 5: True}),
    "length": (length, {2: True, 3: True, 5: True}),
}


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    made: list[object] = []
    capture = routes.capture

    def noted(*args, **kwargs):
        made.append(result := capture(*args, **kwargs))
        return result

    monkeypatch.setattr(routes, "capture", noted)
    return made


@pytest.mark.parametrize("name", CASES)
def test_shapes_with_the_same_sizes_share_a_graph(name: str, traces: list[object]) -> None:
    read, needs = CASES[name]
    model = Sized(read)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="symbolic")
    for batch, is_new in [*needs.items(), *dict.fromkeys(needs, False).items()]:
        x = torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(batch))
        before = len(traces)
        assert_bit_equal(train_step(net, [x]), train_step(model, [x]))
        assert (len(traces) > before) is is_new, batch


def test_a_copy_from_a_file_knows_the_sizes(traces: list[object]) -> None:
    model = Sized(is_large)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="symbolic")
    net(torch.randn(2, WIDTH))
    loaded = pickle.loads(pickle.dumps(net))
    loaded(torch.randn(2, WIDTH))
    traces.clear()
    for batch, count in ((3, 0), (6, 1)):
        x = torch.randn(batch, WIDTH)
        assert_bit_equal(train_step(loaded, [x]), train_step(model, [x]))
        assert bool(traces) is bool(count)


class Shared(nn.Module):
    """Blocks that share what one of them would own if its sizes were its values: positions, by the first state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        positions = torch.arange(x.shape[1]).cos()
        for layer in self.inner:
            x = x + layer(x).tanh() * positions
        return x


def test_what_is_made_of_a_states_size_is_there_for_all_steps() -> None:
    model = Shared()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    x = torch.randn(3, WIDTH)
    assert_bit_equal(train_step(net, [x]), train_step(model, [x]))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]


class Biased(nn.Module):
    """Blocks of two sums; the first computes a bias of sizes of a value inside of it, and may hand it on, as in T5."""

    def __init__(self, *, handed_on: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.table, self.handed_on = nn.Embedding(32, WIDTH), handed_on

    def forward(self, x: Tensor) -> Tensor:
        x, bias = self.embed(x), None
        for layer in self.inner:
            normed = self.norm(x)
            if bias is None or not self.handed_on:
                bias = self.table(torch.arange(normed.shape[0]))
            x = x + (layer(normed) + bias).tanh()
            x = x + self.last(x).tanh()
        return x


@pytest.mark.parametrize("handed_on", [False, True])
def test_what_is_made_of_a_size_inside_of_a_step_belongs_to_it(handed_on: bool) -> None:
    model = Biased(handed_on=handed_on)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="symbolic")
    for batch in (3, 5):
        x = torch.randn(batch, WIDTH)
        assert_bit_equal(train_step(net, [x]), train_step(model, [x]))
    # What the first step hands on is there for the others once its chain has run.
    assert [len(chain.steps) for chain in mfx.explain(net, x).chains] == ([2, 6] if handed_on else [8])
