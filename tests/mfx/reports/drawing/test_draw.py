from __future__ import annotations

import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import mfx
from mfx.reports.drawing.boxes import ChainBox, ModuleBox, Picture, ValueBox
from mfx.reports.drawing.groups import contract
from mfx.reports.drawing.picture_file import figure_of
from mfx.reports.drawing.repeats import repeats
from mfx.reports.drawing.shapes import shape
from mfx.reports.drawing.subject import pictures_of
from mfx.reports.drawing.svg import svg_of
from mfx.reports.markup import escape, text_width
from tests.mfx.models import ConvNet, Masked, Stack, images, inputs

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert(1)</script>"


class Nested(nn.Module):
    """Blocks whose branches hold a chain; a module with a hostile name, and a value read late."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.add_module(HOSTILE, nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            h = getattr(self, HOSTILE)(self.fc(x))
            for f in self.inner:
                h = h + f(h)
            return x + h

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start = x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * start, x


class Refused(nn.Module):
    """A model with a graph break: it prints a value between its two stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        print("no graph can say this:", float(y.sum()))
        return y + self.second(x)


def picture(model: nn.Module, *args: Tensor) -> Picture:
    (found,) = pictures_of(model, args, {})
    return found


def names(found: Picture) -> list[str]:
    return [box.name for box in found.boxes]


@given(st.lists(st.sampled_from("abc"), max_size=30))
def test_repeats_unfold_to_the_whole_sequence(labels: list[str]) -> None:
    unfolded: list[str] = []
    for start, period, count in repeats(labels):
        assert start == len(unfolded)
        unfolded += labels[start : start + period] * count
    assert unfolded == labels


def test_modules_around_a_chain_are_boxes() -> None:
    found = picture(mfx.momentumize(Stack()))
    assert names(found) == ["x", "embed", "blocks", "head", "output"]
    assert found.edges == ((0, 1), (1, 2), (2, 3), (3, 4))
    kinds = [box.kind for box in found.boxes if isinstance(box, ModuleBox)]
    assert kinds == ["Linear", "Linear"]


def test_equal_steps_are_folded_and_show_their_formula() -> None:
    chain = picture(mfx.momentumize(Stack(depth=5), gamma=0.5)).boxes[2]
    assert isinstance(chain, ChainBox)
    assert chain.facts == "10 steps · γ = 0.5 · exact arithmetic"
    (fold,) = chain.folds
    assert fold.count == 5
    assert [text for row in fold.rows for text in row.texts] == ["x + dropout(mix(norm1(x)))", "x + mlp(norm2(x))"]
    assert fold.place == "blocks[0] … blocks[4]"


def test_steps_that_differ_are_not_folded() -> None:
    model = Stack(depth=4)
    model.blocks[1].mlp = nn.Tanh()
    model.blocks[1].norm2 = nn.Identity()
    chain = picture(mfx.momentumize(model)).boxes[2]
    assert isinstance(chain, ChainBox)
    assert [(fold.count, len(fold.rows)) for fold in chain.folds] == [(1, 1)] * 4 + [(2, 2)]
    assert chain.folds[3].rows[0].texts == ("x + mlp(norm2(x))",)
    assert chain.folds[3].rows[0].tooltip == "norm2: Identity, mlp: Tanh"


def test_a_step_of_kind_map_shows_the_whole_map() -> None:
    chain = picture(mfx.momentumize(ConvNet(depth=3))).boxes[2]
    assert isinstance(chain, ChainBox)
    assert [(fold.count, [text for row in fold.rows for text in row.texts]) for fold in chain.folds] == [
        (3, ["ConvBlock(x)"])
    ]


def test_chains_inside_of_branches_are_drawn_inside_and_folded_with_them() -> None:
    found = picture(mfx.momentumize(Nested()))
    chain = found.boxes[2]
    assert isinstance(chain, ChainBox)
    (fold,) = chain.folds
    (row,) = fold.rows
    (inner,) = row.inner
    assert (fold.count, inner.name, [f.count for f in inner.folds]) == (4, "blocks[i].inner", [3])
    assert row.texts == (f"x + blocks[i].inner({HOSTILE}(fc(x)))",)
    stem, output = names(found).index("stem"), names(found).index("output")
    assert (stem, output - 1) in found.edges, "a value that is read late"
    assert (2, output) in found.edges, "an output from the middle"


def test_a_capture_of_the_steps_is_an_edge() -> None:
    found = picture(mfx.momentumize(Masked()), torch.randn(2, 8), torch.ones(2, 8))
    (chain,) = [box for box in found.boxes if isinstance(box, ChainBox)]
    assert [text for fold in chain.folds for row in fold.rows for text in row.texts] == ["x + fcs[i](x)·…"]
    assert (names(found).index("mask"), found.boxes.index(chain)) in found.edges
    assert "state 2×8 float32" in chain.facts


def test_both_ways_to_capture_give_one_drawing() -> None:
    traced = picture(mfx.momentumize(Stack(), capture="symbolic"))
    dynamo = picture(mfx.momentumize(Stack(), capture="dynamo", example_inputs=inputs()))
    assert names(traced) == names(dynamo)
    assert traced.edges == dynamo.edges


def test_with_inputs_a_graph_by_dynamo_has_the_shape_of_the_state() -> None:
    net = mfx.momentumize(Stack(), capture="dynamo", example_inputs=inputs())
    assert "state 2×8 float32" in mfx.draw(net, None, inputs()).svg


def test_groups_are_never_on_a_cycle() -> None:
    """The nodes of "a" before and after "b" are two groups."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    before = graph.call_function(torch.relu, (x,))
    between = graph.call_function(torch.tanh, (before,))
    after = graph.call_function(torch.add, (before, between))
    graph.output(after)
    keys = {before: "a", between: "b", after: "a"}
    groups = contract(graph, keys.get, hide=lambda node: False)
    assert [group.key for group in groups] == [None, "a", "b", "a", None]
    for position, group in enumerate(groups):
        assert all(groups.index(source) < position for source in group.inputs)


def test_a_model_without_chains_is_drawn_as_it_is() -> None:
    found = picture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    assert [type(box) for box in found.boxes] == [ValueBox, ModuleBox, ModuleBox, ValueBox]
    assert names(found) == ["input", "[0]", "[1]", "output"]


def test_a_net_in_parts_is_one_picture_per_part(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = mfx.momentumize(Refused())
        net(inputs())
    assert "no graph can say this" in capsys.readouterr().out
    found = pictures_of(net, (), {})
    assert [drawn.title for drawn in found] == ["first, rewritten by itself", "second, rewritten by itself"]
    for drawn in found:
        assert names(drawn)[1:] == ["embed", f"{drawn.title.split(',')[0]}.blocks", "head", "output"]
    assert "rewritten by itself" in svg_of("Refused", found)


def test_a_net_in_parts_without_chains_says_so() -> None:
    assert "no chain in any part" in svg_of("Refused", [])


def test_a_graph_module_is_drawn() -> None:
    rewritten = mfx.momentumize(mfx.trace(Stack()))
    assert names(picture(rewritten)) == ["x", "embed", "blocks", "head", "output"]


@pytest.fixture(scope="module", params=[Stack, ConvNet, Nested])
def root(request: pytest.FixtureRequest) -> ElementTree.Element:
    build: Callable[[], nn.Module] = request.param
    return ElementTree.fromstring(mfx.draw(mfx.momentumize(build())).svg)


def test_the_drawing_is_xml_that_loads_nothing(root: ElementTree.Element) -> None:
    kinds = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert kinds <= {"svg", "style", "g", "rect", "path", "polygon", "text", "tspan", "title"}
    for element in root.iter():
        assert not {name for name in element.attrib if "href" in name or name.startswith("on")}
    style = root.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    assert "url(" not in style
    assert "@import" not in style


def test_everything_lies_inside_the_drawing(root: ElementTree.Element) -> None:
    """Holds for rectangles and for text in the widest of the fixed-width fonts (0.602 em; 11 or 13 pixels)."""
    _, _, wide, high = map(float, root.attrib["viewBox"].split())
    seen = 0

    def walk(element: ElementTree.Element, x: float, y: float) -> None:
        nonlocal seen
        if "transform" in element.attrib:
            across, down = map(float, element.attrib["transform"].removeprefix("translate(")[:-1].split())
            x, y = x + across, y + down
        if element.tag == f"{SVG}rect" and element.get("class") != "ground":
            assert x >= 0
            assert x + float(element.attrib["width"]) <= wide
            assert y + float(element.attrib["height"]) <= high
        if element.tag == f"{SVG}text" and element.get("text-anchor", "start") == "start":
            size = 11 if "small" in element.get("class", "") else 13
            right = x + float(element.attrib["x"]) + 0.602 * size * len("".join(element.itertext()))
            assert right <= wide
            seen += 1
        for inner in element:
            walk(inner, x, y)

    walk(root, 0.0, 0.0)
    assert seen > 3


def test_names_from_the_model_are_escaped() -> None:
    model = nn.Sequential()
    for name in (HOSTILE, "&amp;"):
        model.add_module(name, nn.ReLU())
    drawing = mfx.draw(model)
    assert "<script" not in drawing.svg
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(drawing.svg).iter(f"{SVG}text")]
    assert f"{HOSTILE}  ReLU" in texts
    assert "&amp;  ReLU" in texts
    assert escape("a\0b\nc") == "a\ufffdb\ufffdc"


def test_a_long_name_is_cut() -> None:
    box = ModuleBox("a" * 500, "b" * 500, "")
    assert shape(box).width < 800


def test_a_file_is_written(tmp_path: Path) -> None:
    file = tmp_path / "net.svg"
    drawing = mfx.draw(mfx.momentumize(ConvNet()), file, images())
    assert file.read_text(encoding="utf-8") == drawing.svg == drawing._repr_svg_()


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG")])
def test_a_picture_is_written(tmp_path: Path, suffix: str, head: bytes) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / f"net.{suffix}"
    mfx.draw(mfx.momentumize(ConvNet()), file, images())
    assert file.read_bytes().startswith(head)


@pytest.mark.parametrize("build", [ConvNet, Stack])
def test_a_picture_has_what_the_document_has(build: Callable[[], nn.Module]) -> None:
    pytest.importorskip("matplotlib")
    svg = mfx.draw(mfx.momentumize(build())).svg
    root = ElementTree.fromstring(svg)
    figure = figure_of(svg)
    (axes,) = figure.axes
    words = [part.text or "" for text in root.iter(f"{SVG}text") for part in (text, *text)]
    assert [text.get_text().replace("\\$", "$") for text in axes.texts] == words
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("class") != "ground"]
    assert len(axes.patches) == len(boxes) + len(list(root.iter(f"{SVG}polygon")))
    assert len(axes.lines) == len(list(root.iter(f"{SVG}path")))
    assert [72 * side for side in figure.get_size_inches()] == [float(root.attrib[s]) for s in ("width", "height")]
    figure.canvas.draw()
    for text, words_ in zip(axes.texts, words, strict=True):  # as wide as the boxes were made for
        width = text.get_window_extent().width * 72 / figure.dpi
        assert width <= text_width(words_, text.get_fontsize()) * 1.02 + 1


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        mfx.MfxError, match=r"\.png files with matplotlib: pip install 'mfx\[report\]'.*writes net\.svg"
    ):
        mfx.draw(ConvNet(), "net.png")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("net.gif", r"draw writes \.svg, \.png and \.pdf files; call the file net\.svg, not net\.gif\."),
        (torch.zeros(1), r"the second argument is the file to write, not a Tensor; .* mfx\.draw\(net, 'net\.svg', x\)"),
        ("/nowhere/at/all/net.svg", r"cannot be written: No such file"),
    ],
)
def test_a_bad_file_is_an_error(path: object, message: str) -> None:
    with pytest.raises(mfx.MfxError, match=message):
        mfx.draw(ConvNet(), path)  # type: ignore[arg-type]


def test_a_class_is_not_a_model() -> None:
    with pytest.raises(mfx.MfxError, match=r"draw takes a torch\.nn\.Module, not the class Stack\."):
        mfx.draw(Stack)  # type: ignore[arg-type]


def test_a_model_that_needs_inputs_says_so() -> None:
    with pytest.raises(mfx.MfxError, match=r"With inputs, mfx\.draw\(model, path, \*inputs\), TorchDynamo is asked"):
        mfx.draw(nn.Transformer(8, 2, 1, 1, 8, batch_first=True))
