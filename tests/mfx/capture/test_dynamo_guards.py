"""A graph that Dynamo captured is used again as long as it holds."""

import gc
import logging
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import mfx
from mfx.net.forward import forward_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Blocks(nn.Module):
    """Holds a chain, so it gets a forward of its own in the net; called as a module, it is guarded by Dynamo."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Blocks()

    def forward(self, x):
        return self.part(x).sum()


def test_a_second_call_captures_nothing():
    net = mfx.momentumize(Model(), gamma=0.5, capture="dynamo")
    for _ in range(3):
        net(torch.randn(2, 4)).backward()
    assert "forward" in net.part.__dict__  # else this tests nothing
    assert len(forward_of(net).table.graphs) == 1


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_around_a_call_sees_the_rewritten_call_alone():
    net, x = mfx.momentumize(Model(), gamma=0.5, capture="dynamo"), torch.randn(2, 4)
    for _ in range(2):
        with Products() as products:
            net(x)
        assert products.count == 3  # one for each block; none from looking at the model
    net(x)
    assert len(forward_of(net).table.graphs) == 1


class Prompted(Blocks):
    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.ParameterList(nn.Parameter(torch.randn(4)) for _ in range(2))

    def forward(self, x, prompt):
        return super().forward(x * prompt)


def test_an_argument_that_is_a_parameter_of_the_model():
    model, x = Prompted(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")
    for prompt in (*net.prompts, torch.randn(4)):
        assert torch.equal(net(x, prompt), model(x, prompt))


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_a_forward_replaced_in_a_module(capture):
    model, x = Model(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    net(x)
    for each in (model, net):
        each.part.blocks[1].forward = lambda x: 3 * x
    assert torch.equal(net(x), model(x))


@pytest.mark.parametrize("change", [lambda m: m.table.update(scale=3.0), lambda m: setattr(m, "function", torch.relu)])
@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_what_the_forward_goes_by(capture, change):
    class Configured(Blocks):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.function = {"scale": 2.0}, torch.tanh

        def forward(self, x):
            return self.function(super().forward(x) * self.table["scale"])

    model, x = Configured(), torch.randn(2, 4)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    assert torch.equal(net(x), model(x))
    change(model)
    change(net)
    assert torch.equal(net(x), model(x))


def test_inference_takes_the_way_that_training_takes():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), torch.randn(2, 3, 8)
    net = mfx.momentumize(model, gamma=0.5, capture="dynamo")
    expected = net(x)
    net.eval()
    with torch.no_grad():
        # The plain recurrence and the exact one differ by roundings of values below 4, in 6 steps.
        torch.testing.assert_close(net(x), expected, rtol=0, atol=6 * 4 * 2.0**-23)


def test_flops_are_counted_from_the_first_call_on():
    net, x = mfx.momentumize(Model(), gamma=0.5, capture="dynamo"), torch.randn(2, 4)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            net(x).backward()
        counts.append(counter.get_total_flops())
    # Three products of 2x4 by 4x4 forth, again, and two of as many FLOPs each back; none for the gradient of x.
    assert counts == [2 * 2 * 4 * 4 * (3 + 3 + 2 * 3 - 1)] * 2
    assert len(forward_of(net).table.graphs) == 1


class Scaled(nn.Module):
    """Divides by a number that is an attribute, and multiplies by one that is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.scale = 0.5

    def forward(self, x, factor=1.0):
        for fc in self.fcs:
            x = x + factor * fc(x / self.scale)
        return x


def test_what_fails_while_dynamo_looks_is_not_logged():
    log, records = logging.getLogger("torch._subclasses.fake_tensor"), []
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    try:
        with pytest.raises(mfx.MfxError, match="cannot be captured as one graph"):
            mfx.momentumize(Scaled(), capture="dynamo")(torch.randn(2, 5))
    finally:
        log.removeHandler(handler)
    assert not records


def test_many_numbers_are_one_graph_in_the_end():
    net = mfx.momentumize(model := Scaled(), gamma=0.0, capture="dynamo")
    x = torch.randn(2, 4)
    for number in range(12):
        assert torch.equal(net(x, number / 8), model(x, number / 8))
    before = len(mfx.graphs(net))
    for scale in (0.25, 0.75, 1.25):  # never changed before: one more graph
        model.scale = net.scale = scale
        assert torch.equal(net(x, 5.5), model(x, 5.5))
    assert len(mfx.graphs(net)) == before + 1 < 12


def rows_and_columns(net):
    """For each of a net's graphs, the oldest first, the size of its input; None for any."""
    guards = [str(graph.captured.binding._seen._guards) for graph in forward_of(net).table.graphs]
    return [re.search(r"L\['x'\].*size=\[(.*?), 4\]", text).group(1) for text in guards[::-1]]


def test_only_what_changed_is_a_variable_of_the_next_graph():
    model = Blocks()
    net = mfx.momentumize(model, gamma=0.0, capture="dynamo")

    def run(rows, columns):
        x = torch.randn(rows, columns, 4)
        assert torch.equal(net(x), model(x))

    for rows in (2, 3, 5, 7):
        run(rows, 6)
    assert rows_and_columns(net) == ["2, 6", "None, 6"]
    for columns in (5, 7, 8):
        run(7, columns)
    assert rows_and_columns(net) == ["2, 6", "None, 6", "None, None"]


def test_another_condition_of_the_same_sizes_makes_none_a_variable():
    net = mfx.momentumize(Blocks(), gamma=0.0, capture="dynamo")
    for double in (False, True):
        net.to(torch.float64 if double else torch.float32)
        net(torch.randn(2, 6, 4, dtype=torch.float64 if double else torch.float32))
    assert rows_and_columns(net) == ["2, 6", "2, 6"]


def test_models_of_one_class_know_nothing_of_each_other():
    for rows in (2, 3):
        net = mfx.momentumize(Blocks(), gamma=0.0, capture="dynamo")
        net(torch.randn(rows, 6, 4))
        assert rows_and_columns(net) == [f"{rows}, 6"]


class Decides(nn.Module):
    """Sums around a line that looks at a value: two pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for fc in self.fcs[:2]:
            x = x + fc(x)
        if float(x.detach().sum()) > 1e9:
            x = x * 2
        for fc in self.fcs[2:]:
            x = x + fc(x)
        return x


@pytest.mark.parametrize("model", [Model, Decides])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
@pytest.mark.filterwarnings("ignore:mfx")  # of a model that is no one graph, which γ > 0 needs "auto" for
def test_a_hook_on_all_modules_that_comes_later_is_called_as_without_mfx(model, gamma):
    net = mfx.momentumize(model(), gamma=gamma, capture="auto" if model is Decides else "dynamo")
    seen = []

    def call(each, hook):
        seen.clear()
        handle = nn.modules.module.register_module_forward_hook(hook) if hook else None
        each(torch.ones(2, 4))
        if handle:
            handle.remove()
        return list(seen)

    def note(module, args, output):
        if type(module) is nn.Linear:
            seen.append(tuple(output.shape))

    def note_more(module, args, output):
        if type(module) is nn.Linear:
            seen.append(output.dtype)

    for hook in (None, note, None, note_more, note):
        assert call(net, hook) == call(model(), hook)
    graphs = len(forward_of(net).table.graphs)
    assert call(net, None) == []
    assert len(forward_of(net).table.graphs) == graphs


def test_a_net_that_is_gone_leaves_no_graph_behind():
    def kept():
        gc.collect()
        return sum(type(thing) is torch.fx.Graph for thing in gc.get_objects())

    def captured():
        mfx.momentumize(Model(), gamma=0.5, capture="dynamo")(torch.randn(2, 4)).backward()

    names = set(globals())
    captured()
    before = kept()
    captured()
    assert kept() == before
    assert not [name for name in set(globals()) - names if name.startswith("__compiled_fn")]
