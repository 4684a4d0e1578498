"""The views of a model: one for each of its graphs."""

import warnings

import pytest
import torch
from torch import nn

import mfx
from mfx.cli import main
from mfx.compiler.backend import momentum
from mfx.engine import Stream
from mfx.net.views import last_views, views_of
from tests.mfx.models import Stack, inputs


class Halves(nn.Module):
    """Two stacks with a number read from a tensor between them, so that it is not one graph."""

    def __init__(self):
        super().__init__()
        self.first, self.between, self.second = Stack(), nn.Linear(3, 8), Stack()

    def forward(self, x):
        x = self.between(self.first(x))
        return self.second(x) if float(x.detach().sum()) > -1e9 else x


def views(model, *args):
    return views_of(model, args, {}, "views(model, *inputs)")


def called(model):
    net = mfx.momentumize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(inputs())
    return net


@pytest.mark.parametrize("build", [Stack, lambda: mfx.momentumize(Stack()), lambda: called(Stack())])
@pytest.mark.parametrize("args", [(), (inputs(),)], ids=["without inputs", "with inputs"])
def test_a_net_has_one_whole_view(build, args):
    (view,) = views(build(), *args)
    assert (view.title, view.path, view.is_whole) == ("", "", True)
    assert [call.chain for call in view.calls.values()] == ["blocks"] == [c.name for c in view.findings().chains]
    assert list(view.graphs()) == ["train"]
    assert view.streams == ({"blocks": (Stream((2, 8), torch.float32, 6),)} if args else {})
    assert set(view.calls) <= {str(node.target) for node in view.graph_module().graph.nodes}
    assert not set(view.calls) & {str(node.target) for node in view.captured().nodes}


def test_a_net_that_is_not_one_graph_has_a_view_of_each_module():
    found = views(called(Halves()))
    assert [(view.path, view.title) for view in found] == [
        ("first", "first, rewritten by itself"),
        ("second", "second, rewritten by itself"),
    ]
    assert not any(view.is_whole for view in found)
    assert [list(view.graphs()) for view in found] == [["first: train", "second: train"]] * 2


class Summing(Stack):
    """A module that looks at a value between its own sums, which TorchDynamo cuts in pieces."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x):
        for block in self.blocks[:3]:
            x = x + block(x)
        x = x / float(1 + x.detach().numpy().std())
        for block in self.blocks[3:]:
            x = x + block(x)
        return self.head(x)


def test_a_module_that_runs_in_pieces_has_a_view_of_each():
    model = Halves()
    model.first = Summing()
    net = called(model)
    found = [view for view in views(net) if view.calls]
    assert [view.title for view in found] == ["first, piece 1", "first, piece 3", "second, rewritten by itself"]
    assert [(c.name, len(c.steps)) for c in mfx.explain(net).chains] == [
        ("first.blocks", 3),
        ("first.blocks", 2),
        ("second.blocks", 6),
    ]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_has_a_view_of_each_graph():
    torch._dynamo.reset()
    compiled = torch.compile(Stack(), backend=momentum, options={"inner": "eager"})
    compiled(inputs())
    compiled.eval()
    compiled(inputs())
    found = views(compiled)
    assert [(view.title, view.is_whole) for view in found] == [("train", False), ("eval", False)]
    svg = mfx.draw(compiled).svg
    assert all(f">{text}<" in svg for text in ("train", "eval"))
    assert "rewritten graph of Stack" in svg
    assert len(mfx.explain(compiled).chains) == 1
    torch._dynamo.reset()


def test_a_compiled_net_has_the_view_of_the_net():
    (view,) = views(torch.compile(mfx.momentumize(Stack()), backend="eager"))
    assert view.is_whole


def test_a_graph_module_that_was_rewritten_is_its_own_view():
    module = mfx.momentumize(mfx.trace(Stack()))
    (view,) = views(module, inputs())
    assert view.graph_module() is module
    assert view.captured() is None
    assert [call.chain for call in view.calls.values()] == ["blocks"]


def test_a_momentum_net_has_no_graph():
    net = mfx.MomentumNet([nn.Linear(8, 8)] * 3)
    (view,) = views(net, inputs())
    assert view.streams == {"MomentumNet": (Stream((2, 8), torch.float32, 3),)}
    assert list(view.calls) == ["chain"]
    with pytest.raises(mfx.MfxError, match="there is no graph of it"):
        view.graph_module()


def test_last_views_capture_nothing():
    assert last_views(Stack()) == []
    assert last_views(mfx.momentumize(Stack(), capture="dynamo")) == []
    (view,) = last_views(called(Stack()))
    assert view.title == ""
    assert [view.path for view in last_views(called(Halves()))] == ["first", "second"]
    (view,) = last_views(nn.Sequential(mfx.MomentumNet([nn.Linear(8, 8)] * 3)))
    assert (view.path, list(view.calls)) == ("0", ["chain"])


def test_the_command_line_reports_a_graph_module_that_was_rewritten(tmp_path):
    spec = "tests.mfx.net.test_views:traced"
    assert main(["report", spec, "--input", "2,8", "--repeats", "1", "-o", str(tmp_path / "net.html")]) == 0
    page = (tmp_path / "net.html").read_text()
    assert "after: rewritten" in page
    assert "before: as captured" not in page


def traced():
    return mfx.trace(Stack())
