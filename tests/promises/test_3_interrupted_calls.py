"""At γ = 0 a call that an exception ends leaves what the model leaves; an interrupt from outside ends it at once."""

import signal

import pytest
import torch
from torch import nn

import mfx
from tests.sampling import grid


class Stopped(BaseException):
    """No Exception, as KeyboardInterrupt is none."""


ERRORS = {error.__name__: error for error in (ValueError, Stopped, KeyboardInterrupt)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.drop, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += 1
        return x + self.drop(self.norm(self.mix(x)))


class Blocks(nn.Module):
    """Raises an error of its own in front of its last block, if it has one."""

    error: type[BaseException] | None = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            if number == 2 and self.error is not None:
                raise self.error("in the middle")
            x = block(x)
        return x


def in_hook(model, error):
    def fail(module, args):
        raise error("in the middle")

    return model.blocks[2].mix.register_forward_pre_hook(fail).remove


def in_forward(model, error):
    model.error = error
    return lambda: setattr(model, "error", None)


PLACES = {"in a hook": in_hook, "in the forward": in_forward}


def left_by(model, error, place, *, first):
    """Return what a call leaves that an error ends, and what the next one gives."""
    x = torch.linspace(-1, 1, 20).reshape(5, 4)
    if not first:
        model(x)
    undo = place(model, error)
    torch.manual_seed(1)
    with pytest.raises(error, match="in the middle"):
        model(x)
    after = [torch.rand(1), *(buffer.clone() for buffer in model.buffers())]
    calls = [block.calls for block in model.blocks]
    undo()
    return calls, [*after, model(x), *model.buffers()]


@pytest.mark.filterwarnings("ignore:.*cannot be captured as one graph")
@grid(8, capture=["auto", "dynamo"], error=ERRORS, place=PLACES, first=[True, False])
def test_an_error_in_the_middle_of_a_call_leaves_what_it_leaves_in_the_model(capture, error, place, first):
    net = mfx.momentumize(Blocks(), gamma=0.0, capture=capture)
    calls, tensors = left_by(net, error, place, first=first)
    expected_calls, expected = left_by(Blocks(), error, place, first=first)
    assert calls == expected_calls
    assert all(map(torch.equal, tensors, expected))


def timed_out(number, frame):
    raise TimeoutError("from outside")


@pytest.mark.parametrize(
    ("number", "handler", "error"),
    [(signal.SIGALRM, timed_out, TimeoutError), (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt)],
)
def test_a_signal_ends_a_call_that_is_being_captured(number, handler, error):
    class Signalled(Blocks):
        def forward(self, x):
            signal.raise_signal(number)
            x = super().forward(x)
            raise AssertionError("a call that a signal has ended goes on")

    before = signal.signal(number, signal.SIG_IGN)
    try:
        net = mfx.momentumize(Signalled(), gamma=0.0)
        signal.signal(number, handler)
        with pytest.raises(error) as raised:
            net(torch.ones(5, 4))
    finally:
        signal.signal(number, before)
    assert any(entry.name == "_traced" for entry in raised.traceback), "it was raised by the trace, not by the call"


class StoppedError(Exception):
    """An error of a user's own hook."""


@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_error_of_a_hook_is_raised_where_dynamo_cannot_follow_it(gamma, is_first):
    def stop(module, args):
        raise StoppedError("here")

    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)) for _ in range(3)]
    net = mfx.momentumize(Stepping(branches), gamma=gamma, capture="dynamo")
    x = torch.ones(2, 4)
    if not is_first:
        net(x)
    state = torch.get_rng_state()
    handle = net.branches[0][0].register_forward_pre_hook(stop)
    with pytest.raises(StoppedError, match="here"):
        net(x)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert [branch[2].num_batches_tracked.item() for branch in net.branches] == [not is_first] * 3
    net(x).sum().backward()
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]


class Stepping(nn.Module):
    """Steps x + f(x)."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x
