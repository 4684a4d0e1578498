"""The commands of README and guide: those of mfx run, at smaller sizes; examples take the arguments shown."""

import argparse
import importlib
import re
import shlex

import pytest

from mfx.cli import main
from tests.pages import PAGES, ROOT, blocks

TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
SHELL = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line]
MFX = [line for line in SHELL if line.startswith("mfx ")]
EXAMPLES = sorted(set(re.findall(r"python (examples/[^\s`&]+\.py[^`&\n]*)", TEXT)))

SMALLER = {
    "resnet101": "resnet18",
    "resnet50": "resnet18",
    "vit_b_16": "resnet18",
    "vit_l_16": "resnet18",
    "8,3,224,224": "2,3,32,32",
    "8,3,64,64": "2,3,32,32",
    "32,3,224,224": "2,3,32,32",
    "24GiB": "230MB",
    "x3x224x224": "x3x32x32",
    '"num_hidden_layers": 4': '"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 1000, '
    '"intermediate_size": 16',
    ":2,64": ":1,8",
}
WRITES = {"draw": "<svg", "report": "<!doctype html>"}


@pytest.mark.parametrize("line", MFX)
def test_the_commands_of_mfx(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for large, small in SMALLER.items():
        line = line.replace(large, small)
    _, command, spec, *rest = shlex.split(line, comments=True)
    pytest.importorskip(spec.partition(".")[0].partition(":")[0])
    assert main([command, spec, *rest]) == 0
    assert capsys.readouterr().out
    for file in tmp_path.iterdir():
        assert file.read_text(encoding="utf-8").lower().startswith(WRITES[command])
    assert len(list(tmp_path.iterdir())) == (command in WRITES)


def test_each_command_of_mfx_is_shown():
    assert {line.split()[1] for line in MFX} == {"explain", "profile", "draw", "plan", "report"}


class HasRead(Exception):  # noqa: N818
    """The command line has been read; no more is wanted."""


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_take_their_arguments(line, monkeypatch):
    path, *arguments = shlex.split(line)
    assert (ROOT / path).is_file()
    try:
        example = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    except ImportError as error:
        pytest.skip(str(error))
    read = argparse.ArgumentParser.parse_args

    def read_only(parser, *given):
        read(parser, *given)
        raise HasRead

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", read_only)
    with pytest.raises(HasRead):
        example.main(arguments)
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        example.main(["--no-such-option"])


def test_every_script_that_is_named_is_there():
    named = re.findall(r"examples/[\w/]+\.\w+", TEXT)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_extra_that_is_named_is_there():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {name for names in re.findall(r"(?:\.|mfx)\[([\w,]+)\]", TEXT) for name in names.split(",")}
    assert {"test", "examples"} <= named <= {*extras}
