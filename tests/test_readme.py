"""The README's Python code runs, block after block, and its table of refusals is complete."""

import re
from pathlib import Path

import pytest
from torch import nn

import mfx
from mfx_passes.ir.refusals import table

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run(capsys):
    pytest.importorskip("torchvision")
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "ResNet: 4 chains of 29 steps" in printed
    assert printed.count("self.momentum_layer") == 4


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
    """Code of a graph as the README prints it: without what frees memory, calls of modules within the sums."""
    code = re.sub(r";  [\w = ]+ = None", "", code.strip()).replace("'", '"')
    code = re.sub(r'getattr\(self\.blocks, "(\d)"\)', r"self.blocks[\1]", code)
    for name, call in re.findall(r"    (\w+_fc) = (.*)\n", code):
        code = code.replace(f"    {name} = {call}\n", "").replace(name, call)
    return code


def test_the_graph_before_and_after():
    (block,) = [block for block in BLOCKS if "# before" in block]
    before, after = (re.sub(r" +#.*", "", part).strip() for part in block.split("\n\n"))
    assert as_shown(mfx.trace(TwoBlocks()).code) == before
    assert as_shown(mfx.momentumize(TwoBlocks()).code) == after


def test_the_table_of_refusals_is_printed_from_the_enum():
    assert "\n\n" + "\n".join(table()) + "\n\n" in README
