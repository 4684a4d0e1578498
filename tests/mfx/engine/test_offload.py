"""Host memory holds what chains keep: the same bits, and nothing left behind."""

import gc
import os
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mfx
from mfx.engine.offload import Offload, host_memory, offload
from mfx.engine.offload.host_memory import HOST_MEMORY, HostMemory
from mfx.engine.recompute.saved import SavedTensors
from tests.mfx.models import Block, Stack, inputs
from tests.sampling import grid

WAYS = {
    "gamma 0": {"gamma": 0.0},
    "exact": {"gamma": 0.9},
    "limbs": {"gamma": 1 / 64},
    "float with anchors": {"gamma": 0.5, "arithmetic": "float"},
    "half": {"gamma": 0.9, "memory_budget": 0.5},
    "all recomputed": {"gamma": 0.0, "recompute": "all"},
    "all kept": {"gamma": 0.9, "memory_budget": 1.0},
}


@pytest.fixture(autouse=True)
def _every_tensor(monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 1)
    yield
    gc.collect()
    assert HOST_MEMORY.used == 0


def stack():
    torch.manual_seed(0)
    return Stack(16, dropout=0.2)


def trained(net, *, retain=False):
    """Return a step's results, and the bytes that lay in host memory between forward and backward."""
    torch.manual_seed(1)
    net.zero_grad()
    x = inputs().requires_grad_()
    loss = net(x).square().sum()
    used = HOST_MEMORY.used
    if retain:
        loss.backward(retain_graph=True)
        net.zero_grad()
        x.grad = None
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)], used


@grid(len(WAYS), way=WAYS, retain=[False, True])
def test_the_bits_are_the_same(way, retain):
    model = stack()
    expected, none = trained(mfx.momentumize(model, **way))
    net = mfx.momentumize(model, offload="cpu", **way)
    for _ in range(2):
        found, used = trained(net, retain=retain)
        assert all(map(torch.equal, found, expected))
    assert none == 0
    assert bool(used) == (way.get("memory_budget") != 1.0)


class Ends(nn.Module):
    """A chain behind a stem of four layers, and with a head of four."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = (
            nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))) for _ in "sh"
        )
        self.blocks = Stack(4, dropout=0.2).blocks

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("retain", [False, True])
def test_what_lies_between_the_chains_leaves_too(retain):
    """Of the inputs of its pieces, all but the caller's own."""
    results, bytes_moved, live = [], [], []
    for options in ({}, {"offload": "cpu"}):
        net = mfx.momentumize(Ends(), gamma=0.0, recompute="all", verify="off", **options)
        results.append([])
        for _ in range(3):
            found, used = trained(net, retain=retain)
            results[-1] += found
        bytes_moved.append(used)
        torch.manual_seed(1)
        with mfx.ActivationMeter(exclude=net.parameters()) as meter:
            loss = net(inputs().requires_grad_()).square().sum()
            live.append(meter.live)
        del loss
    assert all(map(torch.equal, *results))
    alone = mfx.momentumize(Ends(), gamma=0.0, offload="cpu")
    trained(alone)
    assert bytes_moved[0] == 0
    assert bytes_moved[1] > trained(alone)[1]  # the chain's inputs
    assert live[1] <= live[0] - bytes_moved[1] + 1024  # notes


def test_at_gamma_0_memory_does_not_grow_with_depth():
    live = []
    for depth in (8, 16):
        net = mfx.momentumize(Stack(depth), gamma=0.0, offload="cpu", verify="off")
        net(inputs(64)).sum().backward()
        with mfx.ActivationMeter(exclude=net.parameters()) as meter:
            loss = net(inputs(64)).sum()
            live.append((meter.live, meter.peak, HOST_MEMORY.used))
            loss.backward()
        del loss
    (shallow, _, few), (deep, _, many) = live
    state = inputs(64).nbytes
    assert deep == shallow
    assert many - few == 16 * state  # of eight blocks of two steps


@pytest.mark.parametrize("way", [WAYS["gamma 0"], WAYS["exact"]])
def test_explain_says_what_is_left_and_where_the_rest_is(way):
    model = stack()
    plain = mfx.explain(mfx.momentumize(model, **way), inputs())
    explained = mfx.explain(mfx.momentumize(model, offload="cpu", **way), inputs())
    assert explained.estimate.momentum.kept < plain.estimate.momentum.kept
    # With states the peak is where the backward pass has begun, and has fetched them.
    assert explained.estimate.momentum.peak <= plain.estimate.momentum.peak - (way["gamma"] == 0)
    assert "in host memory" in explained.chains[0].storage.reason
    assert "host memory" not in plain.chains[0].storage.reason
    assert HOST_MEMORY.used == 0  # a rehearsal takes none


def test_one_group_is_fetched_ahead_and_each_tensor_once(monkeypatch):
    fetched, ahead = [], []
    back = offload._Moved._copied
    fetch = offload._Moved.fetch
    monkeypatch.setattr(offload._Moved, "_copied", lambda self: fetched.append(self.group) or back(self))
    monkeypatch.setattr(offload._Moved, "fetch", lambda self: ahead.append(self.group) or fetch(self))
    trained(mfx.momentumize(stack(), gamma=0.0, offload="cpu"))
    assert len(fetched) == len(set(fetched)) == 31  # the first step's input is the caller's
    assert fetched == sorted(fetched, reverse=True)
    assert ahead == fetched[1:]


def test_second_derivatives():
    model = nn.Sequential(*(Block() for _ in range(8))).double()
    x = inputs(dtype=torch.float64)

    def second(net):
        y = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(net(y).square().sum(), y, create_graph=True)
        return torch.autograd.grad(first.square().sum(), y)[0]

    for gamma in (0.0, 0.9):
        plain, moved = (second(mfx.momentumize(model, gamma=gamma, offload=where)) for where in (None, "cpu"))
        assert torch.equal(plain, moved)


def test_what_the_caller_holds_stays(monkeypatch):
    moved = []
    monkeypatch.setattr(offload.Transfers, "out", lambda self, t: moved.append(t) or t.clone())
    model = nn.Sequential(*(Block() for _ in range(2)))
    x = inputs().requires_grad_()
    mfx.momentumize(model, gamma=0.0, offload="cpu")(x)
    assert len(moved) == 3
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in moved}
    moved.clear()
    monkeypatch.setattr(offload, "LEAST", x.nbytes + 1)
    mfx.momentumize(model, gamma=0.0, offload="cpu")(x)
    assert moved == []


def test_what_is_saved_for_others_is_theirs():
    model = stack()
    for gamma in (0.0, 0.9):
        plain = mfx.momentumize(model, gamma=gamma)
        moved = mfx.momentumize(model, gamma=gamma, offload="cpu")
        results = []
        for net in (plain, moved):
            torch.manual_seed(1)
            x = inputs().requires_grad_()
            loss = checkpoint(net, x, use_reentrant=False).sum()
            assert HOST_MEMORY.used == 0
            loss.backward()
            results.append(x.grad)
        assert torch.equal(*results)


def test_an_error_in_the_forward_pass_leaves_nothing():
    model = stack()
    net = mfx.momentumize(model, gamma=0.0, offload="cpu")
    expected, _ = trained(net)

    def fail(*_):
        raise ValueError("fails")

    handle = net.blocks[9].mlp.register_forward_hook(fail)
    with pytest.raises(ValueError, match="fails"):
        net(inputs())
    handle.remove()
    gc.collect()
    assert HOST_MEMORY.used == 0
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert all(map(torch.equal, trained(net)[0], expected))


def test_a_state_changed_in_place_afterwards_is_as_it_was_or_an_error():
    """A copy in host memory is as it was; what stays is looked at, for hooks take the check from autograd."""
    net = mfx.momentumize(nn.Sequential(*(Block() for _ in range(4))), gamma=0.0, offload="cpu")
    x = inputs().requires_grad_()
    start = x * 1
    loss = net(start).sum()
    with torch.no_grad():
        start.mul_(2)
    with pytest.raises(mfx.MfxError, match="modified in place"):
        loss.backward()


class Writes(nn.Module):
    """Writes into its input, which no graph shows."""

    def __init__(self, only=()):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.only = only

    def forward(self, x):
        x = x * 1
        for number, linear in enumerate(self.linear):
            x = x + linear(halved(x) if number in self.only else x)
        return x


@torch.fx.wrap
def halved(x):
    x.mul_(0.5)
    return x * 1


@pytest.mark.parametrize("writers", [(2,), (4,), (0, 1, 2, 3, 4)])
def test_a_branch_that_writes_into_its_input_is_the_same_error(writers):
    messages = []
    for where in (None, "cpu"):
        net = mfx.momentumize(Writes(writers), gamma=0.0, offload=where, capture="symbolic")
        loss = net(inputs()).sum()
        with pytest.raises(mfx.MfxError, match="modified in place") as error:
            loss.backward()
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_views_of_all_of_a_storage_are_tensors_of_their_own():
    x = torch.arange(12.0).view(3, 4)
    views = [x, x.t(), x.view(-1), x.view(torch.int32), x.clone(), x]
    with Offload("chain", x.device, ()) as moves:
        kept = SavedTensors(views, "views", moves)
    assert HOST_MEMORY.used == 5 * x.nbytes  # the last is the first
    for found, expected in zip(kept.get(), views, strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()
        assert found.dtype is expected.dtype


class Owner:
    """Ends when the collector finds it."""

    def __init__(self):
        self.itself = self


def test_a_collection_while_memory_is_counted_does_not_wait_for_itself(monkeypatch):
    """The collector may run at any allocation; here it does where the message is made, and under the lock."""
    monkeypatch.setenv("MFX_HOST_MEMORY", "200")
    memory = HostMemory()
    memory.take(Owner(), 100, "the first")
    size = host_memory.size
    monkeypatch.setattr(host_memory, "size", lambda number: gc.collect() * 0 or size(number))

    def take():
        with memory._lock:
            gc.collect()
        memory.take(owner, 200, "the second")
        with pytest.raises(mfx.MfxError, match="another 1 B"):
            memory.take(owner, 1, "the third")

    owner = Owner()
    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert memory.used == 200


def test_the_limit_is_that_of_the_container_and_shared_by_the_machines_processes(monkeypatch, tmp_path):
    monkeypatch.delenv("MFX_HOST_MEMORY", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    group = tmp_path / "memory.max"
    monkeypatch.setattr(host_memory, "_CONTROL_GROUP", group)
    machine = host_memory._limit()
    assert machine == int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for text, expected in (("max", machine), ("1000", 800), (str(10**18), machine)):
        group.write_text(f"{text}\n")
        assert host_memory._limit() == expected
    group.write_text("1000\n")
    for processes, expected in (("4", 200), ("", 800), ("0", 800), ("many", 800)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert host_memory._limit() == expected
    monkeypatch.setenv("MFX_HOST_MEMORY", "500")
    assert host_memory._limit() == 500  # what is asked for is per process


def test_threads():
    model = stack()
    net = mfx.momentumize(model, gamma=0.0, offload="cpu")
    model.eval()
    net.eval()

    def gradient():
        x = inputs().requires_grad_()
        return torch.autograd.grad(net(x).square().sum(), x)[0]

    expected, found = gradient(), []
    threads = [threading.Thread(target=lambda: found.extend(gradient() for _ in range(3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9
    assert all(torch.equal(one, expected) for one in found)


def test_too_little_host_memory_is_an_error(monkeypatch):
    net = mfx.momentumize(stack(), gamma=0.0, offload="cpu")
    monkeypatch.setenv("MFX_HOST_MEMORY", "1000")
    with pytest.raises(mfx.MfxError, match=r"another 64 B of host memory, where 960 B of 1000 B are in use.*Set MFX_"):
        net(inputs())
    monkeypatch.setenv("MFX_HOST_MEMORY", "much")
    with pytest.raises(mfx.MfxError, match=r"MFX_HOST_MEMORY is 'much'; it is a number of bytes"):
        net(inputs())
    monkeypatch.delenv("MFX_HOST_MEMORY")

    def out(self, tensor):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(offload.Transfers, "out", out)
    with pytest.raises(mfx.MfxError, match=r"finds no host memory for it .*can't allocate"):
        net(inputs())


def test_other_doors():
    torch.manual_seed(0)
    functions = [nn.Linear(8, 8) for _ in range(12)]
    toy = mfx.MomentumNet(functions, use_backprop=False, offload="cpu")
    loss = toy(inputs()).sum()
    assert HOST_MEMORY.used > 0
    loss.backward()
    compiled = torch.compile(stack(), backend="mfx", options={"gamma": 0.0, "inner": "eager", "offload": "cpu"})
    loss = compiled(inputs()).sum()
    assert HOST_MEMORY.used > 0
    loss.backward()
    del loss
    with pytest.raises(mfx.MfxError, match=r"offload='disk': must be None .* or 'cpu'"):
        mfx.momentumize(stack(), offload="disk")
