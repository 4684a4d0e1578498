"""A plan says what fits: the oracle is a training step that is measured, or rehearsed by mfx.explain."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mfx
from mfx.reports.plan.usages import CHECKPOINT, OFFLOADED, PLAIN, ZERO, Sizes
from mfx.reports.training_state import training_state
from tests.mfx.models import Stack
from tests.mfx.reports.plan.measured import peak_of_a_step

WIDTH, KIB = 64, 1024
MOMENTUM = "gamma=0.9"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 4, WIDTH // 4)).transpose(1, 3).unbind(2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Takes token numbers (batch, tokens), as many as it has positions, and returns a scalar."""

    def __init__(self, depth=6, positions=None):
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.positions = None if positions is None else nn.Parameter(torch.zeros(positions, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, ids):
        x = self.embed(ids)
        if self.positions is not None:
            x = x + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def tokens(batch=2, length=64):
    return torch.zeros(batch, length, dtype=torch.long)


@pytest.fixture(scope="module")
def planned():
    torch.manual_seed(0)
    model = Gpt()
    return model, mfx.plan(model, tokens(), "10MiB")


def ways_of(plan):
    return {way.name: way for way in plan.ways}


def test_what_fits_was_rehearsed_and_the_next_does_not_fit(planned):
    model, plan = planned
    ways = ways_of(plan)
    assert list(ways) == [PLAIN, CHECKPOINT, ZERO, OFFLOADED, MOMENTUM]
    room = plan.memory - plan.state.total
    nets = {ZERO: mfx.momentumize(model, gamma=0.0), MOMENTUM: mfx.momentumize(model)}
    for name, net in nets.items():
        for batch, length, fits in (
            (ways[name].batch, 64, True),
            (ways[name].batch + 1, 64, False),
            (2, ways[name].sequence, True),
            (2, ways[name].sequence + 64, False),
        ):
            usage = mfx.explain(net, tokens(batch, length)).estimate
            assert (usage.momentum.peak <= room) is fits
        assert usage.momentum.peak < usage.plain.peak
    assert ways[PLAIN].batch < ways[CHECKPOINT].batch
    assert ways[PLAIN].sequence < ways[MOMENTUM].sequence
    assert ways[OFFLOADED].kept <= ways[ZERO].kept  # tensors here are too small to be moved


@pytest.mark.parametrize("way", [PLAIN, CHECKPOINT, MOMENTUM])
def test_a_step_at_the_largest_batch_stays_below_the_memory(planned, way):
    """Peaks are by storages, so they are the predicted ones; exact states may take less on a CPU (see Usage.peak)."""
    model, plan = planned
    found = ways_of(plan)[way]
    room = plan.memory - plan.state.total
    peak = peak_of_a_step(model, tokens(found.batch), way)
    assert peak <= room
    assert peak >= (0.9 if way == MOMENTUM else 0.97) * room * found.batch / (found.batch + 1)


def test_the_time_is_by_operations_and_bytes(planned):
    ways = ways_of(planned[1])
    assert ways[PLAIN].time == 1
    assert 1 < ways[CHECKPOINT].time < 4 / 3
    assert 1 < ways[ZERO].time <= 4 / 3
    assert ways[MOMENTUM].time > 4 / 3  # and what the recurrence moves


class Moved(TorchDispatchMode):
    """Sums the bytes that operations read and write."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__ and "detach" not in func.__name__:
            self.total += sum(
                leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)
            )
        return out


def test_the_recurrence_takes_its_bytes_of_the_time():
    """Products of 64 columns take less time than the bytes they move, so that time is bytes."""
    model, x = nn.Sequential(*(Residual() for _ in range(12))), torch.zeros(512, WIDTH)
    time = ways_of(mfx.plan(model, x, "256MiB"))[MOMENTUM].time
    usages = mfx.explain(mfx.momentumize(model), x).estimate
    with Moved() as moved:
        model(x).backward(torch.ones_like(x))
    states = 12 * x.numel() * (42 + 42 + 12)  # exact, float32
    assert time == pytest.approx(usages.momentum.flops / usages.plain.flops + states / moved.total, rel=1e-3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x).tanh()


def test_masks_grow_with_the_sequence_and_other_inputs_do_not():
    inputs = (), {"ids": tokens(), "mask": torch.ones(2, 1, 64, 64), "scale": torch.ones(3), "flag": True}
    sizes = Sizes.of(inputs, None)
    assert sizes == Sizes(2, 64)
    _, grown = sizes.resized(inputs, Sizes(5, 128))
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in grown.items()}
    assert shapes == {"ids": (5, 128), "mask": (5, 1, 128, 128), "scale": (3,), "flag": ()}
    assert grown["flag"] is True
    assert grown["ids"].dtype is torch.long


def test_the_first_dimension_of_a_mask_grows_with_the_sequence():
    """A first dimension of both sizes is the batch's, which the first input says."""
    inputs = (torch.zeros(2, 64, 8), torch.zeros(64, 64), torch.zeros(64), torch.zeros(2, 2)), {}
    grown, _ = Sizes.of(inputs, 1).resized(inputs, Sizes(5, 128))
    assert [tuple(t.shape) for t in grown] == [(5, 128, 8), (128, 128), (128,), (5, 2)]
    square = (torch.zeros(64, 64), torch.zeros(64, 64)), {}
    grown, _ = Sizes.of(square, 1).resized(square, Sizes(5, 128))
    assert [tuple(t.shape) for t in grown] == [(5, 128), (5, 128)]


class Masked(nn.Module):
    """Adds a mask (tokens, tokens) to the products of its tokens."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, mask):
        for block in self.blocks:
            x = x + torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ block(x)
        return x


def test_a_model_with_a_square_mask_takes_longer_sequences():
    plan = mfx.plan(Masked(), (torch.zeros(2, 128, WIDTH), torch.zeros(128, 128)), "10MiB", sequence_dim=1)
    assert all(way.sequence > 128 and way.sequence_refusal is None for way in plan.ways)


def test_which_dimension_is_the_sequence():
    images, features = ((torch.zeros(2, 3, 8, 8),), {}), ((torch.zeros(2, 64, 8),), {})
    assert Sizes.of(images, None) == Sizes(2, None)
    assert Sizes.of(features, None) == Sizes(2, None)
    assert Sizes.of(features, 1) == Sizes(2, 64)
    (grown,), _ = Sizes(2, 64).resized(features, Sizes(2, 128))
    assert grown.shape == (2, 128, 8)


def test_a_model_that_takes_no_longer_sequences_is_told():
    plan = mfx.plan(Gpt(depth=2, positions=200), tokens(), "1GiB")
    assert {way.longest for way in plan.ways} == {"192+"}
    (note,) = str(plan).splitlines()[-1:]
    assert note.startswith("+ the model itself refuses more: RuntimeError: ")
    assert f"<small>{note}" in plan._repr_html_()
    assert all(way.batch_refusal is None and way.sequence_refusal for way in plan.ways)


def test_a_given_sequence_that_fits_is_the_least_answer():
    """64 is the first multiple, and refused; 32 was rehearsed."""
    plan = mfx.plan(Gpt(depth=2, positions=48), tokens(length=32), "1GiB")
    assert {way.longest for way in plan.ways} == {"32+"}
    small = mfx.plan(Gpt(depth=2, positions=48), tokens(length=32), "100KiB")
    assert {way.longest for way in small.ways} == {"none"}


class Grouped(nn.Module):
    """Takes batches that are multiples of a number, up to another one."""

    def __init__(self, multiple, most):
        super().__init__()
        self.multiple, self.most = multiple, most
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x):
        if x.shape[0] % self.multiple or x.shape[0] > self.most:
            raise ValueError("a batch of another size")
        for block in self.blocks:
            x = block(x)
        return x


def test_batches_that_are_multiples():
    """The oracle is the model that takes every batch: with the given batch 8, the multiple of 8 below its answer."""
    x = torch.zeros(8, WIDTH)
    free, grouped, ended = (mfx.plan(Grouped(*how), x, "1MiB").ways for how in ((1, 1e9), (4, 1e9), (4, 100)))
    assert [way.batch for way in grouped] == [way.batch // 8 * 8 for way in free]
    assert {way.largest for way in ended} == {"96+"}
    (refusal,) = {way.batch_refusal for way in ended}
    assert refusal == "ValueError: a batch of another size"
    assert all(way.batch_refusal is None and way.batch > 100 for way in grouped)


def test_the_host_memory_of_offloading():
    """Tensors from 1 MiB on are moved: of eight steps' inputs the caller holds the first."""
    x = torch.zeros(2**20 // WIDTH, WIDTH)  # 4 MiB
    plan = mfx.plan(nn.Sequential(*(Residual() for _ in range(8))), x, "1GiB")
    ways = ways_of(plan)
    assert {name: way.host for name, way in ways.items() if way.host} == {OFFLOADED: 7 * x.nbytes}
    note = "gamma=0, offload: 28.0 MiB of host memory for each device"
    assert str(plan).splitlines()[-1] == note
    assert note in plan._repr_html_()


def test_images_have_a_batch_only():
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *(Residual() for _ in range(4))
    )
    plan = mfx.plan(model, torch.zeros(4, 3, 4, 4), "1MiB")
    assert {way.sequence for way in plan.ways} == {None}
    assert "longest" not in str(plan)
    assert all(way.batch > 4 for way in plan.ways)


def test_on_the_meta_device_it_is_the_same():
    with torch.device("meta"):
        model, inputs = Gpt(depth=1), tokens()
    assert mfx.plan(model, inputs, "2MiB") == mfx.plan(Gpt(depth=1), tokens(), "2MiB")


# --- what parameters take -------------------------------------------------------------------------------------------


def test_parameters_gradients_and_optimizer():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False).bfloat16(), nn.BatchNorm1d(10))
    model[2].requires_grad_(False)
    buffers = 2 * 10 * 4 + 8
    state = training_state(model, optimizer=None, shards=1, blocks=())
    assert state.parameters == 100 * 4 + 100 * 2 + 2 * 10 * 4 + buffers
    assert state.gradients == 100 * 4 + 100 * 2
    assert state.optimizer == 100 * 8 + 100 * (8 + 4)
    assert state.gathered == 0
    assert training_state(model, optimizer=0.5, shards=1, blocks=()).optimizer == 100
    sharded = training_state(model, optimizer=None, shards=4, blocks=("0", "1"))
    assert sharded.parameters == (100 * 4 + 100 * 2 + 2 * 10 * 4) / 4 + buffers
    assert sharded.gradients == state.gradients / 4
    assert sharded.optimizer == state.optimizer / 4
    assert sharded.gathered == 2 * 2 * 10 * 4 + 2 * 2 * 100 * 4


def test_devices_that_share_have_room_for_more():
    model, x = nn.Sequential(*(Residual() for _ in range(4))), torch.zeros(8, WIDTH)
    alone, shared = (mfx.plan(model, x, "1MiB", world_size=8, fsdp=fsdp) for fsdp in (False, True))
    assert shared.state.total < alone.state.total
    assert ways_of(shared)[PLAIN].batch > ways_of(alone)[PLAIN].batch


def test_where_parameters_alone_take_too_much_nothing_fits():
    plan = mfx.plan(Gpt(depth=2), tokens(), "100KiB")
    assert {(way.batch, way.sequence) for way in plan.ways} == {(0, 0)}
    assert "too much" in str(plan)


# --- text, data, errors -----------------------------------------------------------------------------------------------


def test_it_is_text_data_and_a_picture(planned, tmp_path):
    pytest.importorskip("matplotlib")
    _, plan = planned
    lines = str(plan).splitlines()
    assert lines[0].startswith("Gpt on H100 of 10.0 MiB: ")
    lines = lines[lines.index("") + 1 :]
    assert " ".join(lines[0].split()) == "batch 2, sequence 64 kept peak in all time largest batch longest"
    assert len(lines) == 6
    assert json.loads(json.dumps(plan.to_dict()))["ways"][0]["name"] == "plain"
    assert "<table" in plan._repr_html_()
    assert str(plan).splitlines()[0] in plan._repr_html_()
    with pytest.raises(mfx.MfxError, match=r"Plan.plot saves .* files; call the file plan.png, not .*plan.txt"):
        plan.plot(tmp_path / "plan.txt")
    with pytest.raises(mfx.MfxError, match=r"Plan.plot: .*plan.png cannot be written: No such file"):
        plan.plot(tmp_path / "missing" / "plan.png")
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


class Looks(nn.Module):
    """Looks at a value, between two of its sums."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x) * float(x.abs().max())
        return x


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("a model", tokens()), {}, r"plan takes a torch.nn.Module, not a str"),
        ((mfx.momentumize(Stack(2)), torch.zeros(2, 8)), {}, r"takes the model itself, not a momentumized net: mfx.or"),
        ((Stack(2), torch.zeros(2, 8), 0.5), {}, r"memory=0.5: it is a number of bytes, such as '80GiB'"),
        ((Stack(2), torch.zeros(2, 8)), {"world_size": 0}, r"world_size=0: it is the number of devices, 1 or more"),
        ((Stack(2), torch.zeros(2, 8)), {"optimizer_bytes": -8}, r"optimizer_bytes=-8: it is a number of bytes per"),
        ((Stack(2), torch.zeros(2, 8)), {"sequence_dim": 2}, r"sequence_dim=2, where .* the shape \(2, 8\)"),
        ((Stack(2), torch.zeros(2, 8)), {"chip": "TPU"}, r"chip='TPU': it may be one of H200, H100"),
        ((Stack(2), {"x": 3}), {}, r"no input is a tensor whose first dimension is a batch"),
        ((Looks(), torch.zeros(2, 8)), {}, r"plan: a training step cannot be rehearsed: DataDependent"),
        ((Stack(2), torch.zeros(2, 9)), {}, r"plan: a training step cannot be rehearsed"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, options, message):
    with pytest.raises(mfx.MfxError, match=message):
        mfx.plan(*arguments, **options)
