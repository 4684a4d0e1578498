"""Memory that does not grow with depth, at 4/3 of the FLOPs; or anything between that and ordinary backpropagation."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import efficientnet_b0, mobilenet_v2, resnet50

import mfx
from mfx.net.forward import forward_of
from tests.sampling import grid

WIDTH, BATCH = 32, 64
UNIT = 4 * WIDTH * BATCH  # bytes of the stream in float32


class Block(nn.Module):
    """x + f(x), of which backpropagation keeps ten units: f is four times as wide inside."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        return x + self.f(x)


def net_of(depth, **options):
    torch.manual_seed(0)
    return mfx.momentumize(nn.Sequential(*(Block() for _ in range(depth))), **options)


def step(net):
    """Bytes of activations after the forward pass and at worst, and FLOPs, of a training step after the first two."""
    x = torch.randn(BATCH, WIDTH)
    for parameter in net.parameters():  # a parameter's gradient is not an activation
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for _ in range(2):  # a first call watches what a step costs, a budget's plan holds from the second on
        net(x).sum().backward()
    with mfx.ActivationMeter(exclude=[x, *net.parameters()]) as meter:
        y = net(x)
        kept = meter.live
        y.sum().backward()
    with FlopCounterMode(display=False) as flops:
        net(x).sum().backward()
    return kept, meter.peak, flops.get_total_flops()


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_neither_what_is_kept_nor_the_peak_grows_with_depth(arithmetic):
    (kept, peak, _), (kept_deep, peak_deep, _) = (step(net_of(depth, arithmetic=arithmetic)) for depth in (16, 64))
    # 48 more steps: exact stores log2(1/0.9) = 0.15 bits per element and step, in words of 64 bits; float an anchor of
    # two states every 25 steps. A kept input each would be 48 units. Beside it, notes of a few hundred bytes a step.
    more = {"exact": 2 * UNIT, "float": 2 * 2 * UNIT}[arithmetic] + 48 * 512
    assert kept_deep - kept <= more
    assert peak_deep - peak <= more


def test_it_costs_a_second_forward_pass():
    plain, net = step(net_of(16, memory_budget=1.0)), step(net_of(16))
    assert net[2] * 3 == plain[2] * 4


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_budget_is_kept_and_what_it_allows_saves_work(gamma):
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    found = [step(net_of(16, gamma=gamma, memory_budget=share)) for share in shares]
    least, most = found[0][0], found[-1][0]
    assert most > 4 * least
    for share, (kept, _, _) in zip(shares, found, strict=True):
        assert kept <= least + share * (most - least)
    work = [flops for _, _, flops in found]
    assert work == sorted(work, reverse=True)
    assert work[0] > work[2] > work[-1]


class Counted(TorchDispatchMode):
    """Counts the operations that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class UpAndDown(nn.Module):
    """Residual blocks of convolutions at three sizes, down and up again, with added skips: as in SegResNet."""

    def __init__(self, width=8, depth=3):
        super().__init__()
        self.into = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleList(map(ConvBlock, [width << i] * depth)) for i in range(3))
        self.down = nn.ModuleList(nn.Conv2d(width << i, width << (i + 1), 3, 2, 1) for i in range(2))
        self.up = nn.ModuleList(nn.Conv2d(width << (i + 1), width << i, 1) for i in range(2))

    def forward(self, x, level=0):
        x = self.into(x) if level == 0 else x
        for block in self.blocks[level]:
            x = block(x)
        if level == 2:
            return x
        inner = self.up[level](self.forward(self.down[level](x), level + 1))
        return x + nn.functional.interpolate(inner, scale_factor=2.0)


class ConvBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f = nn.Sequential(nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.f(x)


KEEPING = {
    "resnet50": lambda: resnet50(num_classes=10),
    "efficientnet": lambda: efficientnet_b0(num_classes=10),
    "mobilenet": lambda: mobilenet_v2(num_classes=10),
    "segresnet": UpAndDown,
}


@pytest.mark.parametrize("make", KEEPING.values(), ids=KEEPING)
def test_chains_that_keep_their_inputs_take_at_gamma_what_they_take_at_zero(make):
    """Beside one velocity of the widest chain; of chains that lie in each other, one of each is there at a time."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(2, 3, 64, 64)
    peaks, counts = [], []
    for gamma in (0.0, 0.9):
        net = mfx.momentumize(copy.deepcopy(model), gamma=gamma)
        net(x).square().sum().backward()  # what happens once only
        net.zero_grad()
        with mfx.ActivationMeter(exclude=[x, *net.parameters()]) as meter:
            net(x).square().sum().backward()
        peaks.append(meter.peak)
        net.zero_grad()
        with Counted() as counted:
            net(x).square().sum().backward()
        counts.append(counted.count)
    calls = next(iter(forward_of(net).table.graphs)).calls.values()
    assert len(calls) >= 3
    all_at_a_time = sum if make is UpAndDown else max
    velocity = all_at_a_time(call.streams[0].elements for call in calls) * 4
    assert peaks[1] <= peaks[0] + velocity
    # Three operations forward instead of one; backward three for the update, and one more gradient to add.
    steps = sum(len(call.graphs.steps) for call in calls)
    assert counts[1] <= counts[0] + 8 * steps


WAYS = {
    "gamma 0": {"gamma": 0.0},
    "exact": {"gamma": 0.9},
    "float": {"gamma": 0.9, "arithmetic": "float"},
    "random signs": {"gamma": mfx.BDIA(0.25)},
    "inputs kept": {"gamma": 0.9, "only": [["0", "1", "2"]]},
    "half kept": {"gamma": 0.9, "memory_budget": 0.5},
    "all kept": {"gamma": 0.9, "memory_budget": 1.0},
    "all recomputed": {"gamma": 0.0, "recompute": "all"},
    "unverified": {"gamma": 0.0, "verify": "off"},
}


class Failing(nn.Module):
    """The identity, that fails on demand: on the way there or on the way back. No graph is guarded by such bytes."""

    def __init__(self):
        super().__init__()
        self.where = {"forward": bytearray(1), "backward": bytearray(1)}

    def forward(self, x):
        if self.where["forward"][0]:
            raise ArithmeticError("fails")
        if self.where["backward"][0] and x.requires_grad:
            x.register_hook(self.fail)
        return x

    @staticmethod
    def fail(grad):
        raise ArithmeticError("fails")


class Nested(nn.Module):
    """x + g(x), where g holds a chain of steps itself."""

    def __init__(self, *inner):
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(WIDTH, WIDTH), nn.Sequential(*inner), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(self.inner(self.into(x).tanh()))


@grid(
    len(WAYS),
    way=WAYS,
    first={"later": False, "first call": True},
    nested={"flat": False, "nested": True},
    where=["forward", "backward"],
)
def test_an_error_leaves_nothing_alive(way, first, nested, where):
    blocks = [Block() for _ in range(6)]
    for block in blocks:
        block.f.append(nn.Dropout(0.3))
    blocks[3].f.insert(2, Failing())
    model = nn.Sequential(*(Nested(*blocks[i : i + 3]) for i in (0, 3)), Nested()) if nested else nn.Sequential(*blocks)
    net = mfx.momentumize(model, **way)
    failing = next(module for module in net.modules() if isinstance(module, Failing))
    x = torch.randn(BATCH, WIDTH)
    if not first:
        net(x).sum().backward()
        net.zero_grad()
    failing.where[where][0] = 1
    with mfx.ActivationMeter(exclude=[x, *net.parameters()]) as meter:
        with pytest.raises(ArithmeticError, match="fails"):
            net(x).sum().backward()
        gc.collect()
        assert meter.peak > UNIT
        assert meter.live == 0
