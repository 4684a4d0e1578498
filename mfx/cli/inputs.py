"""Inputs as words of a command line: ``8x3x224x224``, ``input_ids=int64%30522:2,128``, ``use_cache:=False``."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

import torch

from mfx_passes import MfxError

_DTYPES = {
    **{name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "complex64")},
    **{name: getattr(torch, name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")},
}
_TENSOR = re.compile(r"(?:(?P<dtype>[a-z]\w*)(?:%(?P<below>\d+))?:)?(?P<shape>\d+(?:,\d+)*,?|\d+(?:x\d+)+)?")
_NAMED = re.compile(r"(?P<name>[A-Za-z_]\w*)(?P<how>:?=)(?P<rest>.*)", re.DOTALL)
_BELOW = 2


@dataclass(frozen=True)
class Input:
    """One input: a tensor to draw, or a plain value.

    Args:
        name: name of the argument; None for the next positional one.
        shape: shape of the tensor; None for a plain value.
        dtype: dtype of the tensor. Floating-point values are drawn from the standard normal distribution, integers from
            0 to ``below`` - 1.
        below: upper bound of integers.
        value: the plain value.
    """

    name: str | None
    shape: tuple[int, ...] | None
    dtype: torch.dtype = torch.float32
    below: int = _BELOW
    value: Any = None


def read_input(text: str) -> Input:
    """Read one input.

    >>> read_input("8,3,224,224").shape, read_input("x=bfloat16:8x3x224x224").shape
    ((8, 3, 224, 224), (8, 3, 224, 224))
    >>> ids = read_input("input_ids=int64%100:2,16")
    >>> ids.name, ids.shape, ids.dtype, ids.below
    ('input_ids', (2, 16), torch.int64, 100)
    >>> read_input("use_cache:=False")
    Input(name='use_cache', shape=None, dtype=torch.float32, below=2, value=False)

    Raises:
        ValueError: it cannot be read; the message says why.
    """
    named = _NAMED.fullmatch(text)
    name, how, rest = (named["name"], named["how"], named["rest"]) if named else (None, "=", text)
    if how == ":=":
        try:
            return Input(name, None, value=ast.literal_eval(rest))
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{rest!r} is not a Python literal (True, None, 3, 'word', [1, 2])") from error
    found = _TENSOR.fullmatch(rest)
    if found is None or not (found["dtype"] or found["shape"]):
        raise ValueError(f"{text!r} is not an input; an input is [NAME=][DTYPE[%BELOW]:]SIZE,SIZE,… or NAME:=LITERAL")
    if found["dtype"] is not None and found["dtype"] not in _DTYPES:
        raise ValueError(f"{found['dtype']!r} is not a dtype for an input; there is {', '.join(_DTYPES)}")
    dtype = _DTYPES[found["dtype"] or "float32"]
    below = int(found["below"] or _BELOW)
    if found["below"] and (dtype.is_floating_point or dtype.is_complex or below < 1):
        raise ValueError(f"{text!r}: %BELOW goes with integers, and is at least 1")
    shape = tuple(int(size) for size in (found["shape"] or "").replace("x", ",").split(",") if size)
    return Input(name, shape, dtype, below)


def make_inputs(inputs: list[Input], device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make inputs, with the same values in every run; return positional arguments and arguments by name."""
    generator = torch.Generator().manual_seed(0)
    args, kwargs = [], {}
    for given in inputs:
        value = given.value if given.shape is None else _draw(given, device, generator)
        if given.name is None:
            args.append(value)
        else:
            kwargs[given.name] = value
    return tuple(args), kwargs


def _draw(given: Input, device: str, generator: torch.Generator) -> torch.Tensor:
    assert given.shape is not None
    try:
        if torch.device(device).type == "meta":
            return torch.empty(given.shape, dtype=given.dtype, device=device)
        if given.dtype.is_floating_point or given.dtype.is_complex:
            return torch.randn(given.shape, generator=generator, dtype=given.dtype).to(device)
        return torch.randint(given.below, given.shape, generator=generator).to(device, given.dtype)
    except (RuntimeError, AssertionError) as error:
        raise MfxError(f"an input of shape {given.shape} cannot be made on {device}: {error}") from error
