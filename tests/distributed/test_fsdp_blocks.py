"""fully_shard on blocks of several steps: parameters of one process, gathered and reduced as often as without mfx."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as param_group

import mfx
from tests.distributed.nets import DEPTH, HOW, assert_same, batch, gradients, loss_of, make_model, whole
from tests.distributed.world import SIZE
from tests.mfx.models import WIDTH, Stack
from tests.sampling import grid

PLAIN = ("plain", 0.0)


def build(how: tuple[str, float], model: nn.Module, **options: Any) -> nn.Module:
    arithmetic, gamma = how
    if how == PLAIN:
        return model
    return mfx.momentumize(model, arithmetic=arithmetic, gamma=gamma, **options)


def shard(model: nn.Module, *, root: bool = True, replicas: int | None = None, **settings: Any) -> nn.Module:
    """Shard a model's blocks: over all processes, or over the processes of each of so many replicas (HSDP)."""
    names = ("replicate", "shard")
    mesh = (
        init_device_mesh("cpu", (SIZE,))
        if replicas is None
        else init_device_mesh("cpu", (replicas, SIZE // replicas), mesh_dim_names=names)
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings) if root else model


@contextmanager
def collectives() -> Iterator[list[str]]:
    """List the collectives of blocks as they are called: "gather" and "reduce"."""
    gather, reduce = param_group.foreach_all_gather, param_group.foreach_reduce
    log: list[str] = []

    def noting(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Any, *args: Any, **kwargs: Any) -> Any:
            if "blocks" in (params[0]._param_fqn or ""):
                log.append(what)
            return function(params, *args, **kwargs)

        return call

    param_group.foreach_all_gather = noting("gather", gather)
    param_group.foreach_reduce = noting("reduce", reduce)
    try:
        yield log
    finally:
        param_group.foreach_all_gather, param_group.foreach_reduce = gather, reduce


def backward_of_all(net: nn.Module, step: int) -> None:
    """Compute what both processes do together, in one: the mean of the gradients that each has."""
    total: dict[str, Tensor] = {}
    for rank in range(SIZE):
        net.zero_grad()
        loss_of(net, batch(rank, step)).backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                total[name] = total[name] + p.grad / SIZE if name in total else p.grad / SIZE
    for name, p in net.named_parameters():
        p.grad = total.get(name)


def train(how, when, reshards, depth=DEPTH):
    """Three optimizer steps beside one process: bit for bit, and the collectives of the last one."""
    rank, single = torch.distributed.get_rank(), build(how, make_model(depth))
    if when == "before":
        net = build(how, shard(make_model(depth), reshard_after_forward=reshards))
    else:
        net = build(how, make_model(depth))
        if when == "after the first call":
            net(batch(0))
        shard(net, reshard_after_forward=reshards)
    optimizers = [torch.optim.SGD(each.parameters(), 0.05, momentum=0.9) for each in (single, net)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with collectives() as log:
            loss = loss_of(net, batch(rank, step))
            forward = len(log)
            loss.backward()
        backward_of_all(single, step)
        found, expected = gradients(net), gradients(single)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(whole(value), single.state_dict()[name]) for name, value in net.state_dict().items())
    return log[:forward].count("gather"), log[forward:].count("gather"), log.count("reduce")


@grid(8, how=[PLAIN, *HOW], when=["before", "after", "after the first call"], reshards=[True, False])
def test_a_block_is_gathered_once_in_each_direction(world, how, when, reshards):
    """As often as without mfx, that is: PLAIN is one of the cases."""
    for counts in world.run(train, how, when, reshards):
        assert counts == (DEPTH, DEPTH if reshards else 0, DEPTH)


def train_sharded_so(how, settings):
    """Two optimizer steps beside one process, bit for bit; and the number of collectives of the last one."""
    rank, single, net = torch.distributed.get_rank(), build(how, make_model()), build(how, make_model())
    shard(net, **settings)
    optimizers = [torch.optim.SGD(each.parameters(), 0.05, momentum=0.9) for each in (single, net)]
    for step in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with collectives() as log:
            loss_of(net, batch(rank, step)).backward()
        backward_of_all(single, step)
        found = gradients(net)
        assert all(torch.equal(found[name], grad) for name, grad in gradients(single).items())
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(whole(value), single.state_dict()[name]) for name, value in net.state_dict().items())
    return log.count("gather"), log.count("reduce")


SETTINGS = {
    "replicas of shards": {"replicas": 1},
    "replicas of wholes": {"replicas": SIZE},
    "parameters in host memory": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


@grid(6, how=[PLAIN, *HOW], settings=list(SETTINGS))
def test_replicas_and_parameters_in_host_memory(world, how, settings):
    for counts in world.run(train_sharded_so, how, SETTINGS[settings]):
        gathers = 0 if settings == "replicas of wholes" else 2 * DEPTH
        assert counts == (gathers, DEPTH)


def freeze(net: nn.Module, *blocks: int, stem: bool = False) -> None:
    for number in blocks:
        net.blocks[number].requires_grad_(False)
    if stem:
        net.embed.requires_grad_(False)


def frozen(how, blocks, stem):
    rank, single, net = torch.distributed.get_rank(), build(how, make_model()), build(how, make_model())
    for each in (single, net):
        freeze(each, *blocks, stem=stem)
    loss_of(shard(net), batch(rank)).backward()
    backward_of_all(single, 0)
    found, expected = gradients(net), gradients(single)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


@grid(4, how=HOW, blocks=[(1,), (0, 1), (DEPTH - 1,)], stem=[False, True])
def test_frozen_blocks(world, how, blocks, stem):
    """Inputs may need no gradient; and a walk back may pass a block that asks for none."""
    world.run(frozen, how, blocks, stem)


def accumulated(how):
    rank, single, net = torch.distributed.get_rank(), build(how, make_model()), shard(build(how, make_model()))
    with collectives() as log:
        for step in range(3):
            net.set_requires_gradient_sync(step == 2)
            loss_of(net, batch(rank, step)).backward()
    total: dict[str, Tensor] = {}
    for r in range(SIZE):
        single.zero_grad()
        for step in range(3):
            loss_of(single, batch(r, step)).backward()
        for name, p in single.named_parameters():
            total[name] = total.get(name, 0) + p.grad / SIZE
    found = gradients(net)
    assert all(torch.equal(found[name], grad) for name, grad in total.items())
    return log.count("reduce")


@pytest.mark.parametrize("how", HOW, ids=str)
def test_gradients_accumulate_without_being_reduced(world, how):
    assert world.run(accumulated, how) == [DEPTH] * SIZE


def in_bfloat16(how, stream):
    """The same function and the same gradients whatever is kept; at gamma = 0 those of the model without mfx."""
    rank, results = torch.distributed.get_rank(), []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ways = [build(how, make_model()), build(how, make_model(), memory_budget=1.0)]
    for net in (*ways, *([make_model()] if how[1] == 0 else [])):
        shard(net, root=stream == "bfloat16", mp_policy=policy)
        x = batch(rank).to(getattr(torch, stream))
        if stream == "float32" and how[1] == 0:  # the head, which is not sharded, gets what the last block returns
            with pytest.raises(RuntimeError, match="BFloat16 and Float"):
                net(x)
            continue
        loss = loss_of(net, x)
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(net)})
    if not results:
        return
    first, *others = results
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    assert all(len(other) == len(first) > DEPTH for other in others)


@grid(4, how=[way for way in HOW if way[0] == "exact"], stream=["bfloat16", "float32"])
def test_mixed_precision(world, how, stream):
    world.run(in_bfloat16, how, stream)


class Tapped(Stack):
    """Gives the state after its second block, too."""

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                tap = x * 1.0
        return self.head(x), tap


class Decoder(nn.Module):
    """Blocks that read a memory beside the stream, from which gradients go back to what made it."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.memory = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(CrossBlock() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        memory = self.memory(x).tanh()
        for block in self.blocks:
            x = block(x, memory)
        return x


class CrossBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.key, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.own(x).tanh()
        x += self.out(self.key(memory).tanh() * x)
        return x


def seeded(cls: type[nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(*args)


def of_class(how, cls, loss_name, twice, nested):
    single = build(how, seeded(cls))
    loss = LOSSES[loss_name]
    rebuilt, kept = (gradients_of(build(how, seeded(cls), memory_budget=b), loss, twice, nested) for b in (0.0, 1.0))
    if how != ("float", 0.9):
        assert all(torch.equal(grad, kept[name]) for name, grad in rebuilt.items())
    total: dict[str, Tensor] = {}
    for r in range(SIZE):
        single.zero_grad()
        backward(loss(single(batch(r))), twice=twice)
        for name, p in single.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad / SIZE
    # Where a tap, a step and its branch read one state, three gradients are summed, and not always in the same order.
    assert_same({name: rebuilt.get(name, torch.zeros_like(grad)) for name, grad in total.items()}, total)
    assert len(rebuilt) > 8


def gradients_of(net, loss, twice, nested):
    if nested:
        for block in net.blocks:
            fully_shard(block.mlp, mesh=init_device_mesh("cpu", (SIZE,)))
    backward(loss(shard(net)(batch(torch.distributed.get_rank()))), twice=twice)
    return gradients(net)


LOSSES = {
    "all": lambda out: sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,))),
    "the tap alone": lambda out: out[1].square().sum(),
}


def backward(loss: Tensor, *, twice: bool) -> None:
    if twice:
        loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize(
    ("cls", "loss", "twice", "nested"),
    [
        (Tapped, "all", False, False),
        (Tapped, "the tap alone", False, False),
        (Decoder, "all", False, False),
        (Tapped, "all", True, False),
        (Tapped, "all", False, True),
    ],
    ids=["tap", "the tap alone", "what blocks capture", "backward twice", "a module inside sharded too"],
)
def test_gradients_of_one_process(world, how, cls, loss, twice, nested):
    world.run(of_class, how, cls, loss, twice, nested)


def without_gradients(how):
    net, single = shard(build(how, make_model())), build(how, make_model())
    with torch.no_grad():
        for mode in (True, False):
            assert torch.equal(net.train(mode)(batch(0)), single.train(mode)(batch(0)))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_calls_without_gradients(world, how):
    world.run(without_gradients, how)
