"""The meter against byte counts worked out by hand. Every tensor is a multiple of one unit: 256 float32, 1 KiB."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from mfx import ActivationMeter

UNIT = 1024


def unit(requires_grad=False):
    return torch.ones(256, requires_grad=requires_grad)


def tanh_chain(x, n):
    for _ in range(n):
        x = x.tanh()
    return x


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_tanh_chain_keeps_exactly_its_outputs(n):
    x = unit(requires_grad=True)
    with ActivationMeter() as meter:
        y = tanh_chain(x, n)
    assert meter.live == meter.peak == n * UNIT
    assert y.shape == x.shape


def test_without_autograd_only_two_neighbours_are_ever_alive():
    x = unit()
    with ActivationMeter() as meter:
        y = tanh_chain(x, 7)
    assert (meter.live, meter.peak) == (UNIT, 2 * UNIT)
    del y
    assert meter.live == 0


def test_exp_keeps_its_output_and_add_keeps_nothing():
    x = unit(requires_grad=True)
    with ActivationMeter() as meter:
        y = x.exp()  # kept: exp saves it
        z = y + 1  # kept: the output
        z = z + 1  # the former z is freed once this one exists
    assert (meter.live, meter.peak) == (2 * UNIT, 3 * UNIT)
    assert z.requires_grad


def test_backward_frees_what_the_forward_kept_and_is_seen_itself():
    n = 5
    x = unit(requires_grad=True)
    seed = unit()
    with ActivationMeter(exclude=[x]) as meter:
        tanh_chain(x, n).backward(seed)
    assert meter.live == 0
    # Worst at the last tanh but one: the n outputs (the caller's frame still holds the last) and the gradients on both
    # sides of it. The seed was there before.
    assert meter.peak == (n + 2) * UNIT


@pytest.mark.parametrize(("count_grads", "kept"), [(False, 0), (True, (3 * 256 + 3) * 4)])
def test_gradients_of_the_excluded_count_on_request(count_grads, kept):
    layer = nn.Linear(256, 3)
    with ActivationMeter(exclude=layer.parameters(), count_grads=count_grads) as meter:
        layer(torch.ones(2, 256)).sum().backward()
        layer(torch.ones(2, 256)).sum().backward()  # accumulates into what is there
    assert meter.live == kept
    forward = 2 * UNIT + 2 * 3 * 4 + 4  # the input, the output, its sum
    assert meter.peak > kept + 2 * UNIT if count_grads else meter.peak == forward
    assert meter.peak_with_grads > 2 * UNIT + (3 * 256 + 3) * 4


def test_gradients_that_were_there_before_do_not_count():
    layer = nn.Linear(256, 3)
    x = torch.ones(2, 256)
    layer(x).sum().backward()
    with ActivationMeter(exclude=layer.parameters()) as meter:
        layer(x).sum().backward()
    assert meter.live == 0


def test_what_was_there_before_does_not_count_through_views_or_in_place():
    x = unit()
    with ActivationMeter() as meter:
        views = x.view(16, 16), x[3:], x.detach(), x.t(), x.expand(4, 256)
        x.add_(1)
        x[:5].zero_()
    assert meter.peak == 0
    assert len(views) == 5


def test_a_storage_counts_once_and_until_its_last_view_has_gone():
    with ActivationMeter() as meter:
        y = torch.zeros(256)
        views = [y[i:] for i in range(10)]
        assert meter.live == UNIT
        del y
        assert meter.live == UNIT
        del views
        assert meter.live == 0


def test_tensors_built_from_python_numbers_count():
    with ActivationMeter() as meter:
        y = torch.tensor([0.0] * 256)
        assert meter.live == UNIT
    assert y.sum() == 0


def test_every_result_of_an_operation_counts():
    with ActivationMeter() as meter:
        values, indices = unit().max(0, keepdim=True)
    assert meter.live == 4 + 8
    assert values.dtype != indices.dtype


def test_a_storage_that_grows_counts_with_its_new_size():
    with ActivationMeter() as meter:
        y = torch.empty(0)
        y.resize_(256)
        assert meter.live == UNIT
        y.resize_(512)
        assert meter.live == 2 * UNIT


def test_a_tensor_the_saved_tensor_hooks_drop_is_not_alive():
    x = unit(requires_grad=True)
    with ActivationMeter() as meter, torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda _: unit()):
        y = tanh_chain(x, 9)
        assert meter.live == UNIT
    assert y.requires_grad


def test_timeline_has_one_entry_per_operation():
    x = unit()
    with ActivationMeter(timeline=True) as meter:
        y = x + 1
        y = y + 1
        del y
        x.add_(1)
    assert list(meter.timeline) == [UNIT, 2 * UNIT, 0]
    assert max(meter.timeline) == meter.peak


def test_timeline_is_empty_unless_asked_for():
    with ActivationMeter() as meter:
        unit()
    assert list(meter.timeline) == []


def test_nothing_is_counted_after_the_block_but_deaths_are():
    with ActivationMeter() as meter:
        y = unit()
    z = unit()
    assert meter.live == UNIT
    del y
    assert meter.live == 0
    assert z.numel() == 256


def test_the_meter_keeps_nothing_alive():
    x = unit(requires_grad=True)
    gone = weakref.ref(x)
    gc.disable()
    try:
        with ActivationMeter() as meter:
            y = tanh_chain(x, 3)
            del x, y
            assert gone() is None
            assert meter.live == 0
    finally:
        gc.enable()


def test_the_hooks_on_the_parameters_go_with_the_block():
    layer = nn.Linear(2, 2)
    with ActivationMeter(exclude=layer.parameters()):
        pass
    assert not any(p._post_accumulate_grad_hooks for p in layer.parameters())


def test_results_are_untouched():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with ActivationMeter(exclude=layer.parameters()):
        layer(x).square().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(layer.parameters(), expected, strict=True))


def test_the_meter_can_tell_two_implementations_apart():
    """A check that measured nothing would pass every test on a reversible network; this pair must differ."""
    x = unit(requires_grad=True)

    def peak(f):
        with ActivationMeter(exclude=[x]) as meter:
            f().sum().backward()
        return meter.peak

    def checkpointed():
        return torch.utils.checkpoint.checkpoint(tanh_chain, x, 20, use_reentrant=False)

    assert peak(lambda: tanh_chain(x, 40)) > 1.8 * peak(checkpointed)


def test_a_device_that_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="measures on CPU and CUDA devices, not on meta"):
        ActivationMeter(device="meta")


class Allocator:
    """Stands in for torch.cuda's memory statistics."""

    def __init__(self, monkeypatch):
        self.now = self.top = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.top)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "top", self.now))

    def __iadd__(self, size):
        self.now += size
        self.top = max(self.top, self.now)
        return self


def test_allocator_statistics_are_taken_relative_and_without_gradients(monkeypatch):
    allocator = Allocator(monkeypatch)
    allocator += 10_000  # parameters and the rest of the world
    p = nn.Parameter(torch.zeros(256))
    with ActivationMeter(exclude=[p], device="cuda") as meter:
        allocator += 4 * UNIT
        allocator += -3 * UNIT
        assert (meter.live, meter.peak) == (UNIT, 4 * UNIT)
        allocator += UNIT  # the gradient: alive until it is accumulated
        p.sum().backward()
        assert meter.live == UNIT
        allocator += 2 * UNIT
        assert (meter.live, meter.peak) == (3 * UNIT, 4 * UNIT)
        allocator += 2 * UNIT
        assert (meter.live, meter.peak) == (5 * UNIT, 5 * UNIT)
    allocator += 7 * UNIT
    assert meter.peak == 5 * UNIT


def test_a_timeline_of_the_allocator_has_one_entry_per_operation(monkeypatch):
    allocator = Allocator(monkeypatch)
    x = torch.zeros(256)
    with ActivationMeter(device="cuda", timeline=True) as meter:
        for size in (4 * UNIT, -3 * UNIT):
            allocator += size
            x.add_(1)
    assert list(meter.timeline) == [4 * UNIT, UNIT]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [1, 7])
def test_a_tanh_chain_on_cuda(n):
    x = torch.ones(256, device="cuda", requires_grad=True)
    x.tanh().sum().backward()  # whatever torch allocates once
    with ActivationMeter(exclude=[x]) as meter:
        y = tanh_chain(x, n)
        assert meter.live == meter.peak == n * UNIT
        y.backward(torch.ones_like(y))
    assert meter.live == UNIT  # y


def test_tensors_without_data_take_nothing():
    with ActivationMeter() as meter:
        kept = torch.empty(256, device="meta")
        with FakeTensorMode():
            fake = torch.empty(256).tanh()
        real = torch.empty(256)
    assert meter.live == real.nbytes
    del kept, fake
    assert meter.live == real.nbytes
