"""The README's Python code runs, block after block, and its table of refusals is complete."""

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    "words",
    [
        "both sides of the sum are computed",
        "single residual step",
        "scaled or subtracted",
        "rearranged on its way and not put back",
        "changes in place a value it is given from outside",
        "changed in place later",
        "lives on outside of the model's forward",
        "narrows the result",
        "shape, dtype or device",
        "broadcast",
        "not floating point",
        "partly inside a step of another chain",
        "left out by `only`/`skip`",
    ],
)
def test_every_reason_to_refuse_is_in_the_table(words):
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    assert any(words in row for row in rows)
