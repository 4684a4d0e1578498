"""Parameters and streams that are DTensors while they are used, as in tensor parallelism."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mfx
from tests.distributed.nets import HOW, assert_same, batch, gradients, loss_of, make_model, momentum
from tests.distributed.world import SIZE

# Partial sums of a row-wise layer are added across processes: another order of additions, then 12 steps of float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def split(model):
    mesh = init_device_mesh("cpu", (SIZE,))
    for block in model.blocks:
        parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


def train(when, how):
    single = momentum(make_model(), how)
    net = split(momentum(make_model(), how)) if when == "after" else momentum(split(make_model()), how)
    x = batch(0)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (single, net)]
    for _ in range(2):
        for each, optimizer in zip((single, net), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(each, x).backward()
        assert_same(gradients(net), gradients(single), **CLOSE)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_columns_and_rows(world, how, when):
    world.run(train, when, how)


def rebuild():
    """Whatever is split, keeping nothing gives the gradients of keeping all, bit for bit."""
    found, expected = (split(mfx.momentumize(make_model(), memory_budget=budget)) for budget in (0.0, 1.0))
    for net in (found, expected):
        loss_of(net, batch(0)).backward()
    expected = gradients(expected)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(found).items())


def test_rebuilt_gradients_are_those_of_ordinary_backpropagation(world):
    world.run(rebuild)


def run_on_a_split_stream(how, placement):
    """The stream itself is a DTensor."""
    mesh, nets = init_device_mesh("cpu", (SIZE,)), []
    for budget in (0.0, 1.0):
        net = mfx.momentumize(make_model(), arithmetic=how[0], gamma=how[1], memory_budget=budget)
        distribute_module(net, mesh)
        loss_of(net, distribute_tensor(batch(0), mesh, [placement])).backward()
        nets.append(net)
    found, expected = map(gradients, nets)
    if how[0] == "exact":
        assert all(torch.equal(grad, expected[name]) for name, grad in found.items())
    assert_same(found, expected)


@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_split_stream(world, how, placement):
    world.run(run_on_a_split_stream, how, placement)


def draw_signs(place):
    """Each process would draw signs of its own for a stream that all of them compute together."""
    net = mfx.momentumize(make_model(), gamma=mfx.BDIA(0.25))
    x, mesh = batch(0), init_device_mesh("cpu", (SIZE,))
    if place == "parameters":
        split(net)
    else:
        distribute_module(net, mesh)
        x = distribute_tensor(x, mesh, [Replicate()])
    with pytest.raises(mfx.MfxError, match="tensor parallelism"):
        net(x)
    net.eval()
    net(x)  # at gamma = 0


@pytest.mark.parametrize("place", ["parameters", "streams"])
def test_random_signs_are_refused(world, place):
    world.run(draw_signs, place)
