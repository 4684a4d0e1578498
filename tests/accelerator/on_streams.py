"""Streams: what is rebuilt in one is safe to read in another."""

import torch
from torch import Tensor, nn

from tests.accelerator import device as fake
from tests.accelerator.nets import WIDTH, batch, momentumized, stack, trained


class Asks(torch.autograd.Function):
    """The identity, whose node runs in a stream of its own: it asks there for what it saved."""

    stream = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 1

    @staticmethod
    def backward(ctx, g):
        with fake.backend.stream(fake.Stream(Asks.stream)):
            (x,) = ctx.saved_tensors
            return g + 0 * x


class Aside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(Asks.apply(self.inner(x)))


def test_a_stream_waits_for_what_another_one_rebuilt(monkeypatch):
    net = momentumized(stack(Aside))
    trained(net, batch())
    fake.forget()
    expected = trained(net, batch())
    assert not fake.backend.waits
    monkeypatch.setattr(Asks, "stream", 3)
    assert all(map(torch.equal, trained(net, batch()), expected))
    assert (3, 0) in fake.backend.waits
    assert {stream for stream, _ in fake.backend.recorded} == {3}  # its memory is not given away before that is done


def test_everything_is_rebuilt_in_the_stream_of_the_forward_pass(monkeypatch):
    streams = []

    class Tells(Aside):
        def __init__(self) -> None:
            super().__init__()
            self.inner.register_forward_hook(lambda *args: streams.append(fake.backend.current_stream().stream_id))

    monkeypatch.setattr(Asks, "stream", 3)
    net = momentumized(stack(Tells))
    trained(net, batch())
    assert set(streams) == {0}
    assert len(streams) > len(net)
