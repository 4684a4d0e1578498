"""The README and the guide: their Python code runs, their links lead somewhere, and the README stays short."""

import importlib
import re

import pytest
import torch
from torch import distributed, nn

import mfx
from tests.pages import CHAPTERS, PAGES, README, ROOT, anchors, blocks, name_of

SAID = {  # among what the blocks of a page print
    "README.md": ("ResNet: 29 of 33 residual steps in 4 chains",),
    "examples/guide/any_model.md": ("ResNet: 2 of 8 residual steps in 1 chain", "self.momentum_layer1("),
}


@pytest.fixture
def process_group():
    """One process, for what a page does after ``init_process_group``."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # trainers warn about their own surroundings: few workers, no logger
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_python_blocks_run(page, capsys, tmp_path, monkeypatch, process_group):
    code = blocks(page, "python")
    for library in set(re.findall(r"^(?:from|import) (.*)", "\n".join(code), re.MULTILINE)):
        for name in re.split(r" import .*|, ", library):
            if name:
                pytest.importorskip(name.partition(".")[0])
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(code):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert all(words in printed for words in SAID.get(name_of(page), ()))


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 160


def test_what_the_first_block_prints_stands_below_it(capsys):
    pytest.importorskip("torchvision")
    exec(blocks(README, "python")[0], {})
    for line in capsys.readouterr().out.splitlines():
        assert f"\n    {line}\n" in README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        target, _, anchor = next(filter(None, link)).partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_chapter_is_in_the_readme_or_in_the_index():
    text = README.read_text(encoding="utf-8") + (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in CHAPTERS if f"guide/{page.name})" not in text] == []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.fc(x)


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.blocks(x)


def as_shown(code):
    """Code of a graph as the guide prints it: without what frees memory, calls of modules within the sums."""
    code = re.sub(r";  [\w = ]+ = None", "", code.strip()).replace("'", '"')
    code = re.sub(r'getattr\(self\.blocks, "(\d)"\)', r"self.blocks[\1]", code)
    for name, call in re.findall(r"    (\w+_fc) = (.*)\n", code):
        code = code.replace(f"    {name} = {call}\n", "").replace(name, call)
    return code


def test_the_graph_before_and_after():
    (block,) = [block for page in CHAPTERS for block in blocks(page, "python") if "# before" in block]
    before, after = (re.sub(r" +#.*", "", part).strip() for part in block.split("\n\n"))
    assert as_shown(mfx.trace(TwoBlocks()).code) == before
    assert as_shown(mfx.momentumize(TwoBlocks()).code) == after


def test_every_figure_is_drawn_by_its_script(tmp_path):
    pytest.importorskip("tqdm")
    shown = {file for page in PAGES for file in re.findall(r"figures/(\w+)\.svg", page.read_text(encoding="utf-8"))}
    assert shown == {file.stem for file in (ROOT / "examples" / "figures").glob("*.svg")}
    for name in shown:
        script = importlib.import_module(f"examples.figures.{name}")
        torch.manual_seed(0)
        assert script.main(["--svg", str(tmp_path / "a.svg")]).read_text(encoding="utf-8") == script.FILE.read_text(
            encoding="utf-8"
        )
