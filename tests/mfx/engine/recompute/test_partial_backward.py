"""Backward passes through a part of the graph: gradients of the inputs first, those of the weights later, by parts."""

import gc
import weakref
from collections.abc import Callable, Collection
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

import mfx
from mfx.engine.recompute.tape import Tape
from mfx_passes import MfxError
from tests.sampling import grid

# What is tested is that it is right, however often it is rebuilt.
pytestmark = pytest.mark.filterwarnings(r"ignore:mfx. chain \S+. the backward pass of one graph has rebuilt")


class Block(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Stage(nn.Module):
    """A pipeline stage: its output is the end of a chain, unless it has a head."""

    def __init__(self, depth: int = 9, p: float = 0.0, *, head: bool = False) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(p) for _ in range(depth)))
        self.head = nn.Linear(8, 8) if head else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def inputs_of(count: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 8).requires_grad_() for _ in range(count)]


def forward(net: nn.Module, x: Tensor, number: int) -> list[Tensor]:
    torch.manual_seed(number)  # of the dropout masks
    return [net(x)]


def input_gradients(net: nn.Module, outputs: list[Tensor], x: Tensor):
    _, groups = stage_backward_input(outputs, [torch.ones(4, 8)], [x], net.parameters())
    outputs.clear()
    return groups


def one_after_the_other(net: nn.Module, inputs: list[Tensor], order: Callable[[list], list]) -> None:
    for number, x in enumerate(inputs):
        groups = input_gradients(net, forward(net, x, number), x)
        stage_backward_weight(net.parameters(), order(groups))


def interleaved(net: nn.Module, inputs: list[Tensor], order: Callable[[list], list]) -> None:
    """Two forwards before the first backward, weights of the first microbatch last."""
    outputs = [forward(net, x, number) for number, x in enumerate(inputs)]
    groups = [input_gradients(net, out, x) for out, x in zip(outputs, inputs, strict=True)]
    for group in reversed(groups):
        stage_backward_weight(net.parameters(), order(group))


def gradients(schedule: Callable[..., None], build: Callable[[], Stage], **options: object) -> list[Tensor]:
    torch.manual_seed(0)
    net = mfx.momentumize(build(), verify="raise", **options)
    schedule(net, inputs := inputs_of(3))
    return [tensor.grad for tensor in (*net.parameters(), *inputs)]


BUILDS = {
    "stage": Stage,
    "stage with a head": partial(Stage, head=True),
    "dropout": partial(Stage, p=0.3),
}


@grid(
    8,
    gamma=[0.0, 0.9],
    schedule={"one after the other": one_after_the_other, "interleaved": interleaved},
    order={"upwards": list, "downwards": lambda groups: groups[::-1]},
    build=BUILDS,
)
def test_input_gradients_then_weight_gradients(gamma, schedule, order, build):
    schedule = partial(schedule, order=order)
    expected = gradients(schedule, build, gamma=gamma, memory_budget=1.0)
    assert all(grad is not None for grad in expected)
    for budget in (0.0, 0.5):
        found = gradients(schedule, build, gamma=gamma, memory_budget=budget)
        assert all(map(torch.equal, found, expected))


def test_float_arithmetic_and_anchors():
    """γ = 0.5 has an anchor every few steps; walks start from the nearest one."""
    schedule, build = partial(interleaved, order=list), partial(Stage, depth=20)
    expected = gradients(schedule, build, gamma=0.5, arithmetic="float", memory_budget=1.0)
    found = gradients(schedule, build, gamma=0.5, arithmetic="float")
    for grad, other in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)  # twenty steps that each round to float32


def tapes(others: Collection[int] = ()) -> list[Tape]:
    return [thing for thing in gc.get_objects() if type(thing) is Tape and id(thing) not in others]


def test_nothing_is_kept_once_the_graph_is_freed():
    torch.manual_seed(0)
    net, (x,) = mfx.momentumize(Stage(), gamma=0.9), inputs_of(1)
    gc.collect()
    others = set(map(id, tapes()))
    gc.disable()
    try:
        groups = input_gradients(net, forward(net, x, 0), x)
        (tape,) = map(weakref.ref, tapes(others))
        assert tape()._stored  # the end state, for the gradients of the weights
        stage_backward_weight(net.parameters(), groups)
        del groups
        assert tape() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("retain", [False, True])
def test_a_backward_pass_that_frees_the_graph_frees_the_end_state(retain):
    """Also while the output is still there: a loss that is logged later."""
    torch.manual_seed(0)
    net, (x,) = mfx.momentumize(Stage(), gamma=0.9), inputs_of(1)
    others = set(map(id, tapes()))
    y = net(x)
    if retain:
        y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert not any(tape._stored for tape in tapes(others))
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_an_intermediate_value_outlives_the_output():
    def gradient(budget: float) -> Tensor:
        torch.manual_seed(0)
        net, (x,) = mfx.momentumize(Stage(), gamma=0.9, memory_budget=budget), inputs_of(1)
        noted: list[Tensor] = []
        net.blocks[7].f[2].register_forward_hook(lambda module, args, out: noted.append(out))
        net(x)  # its output is gone
        noted[0].sum().backward()
        return x.grad

    assert torch.equal(gradient(0.0), gradient(1.0))


class Straight(Block):
    """Gradients of the stream pass it without a saved tensor, so nothing else tells that the graph was freed."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (-x + self.f(x.detach()))


def test_a_part_that_an_earlier_pass_has_freed():
    torch.manual_seed(0)
    net, (x,) = mfx.momentumize(nn.Sequential(*(Straight(0.0) for _ in range(9))), gamma=0.9), inputs_of(1)
    y = net(x)
    torch.autograd.grad(y.sum(), [net[2].f[1].weight])
    with pytest.raises(MfxError, match=r"activations are rebuilt from was freed .*retain_graph=True"):
        torch.autograd.grad(y.sum(), [net[0].f[1].weight])


def one_by_one(y: Tensor, weights: list[Tensor]) -> None:
    for weight in weights:
        torch.autograd.grad(y, weight, retain_graph=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_many_walks_of_one_graph_are_a_warning_said_once(arithmetic):
    net = mfx.momentumize(Stage(), arithmetic=arithmetic)
    weights = list(net.parameters())
    y, other = (net(x).sum() for x in inputs_of(2))
    one_by_one(y, weights[:4])  # second derivatives and the like take no more
    with pytest.warns(UserWarning, match=r"more than 4 times.*memory_budget=1\.0 runs nothing again") as said:
        one_by_one(y, weights[4:])
    assert len(said) == 1
    one_by_one(other, weights)  # it was said of this chain
    kept = mfx.momentumize(Stage(), arithmetic=arithmetic, memory_budget=1.0)
    one_by_one(kept(inputs_of(1)[0]).sum(), list(kept.parameters()))


def test_a_pipeline_that_asks_for_weights_group_by_group_is_told():
    net = mfx.momentumize(Stage())
    with pytest.warns(UserWarning, match=r"zero-bubble pipelines.*memory_budget=1\.0"):
        one_after_the_other(net, inputs_of(2), list)
