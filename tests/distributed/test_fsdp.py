"""fully_shard on the modules of a net: losses and gradients of one process, little gathered at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import mfx
from tests.distributed.nets import (
    DEPTH,
    HOW,
    assert_same,
    batch,
    gradients,
    loss_of,
    make_model,
    mean,
    momentum,
    single_loss,
    whole,
)
from tests.distributed.world import SIZE
from tests.mfx.models import WIDTH, ConvNet, Stack
from tests.sampling import grid

BRANCHES = [("mix", "mlp"), ("norm1", "mix", "norm2", "mlp")]


def shard(model: Stack, names: tuple[str, ...], **settings) -> Stack:
    """Every branch module by itself, the rest with the root."""
    mesh = init_device_mesh("cpu", (SIZE,))
    for block in model.blocks:
        for name in names:
            fully_shard(getattr(block, name), mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh)


def build(when: str, names: tuple[str, ...], how, depth: int = DEPTH):
    model = make_model(depth)
    if when == "before":
        return momentum(shard(model, names), how)
    net = momentum(model, how)
    if when == "after the first call":
        net(batch(0))
    return shard(net, names)


def train(when, names, how, steps=3):
    rank = torch.distributed.get_rank()
    single, net = momentum(make_model(), how), build(when, names, how)
    optimizers = [torch.optim.SGD(each.parameters(), 0.01, momentum=0.9) for each in (single, net)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected, loss = single_loss(single, step), loss_of(net, batch(rank, step))
        expected.backward()
        loss.backward()
        torch.testing.assert_close(mean(loss), expected.detach())
        assert_same(gradients(net), gradients(single))
        for optimizer in optimizers:
            optimizer.step()
    assert_same({name: whole(value) for name, value in net.state_dict().items()}, dict(single.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(batch(0)), single.eval()(batch(0)))


@grid(6, how=HOW, when=["before", "after", "after the first call"], names=BRANCHES)
def test_training_is_that_of_one_process(world, how, when, names):
    world.run(train, when, names, how)


def train_both_trees(how):
    """The model that was sharded and its net have the same shards, whichever is called."""
    model = shard(make_model(), ("mix", "mlp"))
    net = momentum(model, how)
    plain, single = make_model(), momentum(make_model(), how)
    x = batch(torch.distributed.get_rank())
    for sharded, one in ((net, single), (model, plain), (net, single)):
        net.zero_grad()
        one.zero_grad()
        loss_of(sharded, x).backward()
        single_loss(one).backward()
        assert_same(gradients(sharded), gradients(one))
        assert all(p is q for p, q in zip(model.parameters(), net.parameters(), strict=True))


def test_the_sharded_model_stays_usable(world):
    world.run(train_both_trees, ("exact", 0.9))


def train_frozen(how):
    """Nothing asks for the frozen branches' gradients, but the walk back passes through them."""
    nets = momentum(make_model(), how), build("after", ("mix", "mlp"), how)
    single, net = nets
    for each in nets:
        each.blocks[1].requires_grad_(False)
        each.blocks[2].mlp.requires_grad_(False)
    single_loss(single).backward()
    loss_of(net, batch(torch.distributed.get_rank())).backward()
    assert_same(gradients(net), gradients(single))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_frozen_branches(world, how):
    world.run(train_frozen, how)


def train_in_bfloat16():
    """The branches compute in bfloat16: the two budgets must agree bit for bit, for they read the same stream."""
    results = []
    for budget in (0.0, 1.0):
        net = mfx.momentumize(make_model(), memory_budget=budget)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
        shard(net, ("mix", "mlp"), mp_policy=policy)
        loss_of(net, batch(torch.distributed.get_rank())).backward()
        results.append(gradients(net))
    assert all(torch.equal(results[0][name], grad) for name, grad in results[1].items())


def test_mixed_precision(world):
    world.run(train_in_bfloat16)


@contextmanager
def watching(net: nn.Module) -> Iterator[list[int]]:
    """Count the units but the root that hold whole parameters, when a linear layer has run or got its gradient."""
    units = [module for module in net.modules() if isinstance(module, FSDPModule) and module is not net]
    counts: list[int] = []

    def count(*_: object) -> None:
        counts.append(sum(any(gathered_bytes(unit)) for unit in units))

    linears = [module for module in net.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in linears]
    handles += [layer.register_full_backward_hook(count) for layer in linears]
    yield counts
    for handle in handles:
        handle.remove()


def gathered_bytes(unit: FSDPModule) -> list[int]:
    """Sizes of the buffers that a unit's parameters are gathered into."""
    group = unit._get_fsdp_state()._fsdp_param_group
    return [out.untyped_storage().size() for param in group.fsdp_params for out in param.all_gather_outputs]


def count_units(how, depth):
    net = build("after", ("mix", "mlp"), how, depth)
    x = batch(torch.distributed.get_rank())
    loss_of(net, x).backward()
    with watching(net) as counts:
        loss_of(net, x).backward()
    return max(counts), len(counts)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_at_most_two_units_are_gathered_at_once(world, how):
    for peak, counted in world.run(count_units, how, 6):
        assert 1 <= peak <= 2
        assert counted > 6 * 2 * 3


def shard_blocks_of_one_step(when, how):
    torch.manual_seed(0)
    model, mesh = ConvNet(DEPTH), init_device_mesh("cpu", (SIZE,))
    single = momentum(ConvNet(DEPTH), how)
    single.load_state_dict(model.state_dict())
    net = momentum(model, how) if when == "after" else model
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    net = net if when == "after" else momentum(net, how)
    x = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))  # one for both: BatchNorm sees each half
    for each in (single, net):
        each(x).square().sum().backward()
    assert_same(gradients(net), gradients(single))
    assert_same(dict(net.named_buffers()), dict(single.named_buffers()))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_blocks_that_are_one_step(world, how, when):
    world.run(shard_blocks_of_one_step, when, how)


class Encoder(nn.Module):
    """Two blocks and what follows them: more than steps."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = make_model(2).blocks, nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def shard_containers(when, how):
    mesh, model = init_device_mesh("cpu", (SIZE,)), nn.Sequential(Encoder(), nn.Linear(WIDTH, 2))
    net = momentum(model, how) if when == "after" else model
    fully_shard(net[0], mesh=mesh)
    with pytest.raises(mfx.MfxError) as caught:
        (net if when == "after" else momentum(net, how))(batch(0))
    return str(caught.value)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_container_of_more_than_steps_is_refused(world, how, when):
    for message in world.run(shard_containers, when, how):
        assert "fully_shard was applied to 0, which is not called, since steps of a momentum chain lie in it" in message
        assert "what the steps call: 0.blocks.0.norm1, 0.blocks.0.mix, 0.blocks.0.norm2, 0.blocks.0.mlp" in message


def shard_modules_together():
    mesh, model = init_device_mesh("cpu", (SIZE,)), make_model()
    fully_shard([model.blocks[0].mix, model.blocks[0].mlp], mesh=mesh)
    with pytest.raises(mfx.MfxError, match=r"several modules at once, blocks.0.mix among them.*one module at a time"):
        mfx.momentumize(model)


def test_a_group_of_modules_sharded_before_is_refused(world):
    world.run(shard_modules_together)


def shard_what_dynamo_captures(when, root_only):
    mesh, model = init_device_mesh("cpu", (SIZE,)), make_model()
    net = mfx.momentumize(model, capture="dynamo")
    if when == "after the first call":
        net(batch(0))
    if not root_only:
        fully_shard(net.blocks[0].mlp, mesh=mesh)
    fully_shard(net, mesh=mesh)
    if root_only:
        loss_of(net, batch(0)).backward()
        return
    with pytest.raises(mfx.MfxError, match=r"blocks\.0\.mlp is sharded by fully_shard.*captured by TorchDynamo"):
        net(batch(0))


@pytest.mark.parametrize("when", ["before the first call", "after the first call"])
@pytest.mark.parametrize("root_only", [False, True])
def test_modules_that_a_graph_does_not_call_are_refused(world, when, root_only):
    world.run(shard_what_dynamo_captures, when, root_only)


def draw_signs():
    """Each process has samples of its own, and signs for them."""
    kept, net = (
        shard(mfx.momentumize(make_model(), gamma=mfx.BDIA(0.25, "sample"), memory_budget=budget), BRANCHES[0])
        for budget in (1.0, 0.0)
    )
    for each in (kept, net):
        torch.manual_seed(torch.distributed.get_rank())
        loss_of(each, batch(torch.distributed.get_rank())).backward()
    expected = gradients(kept)
    assert all(torch.equal(grad, expected[name]) for name, grad in gradients(net).items())


def test_random_signs(world):
    world.run(draw_signs)
