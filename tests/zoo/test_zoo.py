"""Models of all libraries judged, some every day; the kept table against its targets; and verdicts that fail."""

import multiprocessing
import random
import re
from dataclasses import replace
from statistics import median

import pytest
import timm
import torch
from torch import nn

import mfx
from tests import sampling
from tests.models.step import train_step
from tests.passes.cases import example, make
from tests.passes.stream_cases import CASES
from tests.zoo import endings, kept, sweep, table
from tests.zoo.catalogue import LIBRARIES, entries, entry
from tests.zoo.entry import Entry
from tests.zoo.row import EQUAL, REDRAWN, ROUNDED, SUMMED, Row
from tests.zoo.timm import FAMILIES, smallest
from tests.zoo.verdict import (
    differences,
    differences_but_for_order,
    differences_but_for_rounding,
    fresh_draws,
    generic,
    judge,
    updates_run,
)

KEPT = kept.read()
ROWS = kept.rows_of(KEPT)
SMALL = 10_000_000  # parameters of models that may be judged by default

ENTRIES = {f"{entry.library}-{entry.name}": entry for library in LIBRARIES for entry in entries(library)}
DAILY = [f"{row.library}-{row.model}" for row in ROWS if row.rewritten and row.parameters < SMALL]
DAILY = [name for name in DAILY if ENTRIES[name].is_installed]
random.Random(0).shuffle(DAILY)  # else three in a row would be of one library


def models():
    chosen = set(sampling.sample(DAILY, 3))
    for name, model in ENTRIES.items():
        marks = () if name in chosen else pytest.mark.zoo
        yield pytest.param(model, id=f"{name}-sample{sampling.number()}" if name in chosen else name, marks=marks)


@pytest.mark.parametrize("model", list(models()))
def test_model(model):
    """Right, and what the kept table says of it, but for bytes: other versions of torch may keep others."""
    if not model.is_installed:
        pytest.skip(f"{model.package or model.library} is not installed")
    row = judge(model)
    assert row.is_right, f"{row.verdict} {row.failure}"
    expected = next((row for row in ROWS if row.key == (model.library, model.name)), None)
    if expected is not None and row.versions == expected.versions:
        assert (row.adds, row.chained, row.chains, row.verdict) == (
            expected.adds,
            expected.chained,
            expected.chains,
            expected.verdict,
        )


# --- the kept table ---------------------------------------------------------------------------------------------------


def test_every_model_has_a_row_or_is_named_as_pending():
    judged, pending = [row.key for row in ROWS], [tuple(key) for key in KEPT["pending"]]
    assert len(judged) == len(set(judged))
    assert sorted([*judged, *pending]) == sorted((model.library, model.name) for model in ENTRIES.values())


def test_the_page_is_made_of_the_rows():
    assert (kept.FOLDER / "zoo.md").read_text() == kept.page(KEPT)


def test_every_model_is_captured_or_refused_with_a_reason():
    assert not [row.model for row in ROWS if row.failure or not row.capture]
    assert all(row.rewritten or row.says or row.refused or not row.adds for row in ROWS)


def test_no_gradient_is_wrong():
    assert not [(row.model, row.verdict) for row in ROWS if not row.is_right]
    assert all(row.gamma0 and row.exact == EQUAL for row in ROWS if row.rewritten)


def test_the_chains_that_there_are_were_found():
    assert table.share(ROWS) >= 0.95
    assert sum(row.rewritten for row in ROWS) >= 0.95 * sum(row.chained for row in ROWS)


def test_memory_is_saved():
    assert median(row.peak for row in ROWS if row.rewritten) < 0.8


@pytest.mark.parametrize("module", list(FAMILIES))
def test_families_of_timm_are_there(module):
    assert FAMILIES[module][0] in timm.list_models(module=module)


def test_no_family_of_timm_is_left_out():
    assert list(FAMILIES) == timm.list_modules()


@pytest.mark.zoo
@pytest.mark.parametrize("module", list(FAMILIES))
def test_the_smallest_of_each_family_was_chosen(module):
    assert FAMILIES[module][0] == smallest(module)


# --- verdicts can fail ------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """Two steps x + f(x) that were written for a test."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.first(x).tanh()
        return x + self.second(x).tanh()


class Miscounting(Blocks):
    """Every run computes something else."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x) * self.runs


class Raising(Blocks):
    """Broken."""

    def forward(self, x):
        raise LookupError("nothing here")


class Overflowing(Blocks):
    """Nothing to compare."""

    def forward(self, x):
        return super().forward(x) / 0


class Branching(Blocks):
    """No graph can hold it."""

    def forward(self, x):
        return super().forward(x) if float(x.detach().sum().abs()) >= 0 else x


class Turns(nn.Module):
    """Two streams of two steps each that take turns, with dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = x.sin()
        for to_x, to_y in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + self.dropout(to_x(x))
            y = y + self.dropout(to_y(y))
        return x, y


def of(make):
    return Entry("timm", make.__name__, make, lambda: ((torch.randn(2, 4),), {}))


def test_a_right_model():
    row = judge(of(Blocks))
    assert row.is_right
    assert (row.verdict, row.capture, row.parameters) == (EQUAL, "symbolic", 40)
    assert (row.adds, row.chained, row.rewritten, row.chains, row.missed) == (2, 2, 2, (2,), 0)
    assert row.peak > 0


def test_a_model_without_chains_is_unchanged():
    row = judge(of(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())))
    assert row.is_right
    assert (row.verdict, row.capture, row.adds, row.rewritten) == ("unchanged", "symbolic", 0, 0)


class Interrupted(Blocks):
    """A line that ends a graph between the two steps."""

    def forward(self, x):
        x = x + self.first(x).tanh()
        assert x.detach().numpy().tolist()
        return x + self.second(x).tanh()


def test_what_runs_in_pieces_counts():
    row = judge(of(Branching))
    assert (row.capture, row.chained, row.rewritten, row.missed) == ("module by module", 2, 2, 0)


def test_a_chain_that_a_line_cuts_counts_as_missed():
    row = judge(of(Interrupted))
    assert (row.capture, row.chained, row.rewritten, row.missed) == ("module by module", 2, 0, 2)
    ((reason, count),) = table.reasons(row).items()
    assert (reason.partition(";")[0], count) == ("a single residual step", 2)
    assert "cannot be captured as one graph" in row.says[0]


def test_a_model_that_does_not_compute_the_same_twice_is_told_from_a_wrong_gradient():
    row = judge(of(Miscounting))
    assert row.is_wrong
    assert "the model itself does not compute the same twice" in row.gamma0


def test_masks_drawn_in_another_order_are_seen_as_such():
    row = judge(of(Turns))
    assert row.is_right
    assert (row.gamma0, row.exact, row.chains) == (REDRAWN, EQUAL, (2, 2))


@pytest.mark.parametrize("make, message", [(Raising, "LookupError in .*: nothing here"), (Overflowing, "not finite")])
def test_a_broken_model_is_a_failure(make, message):
    row = judge(of(make))
    assert not row.is_right
    assert re.search(message, row.failure)


def outcome(change=lambda found: {}):
    torch.manual_seed(0)
    found = train_step(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), [torch.ones(3, 4).cumsum(0)])
    return replace(found, **change(found))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: {"outputs": [found.outputs[0].nextafter(torch.ones(()))]}, "outputs differ"),
        (lambda found: {"grads": {**found.grads, "0.bias": torch.ones(4)}}, "gradients differ: ['0.bias']"),
        (lambda found: {"state": {**found.state, "1.running_mean": torch.ones(4)}}, "buffers differ"),
        (lambda found: {"rng": found.rng.roll(1)}, "the random state differs"),
    ],
)
def test_a_difference_is_seen(change, message):
    assert differences(outcome(), outcome()) == EQUAL
    assert message in differences(outcome(change), outcome())


def test_rounding_is_seen_as_such():
    def by(factor):
        return outcome(lambda found: {"outputs": [x * factor for x in found.outputs]})

    assert differences_but_for_rounding(by(1 + 1e-6), outcome()) == ROUNDED
    assert "more than rounding" in differences_but_for_rounding(by(1.001), outcome())


def test_sums_in_another_order_are_seen_as_such():
    def by(factor, **more):
        return outcome(lambda found: {"grads": {name: x * factor for name, x in found.grads.items()}, **more})

    assert differences_but_for_order(by(1 + 1e-6), outcome()) == SUMMED
    assert "gradients differ" in differences_but_for_order(by(1.001), outcome())
    assert "random state" in differences_but_for_order(by(1, rng=torch.zeros_like(torch.get_rng_state())), outcome())


def test_steps_are_counted_as_often_as_they_run():
    block = mfx.momentumize(Blocks())

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block(self.block(x))

    assert updates_run(Twice(), ((torch.ones(1, 4),), {})) == 4


def test_a_step_that_moves_two_streams_counts_twice():
    model, inputs = make(CASES["CoAttention"]), example(CASES["CoAttention"])
    net = mfx.momentumize(model)
    (chain,) = mfx.explain(net, *inputs).chains
    assert updates_run(net, (inputs, {})) == len(chain.updates) == 2 * len(chain.steps)


def test_random_numbers_begin_anew_for_each_count():
    found = set()
    for _ in range(2):
        with fresh_draws():
            found.add((random.random(), torch.rand(1).item()))
    assert len(found) == 1


class Dropping(nn.Module):
    """Layers that are left out at random; which ones, is decided by values before the first of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        for layer, keep in zip(self.layers, torch.rand(6).tolist(), strict=True):
            x = x + layer(x).tanh() if keep > 0.4 else x
        return x


def test_sums_do_not_count_where_a_call_with_other_random_numbers_is_refused():
    row = judge(of(Dropping))
    assert row.is_right
    assert row.chained > 1
    assert row.rewritten == 0
    assert any("has other chains in one call than in another" in text for text in row.says)


def test_reasons_are_the_same_for_all_models():
    assert generic("the step changes the stream from (2, 3) float32 on cpu to (2, 4) float32 on cpu") == (
        "the step changes the stream from (…) float32 on cpu to (…) float32 on cpu"
    )
    assert generic("add_3 changes in place a value") == "an operation changes in place a value"


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work, failure",
    [
        (endings.dies, "ended by signal 6"),
        (endings.leaves, "exit status 3"),
        (endings.sleeps, "more than 0.5 seconds"),
    ],
)
def test_what_ends_a_process_is_a_row(work, failure, monkeypatch):
    if work is endings.sleeps:
        monkeypatch.setattr(sweep, "SECONDS", 0.5)
    row = sweep.in_process(multiprocessing.get_context("spawn"), ("timm", "whatever"), work)
    assert row.key == ("timm", "whatever")
    assert failure in row.failure


def test_a_row_survives_the_file(tmp_path):
    row = Row("timm", "resnet", chains=(2, 3), refused={"why": 1}, says=("mfx: so",), peak=0.5)
    other = replace(row, model="vit", failure="it broke")
    kept.write([other, row], tmp_path)
    data = kept.read(tmp_path)
    assert kept.rows_of(data) == [row, other]
    assert "* timm, vit: it broke" in (tmp_path / "zoo.md").read_text()
    assert kept.with_row([row, other], replace(row, adds=7)) == [other, replace(row, adds=7)]
    assert entry("timm", "vgg11").name == "vgg11"
