"""The parser of the command line: commands, options and help texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import torch

import mfx
from mfx.cli.inputs import read_input
from mfx.cli.spec import call_arguments, read_config

T = TypeVar("T")

_ABOUT = """\
Turns the residual chains of a PyTorch model into momentum chains that train without stored activations, and shows
what that does to a model: `explain` which chains there are, `profile` a training step, `draw` the rewritten graph,
`plan` what fits on a device, or write all of it as one page with `report`.
"""
_EXAMPLES = """\
SPEC is package.module:callable; the callable makes the model. Modules in the current directory are found.

inputs: --input [NAME=][DTYPE[%BELOW]:]SIZE,SIZE,...   a tensor: normal random numbers, float32 by default; integers
                                                       are drawn from 0 to BELOW - 1 (BELOW is 2 by default)
        --input NAME:=LITERAL                          a plain value, as in use_cache:=False
        8x3x224x224 is 8,3,224,224. Several inputs are several --input. Values are the same in every run.

examples:
  mfx explain torchvision.models:resnet101 --input 8,3,224,224
  mfx profile torchvision.models:resnet50 --input 8,3,64,64 --gamma 0.9 --against plain,momentum
  mfx draw torchvision.models:vit_b_16 -o vit.svg
  mfx report transformers:BertModel --config '{"num_hidden_layers": 4}' --input input_ids=int64%1000:2,64 -o bert.html
  mfx explain vit_pytorch:ViT --device meta --input 8,3,224,224 --kwargs 'image_size=224, patch_size=16,
      num_classes=10, dim=8192, depth=64, heads=64, mlp_dim=32768'
  mfx plan torchvision.models:vit_l_16 --device meta --input 32,3,224,224 --gpu-memory 24GiB

exit status: 0 done; 1 the model or the request cannot be served; 2 the command line cannot be read.
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of ``mfx`` and ``python -m mfx``."""
    parser = argparse.ArgumentParser(
        "mfx", description=_ABOUT, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = _adder(commands)

    explain = command("explain", "list chains, what they keep, and the residual adds left alone, with reasons")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.add_argument("-v", "--verbose", action="store_true", help="also sums that only look like residual steps")

    profile = command("profile", "measure memory, time and FLOPs of a training step, beside other ways to train")
    profile.add_argument("--json", action="store_true", help="print JSON")
    profile.add_argument("-o", "--output", metavar="FILE", help="also save the plot (.png, .svg, .pdf; matplotlib)")
    _measuring(profile)

    draw = command("draw", "draw the rewritten graph")
    draw.add_argument("-o", "--output", metavar="FILE", required=True, help="the file: .svg, .png or .pdf (matplotlib)")

    plan = command("plan", "say what fits on a device, by each way to train, and how long a step takes")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("-o", "--output", metavar="FILE", help="also save a picture (.png, .svg, .pdf; matplotlib)")
    _devices(plan.add_argument_group("the devices"))

    report = command("report", "write everything as one HTML page that needs no network")
    report.add_argument("-o", "--output", metavar="FILE", required=True, help="the .html file to write")
    _measuring(report)
    return parser


def _adder(commands: Any) -> Callable[[str, str], argparse.ArgumentParser]:
    def add(name: str, about: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            usage=f"%(prog)s SPEC [options]{'' if name in ('explain', 'profile', 'plan') else ' -o FILE'}",
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("spec", metavar="SPEC", help="package.module:callable, such as torchvision.models:resnet18")
        _model(parser.add_argument_group("the model and its inputs"))
        _options(parser.add_argument_group("how it is rewritten (see mfx.momentumize)"))
        return parser

    return add


def _model(group: Any) -> None:
    arguments = _reading(call_arguments)
    group.add_argument("--args", type=arguments, default=((), {}), metavar="LITERALS", help="arguments: \"3, 'relu'\"")
    group.add_argument(
        "--kwargs", type=arguments, default=((), {}), metavar="LITERALS", help="by name: 'depth=3' or a JSON object"
    )
    group.add_argument(
        "--config",
        type=_reading(read_config),
        metavar="JSON",
        help="for Hugging Face classes: the configuration's values",
    )
    group.add_argument(
        "--input",
        dest="inputs",
        type=_reading(read_input),
        action="append",
        default=[],
        metavar="INPUT",
        help="see below",
    )
    group.add_argument(
        "--device", default="cpu", help="cpu, cuda, ...; meta makes no values (explain, draw, plan, report)"
    )
    group.add_argument("--mode", choices=("train", "eval"), help="training mode; by default as the callable left it")
    group.add_argument("--traceback", action="store_true", help="show where an error comes from")


def _options(group: Any) -> None:
    group.add_argument(
        "--gamma",
        type=_reading(_gamma),
        action="append",
        metavar="[CHAIN=]GAMMA",
        help="momentum, 0 <= GAMMA < 1, as 0.9 or 1/64; +-1/4 for random signs (mfx.BDIA); auto: by the number of "
        "updates; for all chains, or for some by name (default 0.9)",
    )
    group.add_argument("--arithmetic", choices=("exact", "float"))
    group.add_argument("--memory-budget", type=_budget, metavar="BUDGET", help="0 to 1, or bytes such as 24GiB")
    group.add_argument("--recompute", metavar="WHAT", help="all: the budget governs what lies between chains, too")
    group.add_argument("--offload", choices=("cpu",), help="where what chains keep lies, if not on their device")
    group.add_argument("--velocity", choices=("zero", "residual"))
    group.add_argument("--min-steps", type=int, metavar="N")
    group.add_argument("--only", action="append", metavar="NAME", help="rewrite these chains or modules only")
    group.add_argument("--skip", action="append", metavar="NAME", help="leave these chains or modules as they are")
    group.add_argument("--capture", choices=("auto", "symbolic", "dynamo"))


def _devices(group: Any) -> None:
    group.add_argument("--gpu-memory", default="80GiB", metavar="BYTES", help="of each (default 80GiB)")
    group.add_argument("--world-size", type=int, default=1, metavar="N", help="how many there are (default 1)")
    group.add_argument("--fsdp", action="store_true", help="they share parameters, gradients and optimizer state")
    group.add_argument("--chip", default="H100", metavar="NAME", help="whose speed counts (default H100)")
    group.add_argument("--optimizer-bytes", type=float, metavar="N", help="per parameter (default Adam's)")
    group.add_argument("--sequence-dim", type=int, metavar="DIM", help="the dimension of the first input that may grow")


def _measuring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--against",
        type=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
        default=("plain", "checkpoint", "momentum"),
        metavar="WAY,...",
        help="of plain, checkpoint, momentum (default: all)",
    )
    group.add_argument("--repeats", type=int, default=3, metavar="N", help="steps to take the time of (default 3)")


def _reading(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return a type for argparse whose messages say why a word cannot be read."""

    def typed(text: str) -> T:
        try:
            return read(text)
        except (ValueError, mfx.MfxError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return typed


def _gamma(text: str) -> tuple[str | None, float | str | mfx.BDIA]:
    """Read a momentum, with the name or pattern of the chains it is for, or None.

    >>> _gamma("1/64"), _gamma("layer3=+-0.5")
    ((None, 0.015625), ('layer3', BDIA(magnitude=0.5, per='call', dim=0)))
    """
    chain, equals, number = text.rpartition("=")
    name = chain if equals else None
    if number == "auto":
        return name, number
    try:
        value = float(Fraction(number.removeprefix("+-")))
        return name, mfx.BDIA(value) if number.startswith("+-") else value
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{number!r} is not a number, such as 0.9 or 1/64") from error


def _budget(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def version() -> str:
    """Return the versions of mfx and torch."""
    return f"mfx {mfx.__version__}, torch {torch.__version__}"
