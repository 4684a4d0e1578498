"""DistributedDataParallel around a net: gradients of one process, reduced while steps are still to be run again."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mfx
from tests.distributed.nets import (
    HOW,
    assert_same,
    batch,
    gradients,
    loss_of,
    make_model,
    momentum,
    single_loss,
)
from tests.mfx.models import Block

SETTINGS = {
    "plain": {},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "views of buckets": {"gradient_as_bucket_view": True},
}


def shared_model():
    """Two of its blocks are one."""
    model = make_model()
    model.blocks[2] = model.blocks[0]
    return model


BUILDS = {"own weights": make_model, "shared weights": shared_model}


def train(build, how, settings, steps=3):
    """Several optimiser steps with and without processes, from the same weights."""
    rank = torch.distributed.get_rank()
    single, net = momentum(build(), how), momentum(build(), how)
    parallel = DistributedDataParallel(net, **settings)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (single, net)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        single_loss(single, step).backward()
        loss_of(parallel, batch(rank, step)).backward()
        assert_same(gradients(net), gradients(single))
        for optimizer in optimizers:
            optimizer.step()
    assert_same(dict(net.state_dict()), dict(single.state_dict()))


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("how", HOW, ids=str)
def test_gradients_are_those_of_one_process(world, how, settings, build):
    world.run(train, build, how, settings)


def train_with_unused(how):
    net = momentum(make_model(), how)
    net.blocks[1].spare = nn.Linear(3, 3)  # in the model, in no branch
    parallel = DistributedDataParallel(net, find_unused_parameters=True)
    for _ in range(2):
        net.zero_grad()
        loss_of(parallel, batch(torch.distributed.get_rank())).backward()
    found = {name: grad for name, grad in gradients(net).items() if "spare" not in name}
    single = momentum(make_model(), how)
    single_loss(single).backward()
    assert_same(found, gradients(single))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_unused_parameters_are_found(world, how):
    world.run(train_with_unused, how)


def accumulate(how):
    rank = torch.distributed.get_rank()
    single, net = momentum(make_model(), how), momentum(make_model(), how)
    parallel = DistributedDataParallel(net)
    with parallel.no_sync():
        loss_of(parallel, batch(rank, 0)).backward()
    own = gradients(net)["head.weight"].clone()
    loss_of(parallel, batch(rank, 1)).backward()
    for step in range(2):
        single_loss(single, step).backward()
    assert_same(gradients(net), gradients(single))
    return own


@pytest.mark.parametrize("how", HOW, ids=str)
def test_accumulation_without_synchronisation(world, how):
    first, second = world.run(accumulate, how)
    assert not torch.equal(first, second)


def record_order(how):
    """ "reduce" when a bucket's all-reduce begins, and a step's path whenever that step is run a second time."""
    net = momentum(make_model(), how)
    parallel = DistributedDataParallel(net, bucket_cap_mb=1e-3)
    events = []

    def reduce(state, bucket):
        events.append("reduce")
        work = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    parallel.register_comm_hook(None, reduce)
    for index, block in enumerate(net.blocks):
        assert isinstance(block, Block)
        block.mix.register_forward_hook(lambda *_, i=index: events.append(i) if mfx.recomputing() else None)
    for _ in range(2):  # buckets are filled anew after the first step, in the order in which gradients came
        events.clear()
        loss_of(parallel, batch(torch.distributed.get_rank())).backward()
    return events


@pytest.mark.parametrize("how", HOW, ids=str)
def test_gradients_are_sent_before_the_first_step_is_run_again(world, how):
    for events in world.run(record_order, how):
        runs = [event for event in events if event != "reduce"]
        assert runs == [5, 4, 3, 2, 1, 0]
        assert events.index("reduce") < events.index(4)
        assert events[: events.index(0)].count("reduce") >= 5
