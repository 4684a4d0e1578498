from __future__ import annotations

import contextlib
import functools
import http.server
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import Tensor, nn

import mfx
from mfx.cli import main
from mfx.cli.commands import _source
from mfx.reports.markup import element
from mfx.reports.page import page_of
from mfx.reports.page.memory_lines import _scale, lines
from mfx.reports.profile.result import Profile
from mfx.reports.profile.rows import ProfileRow
from tests.mfx.models import Stack

HERE = "tests.mfx.reports.page.test_page"
HOSTILE = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Hostile(nn.Module):
    """A model with HTML in the names of its modules: in a chain, around it, in a refused sum."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(f"{HOSTILE}stem", nn.Linear(8, 8))
        self.blocks = nn.ModuleList(Stack(depth=1).blocks[0] for _ in range(3))
        self.add_module(HOSTILE, nn.ModuleList(nn.Linear(8, 8) for _ in range(3)))
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, f"{HOSTILE}stem")(x)
        for block in self.blocks:
            x = block(x)
        x = self.left(x) + self.right(x)
        for fc in getattr(self, HOSTILE):
            x = x + fc(x)
        return x


class Check(HTMLParser):
    """A parser that checks that every element is closed, and that no attribute loads or runs anything."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            assert name != "src"
            assert name != "href" or value == "data:,"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", f"{HERE}:Hostile", "--input", "4,8", "--repeats", "1", "-o", str(file)]) == 0
    return file


@pytest.fixture(scope="module")
def checked(file: Path) -> Check:
    check = Check()
    check.feed(file.read_text(encoding="utf-8"))
    check.close()
    assert check.open == []
    return check


def test_the_page_is_complete_and_loads_and_runs_nothing(file: Path, checked: Check) -> None:
    assert not checked.seen & {"script", "iframe", "img", "object", "embed", "form"}
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "@import" not in page
    assert "url(" not in page
    assert set(re.findall(r"https?://[\w./]*", page)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_every_section_is_on_the_page(checked: Check) -> None:
    text = "".join(checked.text)
    for heading in ("Hostile", "Memory over time", "The rewritten graph", "Chains", "Left as they are"):
        assert heading in text
    assert "both sides of the sum are computed" in text
    assert "before: as captured" in text
    assert "after: rewritten" in text
    assert "self.momentum_blocks(" in text
    assert f"{HOSTILE}stem" in text, "a name is shown as it is"
    assert f"{HERE}:Hostile" in text
    assert "float32 4×8" in text
    for way in ("plain: peak", "checkpoint: peak", "momentum: peak"):
        assert way in text


def test_text_is_escaped() -> None:
    assert element("p", "<b>", title='"<') == '<p title="&quot;&lt;">&lt;b&gt;</p>'
    assert element("pre", "a\n\0b") == "<pre>a\n\ufffdb</pre>"


def test_lines_are_where_the_numbers_are() -> None:
    """Bytes 0, 500 and 1000 of a scale that ends at 1000; the forward pass ends in the middle."""
    row = ProfileRow("momentum", 500, 1000, 2000, 1.0, 10, ((0.0, 0), (0.5, 500), (1.0, 1000)), 0.5)
    drawn = ElementTree.fromstring(lines([row]))
    points = [tuple(map(float, point.split(","))) for point in drawn.find("polyline").attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)  # drawn to a tenth of a pixel
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.1)
    ring = drawn.find("circle").attrib
    assert (float(ring["cx"]), float(ring["cy"])) == points[1]
    (top, bottom) = (min(float(e.attrib["y1"]) for e in drawn.findall("line")), y0)
    assert (top, bottom) == (y2, max(float(e.attrib["y1"]) for e in drawn.findall("line")))


@pytest.mark.parametrize("peak", [0, 1, 7, 999, 1000, 1024, 1025, 5 * 2**20, 7 * 2**30 + 1, 10**15])
def test_the_scale_reaches_the_peak_in_a_few_round_steps(peak: int) -> None:
    top, ticks = _scale(peak)
    assert ticks[0] == 0
    assert ticks[-1] == top >= peak
    assert 2 <= len(ticks) <= 6
    assert top <= 2 * max(peak, 1) or len(ticks) == 2


@pytest.mark.parametrize("peak", [7, 1024, 240 * 2**10, 1000 * 2**20, 10**15])
def test_the_labels_of_the_scale_are_not_cut_off(peak: int) -> None:
    """DejaVu Sans, the widest of the usual fonts, needs 65 units for "1000.0 KiB" at size 12, below 0.6 em a letter."""
    row = ProfileRow("plain", peak, peak, peak, 1.0, 10, ((0.0, 0), (1.0, peak)), 1.0)
    labels = [e for e in ElementTree.fromstring(lines([row])).findall("text") if e.attrib["text-anchor"] == "end"]
    assert len(labels) >= 2
    assert all(0.6 * 12 * len(label.text or "") <= float(label.attrib["x"]) for label in labels)


def test_without_inputs_there_is_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        ([], "no inputs were given (--input)."),
        (["--input", "2,8", "--device", "meta"], "the model is on the meta device, without values."),
        (["--input", "2,8", "--against", "nothing"], "nothing"),
    ):
        file = tmp_path / "report.html"
        assert main(["report", "tests.mfx.models:Stack", "-o", str(file), *words]) == 0
        assert capsys.readouterr().out == f"{file}\n"
        (said,) = re.findall(r"Not measured: ([^<]*)<", file.read_text(encoding="utf-8"))
        assert reason in said


def test_unknown_values_of_an_explanation_are_dashes() -> None:
    net = mfx.momentumize(Stack())
    page = page_of(mfx.explain(net), mfx.draw(net), facts={"a": "<b>"})
    assert page.count('<td data-label="state">–</td>') == 1
    assert "<code>&lt;b&gt;</code>" in page


def test_a_variant_that_did_not_run_is_named() -> None:
    row = ProfileRow("plain", 10, 20, 30, 0.1, 1000, ((0.0, 1), (1.0, 20)), 0.4, note="as it is")
    net = mfx.momentumize(Stack())
    profile = Profile("Stack", "cpu", 3, (row,), (), (("checkpoint", "it has <no> blocks"),))
    page = page_of(mfx.explain(net), mfx.draw(net), profile=profile)
    assert "checkpoint: not measured: it has &lt;no&gt; blocks" in page
    assert "plain: as it is" in page


def test_long_code_is_cut_and_deletions_are_left_out() -> None:
    net = mfx.momentumize(Stack())
    code = _source(mfx.graphs(net)["train"].graph)
    assert "= None" not in code
    assert "momentum_blocks = self.momentum_blocks((embed,), (), {'blocks': blocks})\n" in code
    page = page_of(mfx.explain(net), mfx.draw(net), code=[("long", "x" * 100_000)])
    assert "… and 40000 characters more" in page
    assert len(page) < 90_000


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("report.pdf", "report writes HTML; call the file report.html"),
        ("/nowhere/at/all.html", "cannot be written: No"),
    ],
)
def test_a_bad_file_is_an_error(capsys: pytest.CaptureFixture[str], output: str, message: str) -> None:
    assert main(["report", "tests.mfx.models:Stack", "-o", output]) == 1
    assert message in capsys.readouterr().err


FRAMED = """<body><script>
async function look(width) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = "report.html";
  await new Promise(done => { frame.onload = done; document.body.append(frame); });
  const page = frame.contentDocument;
  page.querySelectorAll("details").forEach(part => { part.open = true; });
  const style = frame.contentWindow.getComputedStyle(page.body);
  const texts = [...page.querySelectorAll("text")].map(text => text.getBoundingClientRect().height);
  return {width, inside: page.documentElement.scrollWidth, ground: style.backgroundColor, ink: style.color,
          scripts: page.scripts.length, smallest: Math.min(...texts), cut: [...page.querySelectorAll("svg rect")]
          .filter(box => box.getBoundingClientRect().right > width).length};
}
(async () => {
  const seen = [await look(390), await look(1200)];
  document.body.replaceChildren(JSON.stringify(seen));
})();
</script></body>"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(file: Path, tmp_path: Path) -> None:
    """No error on the console; nothing wider than a phone; light and dark as the system is."""
    (file.parent / "framed.html").write_text(FRAMED)
    quiet = ["quic", "background-networking", "component-update", "sync"]
    looks = {}
    with served(file.parent) as address:
        for scheme, number in (("dark", 0), ("light", 1)):
            done = subprocess.run(
                [
                    *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                    *(f"--disable-{name}" for name in quiet),
                    f"--user-data-dir={tmp_path / scheme}",
                    f"--blink-settings=preferredColorScheme={number}",
                    *("--enable-logging=stderr", "--virtual-time-budget=10000", "--dump-dom"),
                    f"{address}/framed.html",
                ],
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            assert "CONSOLE" not in done.stderr, done.stderr
            looks[scheme] = _looks(done.stdout)
    for narrow, wide in looks.values():
        assert narrow["inside"] <= 390
        assert wide["inside"] <= 1200
        assert narrow["cut"] == wide["cut"] == narrow["scripts"] == 0
        assert narrow["smallest"] >= 8  # pixels: the smallest line is still to be read
    brightness = {scheme: [_bright(look[key]) for key in ("ground", "ink")] for scheme, (look, _) in looks.items()}
    assert brightness["light"][0] > 200 > 100 > brightness["light"][1]
    assert brightness["dark"][0] < 60 < 200 < brightness["dark"][1]


def _looks(dom: str) -> list[dict]:
    import json

    (text,) = re.findall(r"<body>(\[.*\])</body>", dom)
    return json.loads(text)


def _bright(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
