"""An observer of a call sees the model's operations: also where calls are no one graph, decide or capture anew."""

import copy
import logging
import warnings
from collections import Counter
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import mfx
from mfx.net.forward import forward_of
from tests.promises.test_3_first_calls import COMPARING, OBSERVERS, Block
from tests.sampling import grid

pytestmark = pytest.mark.filterwarnings("ignore:mfx.*rewritten each on its own", "ignore:mfx.*may run again")


class Blocks(nn.Module):
    """Four residual adds, with something between them that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(nn.LayerNorm) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks[:2]:
            x = x + block(x)
        x = self.between(x)
        for block in self.blocks[2:]:
            x = x + block(x)
        return x

    def between(self, x):
        """Change nothing."""
        return x


class Breaks(Blocks):
    """Asks numpy in between: TorchDynamo makes a graph of each half."""

    def between(self, x):
        return x + torch.from_numpy(numpy.tanh(x.detach().numpy()))


class Decides(Blocks):
    """A condition on values: a graph for each path, or to TorchDynamo a break."""

    def between(self, x):
        return x * 2 if x.sum() > 1e3 else x


class Hooked(Blocks):
    """TorchDynamo refuses its hook at once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mix.register_full_backward_hook(pass_on)


def pass_on(module, grad_input, grad_output):
    return None


class Inner(nn.Module):
    """Is no one graph itself, and has a part that decides and a part that is hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Hooked(), Breaks()

    def forward(self, x):
        x = self.first(x)
        y = self.second(x)
        return y if y.sum() > -1e9 else x


MODELS = {model.__name__: model for model in (Breaks, Decides, Hooked, Inner)}
ROUTES = {"symbolic": "auto", "dynamo": "dynamo"}


def seen_by(observer, module, x):
    """Return what an observer sees of a training step, but for comparisons, and sizes that are read off tensors."""
    torch.manual_seed(0)
    with observer() as seen:
        module(x).sum().backward()
    module.zero_grad()
    return Counter(str(one) for one in seen if one not in COMPARING and not str(one).endswith(("__get__", ".size")))


def train(module):
    module.train()


def evaluate(module):
    module.eval()


def hook(module):
    next(inner for inner in module.modules() if isinstance(inner, Block)).mix.register_full_backward_hook(pass_on)


def leave(module):
    pass


CALLS = {
    "first": (leave, 4),
    "other size": (leave, 6),
    "evaluation": (evaluate, 6),
    "hooked": (hook, 6),
    "back": (train, 4),
}
NAMES = ["operations", "functions", "profiled", "saved_tensors"]
WATCHING = {name: observer for name, observer in OBSERVERS.items() if name in NAMES}


@grid(len(MODELS), model=MODELS, route=ROUTES, observer=WATCHING, budget=[0.0, 1.0])
def test_calls_that_capture_show_what_the_next_call_shows_and_the_model(model, route, observer, budget):
    torch.manual_seed(0)
    plain = model()
    net = mfx.momentumize(copy.deepcopy(plain), gamma=0.0, memory_budget=budget, capture=route)
    for change, batch in CALLS.values():
        x = torch.randn(batch, 8)
        for module in (plain, net):
            change(module)
        found = seen_by(observer, net, x)
        assert found == seen_by(observer, net, x)
        if budget == 1.0:
            assert found == seen_by(observer, plain, x)
        assert found


@grid(2, model=MODELS, observer=WATCHING)
def test_chains_with_momentum_are_observed_alike_in_all_calls(model, observer):
    net = mfx.momentumize(model(), gamma=0.9)
    for batch in (4, 6):
        x = torch.randn(batch, 8)
        assert seen_by(observer, net, x) == seen_by(observer, net, x)
    forward = forward_of(net)
    assert any(graph.moving for part in (forward, *forward.submodules()) for graph in part.table.graphs)


class Counting(TorchFunctionMode):
    """Counts functions, so that it is another one at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_an_observer_is_no_reason_for_another_graph():
    net, mode, x = mfx.momentumize(Breaks(), gamma=0.0), Counting(), torch.randn(4, 8)
    net(x)
    made = len(forward_of(net).table.pieces.graphs)
    for _ in range(3):
        with mode, OBSERVERS["saved_tensors"]():
            net(x)
    assert len(forward_of(net).table.pieces.graphs) == made > 1
    assert mode.seen.count("linear") == 3 * 5


@pytest.mark.parametrize("observer", [OBSERVERS["operations"], OBSERVERS["flops"]])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_dispatch_mode_is_a_reason_for_one_graph_of_each_stretch(observer, is_first):
    net, x = mfx.momentumize(Breaks(), gamma=0.0), torch.randn(4, 8)
    counts = []
    for is_observed in [is_first, not is_first, *[True, False] * 3]:
        with observer() if is_observed else nullcontext():
            net(x)
        counts.append(len(forward_of(net).table.pieces.graphs))
    assert counts[1:] == [2 * counts[0]] * 7


class Makes(Breaks):
    """Makes a tensor on the default device."""

    def between(self, x):
        return super().between(x), torch.zeros(3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks[:2]:
            x = x + block(x)
        x, made = self.between(x)
        for block in self.blocks[2:]:
            x = x + block(x)
        return x, made


@pytest.mark.parametrize("devices", [["cpu", "meta"], ["meta", "cpu"]], ids="-".join)
def test_a_graph_between_breaks_is_for_one_default_device(devices):
    net, x = mfx.momentumize(Makes(), gamma=0.0).eval(), torch.randn(4, 8)
    for device in (*devices, None):
        with torch.device(device or "cpu"):
            assert net(x)[1].device == torch.device(device or "cpu")
    assert net(x)[1].device == torch.device("cpu")


@pytest.mark.parametrize("observer", WATCHING.values(), ids=WATCHING)
def test_a_call_off_the_path_expected_shows_the_right_path_alone(observer):
    plain = Decides()
    net, small = mfx.momentumize(copy.deepcopy(plain), gamma=0.0, memory_budget=1.0), torch.randn(4, 8)
    large = small.abs() * 1e4
    net(small)
    for x in (large, small, large):  # the path expected is that of the call before
        assert seen_by(observer, net, x) == seen_by(observer, plain, x)


def test_hooks_can_tell_a_call_on_trial():
    net, calls, x = mfx.momentumize(Decides(), gamma=0.0), [], torch.randn(4, 8)
    net.blocks[0].mix.register_forward_hook(lambda module, args, output: calls.append(mfx.recomputing()))
    net(x)
    assert calls == [False]
    with OBSERVERS["profiled"](), pytest.warns(UserWarning, match=r"forward hooks on blocks\.0\.mix may run again"):
        net(x)
    assert calls == [False, True, False]
    assert not mfx.recomputing()


class Logs(Blocks):
    """Logs a value, for which TorchDynamo breaks the graph."""

    def between(self, x):
        logging.getLogger("of a model").warning("%s", x.detach().mean())
        return x


def test_a_model_that_logs_is_heard_and_not_torchdynamo(caplog):
    plain, x = Logs().eval(), torch.randn(4, 8)
    net = mfx.momentumize(copy.deepcopy(plain), gamma=0.0, capture="dynamo")
    for _ in range(2):
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(net(x), plain(x))
        assert not [warning for warning in caught if not str(warning.message).startswith("mfx")]
        ours, theirs = [record.getMessage() for record in caplog.records if record.name == "of a model"]
        assert ours == theirs
