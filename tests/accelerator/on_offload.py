"""Host memory beside a device: copies in a stream of their own, without waiting."""

import pytest
import torch
from torch import nn

import mfx
from mfx.engine.offload import Offload, offload
from mfx.engine.offload.host_memory import HOST_MEMORY
from mfx.engine.recompute.saved import SavedTensors
from tests.accelerator import device as fake
from tests.accelerator.nets import Block, batch, momentumized, stack, trained

PLACES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


@pytest.fixture(autouse=True)
def _every_tensor(monkeypatch):
    monkeypatch.setattr(offload, "LEAST", 1)
    # The fake device's storages have no bytes, by which offloading knows a part of a tensor.
    monkeypatch.setattr(
        offload, "_is_dense", lambda tensor: tensor._base is None and not isinstance(tensor, nn.Parameter)
    )


@pytest.mark.parametrize("arithmetic, gamma", PLACES)
def test_the_bits_are_the_same_and_nothing_is_waited_for(arithmetic, gamma):
    model = stack(lambda: Block(0.3))
    options = {"arithmetic": arithmetic, "gamma": gamma}
    expected = trained(momentumized(model, **options), batch())
    net = momentumized(model, offload="cpu", **options)
    trained(net, batch())
    x = fake.to_device(batch()).requires_grad_()
    fake.forget()
    loss = net(x).sum()
    assert HOST_MEMORY.used > 0
    loss.backward()
    assert fake.SYNCHRONISATIONS == []
    side = {waiting for waiting, _ in fake.backend.waits} - {0}
    assert len(side) == 1  # copies have one stream
    assert {(0, *side), (*side, 0)} <= set(fake.backend.waits)
    assert {stream for stream, _ in fake.backend.recorded} == side
    assert all(map(torch.equal, trained(net, batch()), expected))


def test_a_tensor_on_its_way_out_is_held_until_two_others_are(monkeypatch):
    held = []
    wait = offload.Transfers._wait
    monkeypatch.setattr(
        offload.Transfers, "_wait", lambda self, count: wait(self, count) or held.append(len(self._leaving))
    )
    net = momentumized(stack(), gamma=0.0, offload="cpu")
    net(fake.to_device(batch()))
    assert max(held) == 2
    assert held[-1] == 0


@pytest.mark.parametrize("others", [0, 1, 2, 3])
def test_a_tensor_that_is_written_into_while_it_leaves_is_an_error(others):
    """The computation waits for its copy when two others have left; what is written before may be in it."""
    start = fake.to_device(batch())
    x = start * 1
    with Offload("chain", x.device, ()) as moves:
        kept = SavedTensors([x], "x", moves)
        rest = [SavedTensors([start * 1], "another", moves) for _ in range(others)]
        x.mul_(2)
    if others < 2:
        with pytest.raises(mfx.MfxError, match="x was modified in place"):
            kept.get()
    else:
        rest.append(kept)
    assert all(torch.equal(fake.on_host(saved.get()[0]), batch()) for saved in rest)


def test_a_capture_is_refused():
    net = momentumized(stack(), gamma=0.0, offload="cpu")
    x = fake.to_device(batch())
    net(x)
    with fake.backend.capture(), pytest.raises(mfx.MfxError, match="offload='cpu' cannot be captured in a graph"):
        net(x)
