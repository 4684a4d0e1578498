from __future__ import annotations

import json
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mfx
from mfx.cli import main
from mfx.cli.inputs import make_inputs, read_input
from mfx.cli.spec import call_arguments
from tests.mfx.models import Stack

HERE = "tests.mfx.cli.test_cli"
STACK = "tests.mfx.models:Stack"
INSTANCE = nn.Sequential(nn.Linear(8, 8))


class Config:
    """As those of Hugging Face models: made of named values."""

    def __init__(self, depth: int = 2) -> None:
        self.depth = depth


class Configured(Stack):
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config.depth)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 8)
        self.stack = Stack()

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, twice: bool = False) -> Tensor:
        x = self.embedding(ids)
        x = x if mask is None else x * mask[..., None]
        return self.stack(2 * x if twice else x)


class Printing(nn.Module):
    """No one graph: Python branches by the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: Tensor) -> Tensor:
        y = self.stack(x)
        print(end="" if float(y.sum()) else " ")
        return y


def fails() -> nn.Module:
    raise ZeroDivisionError("of the model's own making")


def number() -> int:
    return 3


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["explain", *words, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)


def error_of(capsys: pytest.CaptureFixture[str], *words: str, status: int = 1) -> str:
    """Return the message of a failing command, on standard error only."""
    try:
        found = main(words)
    except SystemExit as leaving:  # argparse's way
        found = leaving.code
    captured = capsys.readouterr()
    assert found == status
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def test_explain_prints_what_the_library_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", STACK]) == 0
    assert capsys.readouterr().out == f"{mfx.explain(mfx.momentumize(Stack()))}\n"


def test_arguments_and_options_reach_the_model_and_the_rewriting(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, STACK, "--args", "5", "--kwargs", "width=4", "--gamma", "1/4", "--arithmetic", "float",
                      "--input", "2,4")  # fmt: skip
    (chain,) = found["chains"]
    assert (len(chain["steps"]), chain["gamma"], chain["arithmetic"]) == (10, 0.25, "float")
    assert chain["storage"]["shape"] == [2, 4]


def test_gamma_by_chain(capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, STACK, "--gamma", "block*=0.5")
    assert [chain["gamma"] for chain in found["chains"]] == [0.5]
    found = explained(capsys, STACK, "--gamma", "0.25")
    assert [chain["gamma"] for chain in found["chains"]] == [0.25]
    found = explained(capsys, STACK, "--gamma", "*=0.25")
    assert [chain["gamma"] for chain in found["chains"]] == [0.25]


def test_gamma_with_signs_and_by_the_number_of_updates(capsys: pytest.CaptureFixture[str]) -> None:
    (chain,) = explained(capsys, STACK, "--gamma", "+-1/4")["chains"]
    assert (chain["gamma"], len(chain["spread"])) == (0.25, len(chain["steps"]))
    for updates, gamma in ((10, 0.0), (12, 0.9)):
        for words in ("auto", "*=auto"):
            (chain,) = explained(capsys, STACK, "--args", str(updates // 2), "--gamma", words)["chains"]
            assert (len(chain["steps"]), chain["gamma"], chain["spread"]) == (updates, gamma, [])


def test_a_configuration_makes_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"depth": 4}')
    for config, steps in (('{"depth": 3}', 6), (str(tmp_path / "config.json"), 8)):
        found = explained(capsys, f"{HERE}:Configured", "--config", config)
        assert [len(chain["steps"]) for chain in found["chains"]] == [steps]


def test_integer_named_and_plain_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--input", "ids=int64%100:2,5", "--input", "mask=2,5", "--input", "twice:=True"]
    found = explained(capsys, f"{HERE}:Tokens", *words)
    assert found["chains"][0]["storage"]["shape"] == [2, 5, 8]


def test_inputs_are_the_same_every_time_and_in_their_range() -> None:
    given = [read_input(text) for text in ("int32%7:50", "3x2", "bool:4", "float64:")]
    assert read_input("3x2") == read_input("3,2")
    (first, *rest), named = make_inputs(given, "cpu")
    assert named == {}
    assert first.dtype == torch.int32
    assert set(first.tolist()) == set(range(7))
    assert [(tuple(x.shape), x.dtype) for x in rest] == [
        ((3, 2), torch.float32),
        ((4,), torch.bool),
        ((), torch.float64),
    ]
    again, _ = make_inputs(given, "cpu")
    assert all(torch.equal(x, y) for x, y in zip((first, *rest), again, strict=True))
    on_meta, _ = make_inputs(given, "meta")
    assert [x.device.type for x in on_meta] == ["meta"] * 4


@pytest.mark.parametrize(
    "text", ["", "8,,3", "8x", "8x3,4", "x", "int64%0:3", "float32%3:2", "flot32:3", "a b=3", "x:=what", ":"]
)
def test_what_is_no_input(text: str) -> None:
    with pytest.raises(ValueError, match=r"input|literal|%BELOW"):
        read_input(text)


@pytest.mark.parametrize("text", ["f(x)", "*[1]", "**{}", "1)(2", "a=b", "__import__('os')"])
def test_arguments_are_literals_only(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be read as Python literals"):
        call_arguments(text)


def test_modules_here_are_found_and_a_module_that_is_there_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_alone.py").write_text(
        "from tests.mfx.models import Stack\nbuild = lambda depth=2: Stack(depth)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert len(explained(capsys, "mine_alone:build")["chains"][0]["steps"]) == 4
    assert explained(capsys, f"{HERE}:INSTANCE")["chains"] == []


def test_a_model_without_chains_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{HERE}:plain"]) == 0
    captured = capsys.readouterr()
    assert "no chain of residual steps" in captured.out
    assert captured.err.startswith("mfx: warning: Sequential has no chain of residual adds")


def test_a_model_that_is_no_one_graph_is_shown_in_parts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "net.svg"
    assert main(["draw", f"{HERE}:Printing", "--input", "2,8", "-o", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{file}\n"
    assert "these chains were found" in captured.err
    texts = ["".join(text.itertext()) for text in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]
    assert "stack.blocks" in texts


def test_profile(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", STACK, "--input", "2,8", "--repeats", "1", "--against", "plain, momentum"]
    assert main([*words, "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["plain", "momentum"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "tests.mfx.models.Stack"], "Did you mean tests.mfx.models:Stack?"),
        (["explain", "Stack"], "'Stack' is not a package.module:callable. Did you mean torchvision.models:resnet18?"),
        (["explain", "tests.mfx.models:Stakc"], "there is no 'Stakc' in tests.mfx.models; there is Stack"),
        (
            ["explain", "tests.mfx.modles:Stack"],
            "there is no module 'tests.mfx.modles'; there is tests.mfx.modules, tests.mfx.models",
        ),
        (["explain", "resnet_50"], "Did you mean torchvision.models:resnet50?"),
        (
            ["explain", "torchvision:vit_b_16"],
            "there is no 'vit_b_16' in torchvision; there is torchvision.models:vit_b_16",
        ),
        (
            ["explain", "tests.mfx.models.deep:Stack"],
            "no module 'tests.mfx.models.deep': tests.mfx.models is a module,",
        ),
        (["explain", "tests.mfx.models:Stack.feed"], "there is no 'feed' in tests.mfx.models:Stack"),
        (
            ["explain", STACK, "--kwargs", "dept=3"],
            "got an unexpected keyword argument 'dept'. It takes (depth: 'int' =",
        ),
        (["explain", STACK, "--config", "{}"], "has none. Use --kwargs."),
        (
            ["explain", f"{HERE}:Configured", "--config", '{"dept": 3}'],
            "the configuration Config takes other arguments",
        ),
        (["explain", f"{HERE}:fails"], "fails failed: ZeroDivisionError: of the model's own making"),
        (["explain", f"{HERE}:number"], "number made a int, not a torch.nn.Module."),
        (["explain", f"{HERE}:HERE"], "HERE is a str; a SPEC names what is called for a model"),
        (["explain", STACK, "--gamma", "1.5"], "gamma must be a real number with 0 <= gamma < 1, not 1.5"),
        (["explain", STACK, "--gamma", "layer=0.5"], "gamma: no chain is called 'layer'. Chains: blocks."),
        (["explain", STACK, "--device", "gpu"], "--device gpu: "),
        (["draw", STACK, "-o", "net.gif"], "draw writes .svg, .png and .pdf files; call the file net.svg"),
        (["profile", STACK, "--input", "2,9"], "the model failed: RuntimeError: "),
        (["profile", STACK, "--input", "2,8", "--against", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_served(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    said = error_of(capsys, *words)
    assert said.startswith("mfx: error: ")
    assert message in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["explian", STACK], "invalid choice: 'explian'"),
        (["explain"], "the following arguments are required: SPEC"),
        (["explain", STACK, "--gamma", "high"], "--gamma: 'high' is not a number, such as 0.9 or 1/64"),
        (["explain", STACK, "--gamma", "0.1", "--gamma", "0.2"], "--gamma is given twice for all chains"),
        (["explain", STACK, "--gamma", "0.1", "--gamma", "*=0.2"], "--gamma is given twice for all chains"),
        (["explain", STACK, "--gamma", "a=0.1", "--gamma", "a=0.2"], "--gamma is given twice for a"),
        (["explain", STACK, "--gamma", "+-2"], "--gamma: BDIA(magnitude=2.0): the magnitude of gamma is a real"),
        (["explain", STACK, "--input", "8x"], "--input: '8x' is not an input; an input is [NAME=][DTYPE"),
        (["explain", STACK, "--args", "x"], "--args: 'x' cannot be read as Python literals"),
        (["explain", STACK, "--kwargs", "3"], "--kwargs takes arguments by name"),
        (["explain", STACK, "--config", "[1"], "--config: "),
        (["draw", STACK], "the following arguments are required: -o/--output"),
        (["profile", STACK], "profile calls the model: say with what, as in --input 8,3,224,224"),
        (["profile", STACK, "--input", "2,8", "--device", "meta"], "profile computes, which needs values"),
        (["profile", STACK, "--input", "2,8", "--repeats", "0"], "--repeats 0: at least 1"),
    ],
)
def test_words_that_cannot_be_read(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    said = error_of(capsys, *words, status=2)
    assert said.startswith("usage: mfx")
    assert message in said


def test_a_traceback_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(mfx.MfxError, match="of the model's own making"):
        main(["explain", f"{HERE}:fails", "--traceback"])


def test_help_shows_examples_that_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    from mfx.cli.parser import make_parser

    for words in ([], ["explain"], ["profile"], ["draw"], ["plan"], ["report"]):
        with pytest.raises(SystemExit) as leaving:
            main([*words, "--help"])
        assert leaving.value.code == 0
        said = capsys.readouterr().out
        assert "examples:" in said
        assert max(map(len, said.splitlines())) <= 120
    import shlex

    examples = said.split("examples:")[1].split("exit status")[0].replace("\n      ", " ").strip().splitlines()
    for example in examples:
        program, *words = shlex.split(example)
        assert program == "mfx"
        assert ":" in make_parser().parse_args(words).spec
    assert len(examples) == 6


def test_warnings_of_others_are_not_shown_and_filters_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(warnings.filters)
    assert main(["explain", f"{HERE}:plain"]) == 0
    assert warnings.filters == before
    assert capsys.readouterr().err.count("warning") == 1


def test_the_module_can_be_run() -> None:
    """In a process of its own: exit status, version, and a reader that does not wait for the end."""
    words = [sys.executable, "-m", "mfx"]
    done = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mfx ")
    assert f"torch {torch.__version__}" in done.stdout


def test_plan(capsys, tmp_path, monkeypatch):
    words = ["plan", STACK, "--kwargs", "depth=2", "--device", "meta", "--input", "64,8", "--gpu-memory", "1MiB"]
    assert main([*words, "--gamma", "0.5", "--world-size", "2", "--fsdp", "--chip", "A100"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Stack on 2 × A100 of 1.0 MiB: ")
    assert "gamma=0.5" in printed
    picture = tmp_path / "plan.png"
    assert main([*words, "--json", "-o", str(picture), "--optimizer-bytes", "0", "--sequence-dim", "1"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["batch"], data["sequence"], data["state"]["optimizer"]) == (64, 8, 0)
    assert picture.stat().st_size > 0
    monkeypatch.setattr(mfx, "plan", None)  # the file's name is looked at first
    for command in ("plan", "profile"):
        assert main([command, STACK, "--input", "64,8", "-o", "steps.txt"]) == 1
        assert f"mfx {command} saves .png, .svg and .pdf files; call the file steps.png" in capsys.readouterr().err
    for more, message in (
        (
            ["--memory-budget", "0.5"],
            "plan compares ways to train; of the options it takes --gamma, not --memory-budget",
        ),
        (["--input", "x=2,8"], "plan takes inputs by position or by name, not both"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert message in capsys.readouterr().err
