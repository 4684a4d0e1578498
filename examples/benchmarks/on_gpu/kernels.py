"""Triton's kernels against torch's operations on a device: the cases of the tests, drawn here."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from examples.benchmarks.on_gpu.jobs import Job, Setting
from mfx.options.gamma import Gamma

ROOT = Path(__file__).parents[3]
TESTS = "tests/mfx/engine/arithmetic/kernels"
Choice = dict[str, Any]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def kernels_by(name: str) -> Any:
    """Set MFX_KERNELS."""
    before = os.environ.get("MFX_KERNELS")
    os.environ["MFX_KERNELS"] = name
    try:
        yield
    finally:
        os.environ.pop("MFX_KERNELS")
        if before is not None:
            os.environ["MFX_KERNELS"] = before


def refusal(device: torch.device) -> str | None:
    """Return why Triton does not serve a device; None if it does."""
    from mfx.engine.arithmetic import ExactState
    from mfx.engine.arithmetic.choice import choose

    try:
        with kernels_by("triton"):
            choose(ExactState, torch.zeros(1, device=device))
    except Exception as error:  # its compiler's may be of any kind
        return str(error).splitlines()[0].removeprefix("MFX_KERNELS=triton: ").partition(", if ")[0][:200]
    return None


# --- choices ----------------------------------------------------------------------------------------------------------


def _gamma(draw: random.Random) -> Gamma:
    from tests.mfx.engine.arithmetic.kernels.states import SOME_GAMMAS

    d = draw.randint(2, 2**14)
    return draw.choice([*SOME_GAMMAS, Gamma(draw.randint(1, d - 1), d)])


def _common(draw: random.Random, sizes: tuple[int, ...]) -> Choice:
    return {
        "gamma": _gamma(draw),
        "kind": draw.choice(["residual", "map"]),
        "size": draw.choice(sizes),
        "seed": draw.randint(0, 2**31),
    }


def one_step(draw: random.Random, dtype: torch.dtype, sizes: tuple[int, ...]) -> Choice:
    """One exact step from the middle of a chain, there and back."""
    how = draw.choice(["random", "extreme", "half way"])
    return {**_common(draw, sizes), "dtype": dtype, "how": how, "bits": draw.randint(0, 50)}


def exact_chain(draw: random.Random, dtype: torch.dtype, sizes: tuple[int, ...]) -> Choice:
    """A chain of exact steps there and back, with values that are too large or no numbers."""
    scale = draw.choice([1e-6, 1.0, 3e3, 1e6])
    there = {"depth": draw.randint(1, 14), "scale": scale, "bad": draw.random() < 0.5, "given_v": draw.random() < 0.5}
    return {**_common(draw, sizes), "dtype": dtype, **there}


def float_chain(draw: random.Random, dtype: torch.dtype, sizes: tuple[int, ...]) -> Choice:
    """A chain of float steps there and back; small γ amplifies what roundings differ by."""
    there = {"depth": draw.randint(1, 6), "bad": draw.random() < 0.5, "given_v": draw.random() < 0.5}
    gamma = draw.choice([Gamma(9, 10), Gamma(1, 2), Gamma(99, 100), Gamma(3, 4), Gamma(1, 3), Gamma(8191, 8192)])
    return {**_common(draw, sizes), "dtype": dtype, **there, "gamma": gamma}


def gradients(draw: random.Random, dtype: torch.dtype, sizes: tuple[int, ...]) -> Choice:
    """The backward pass of an update."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    values = [other for other in _DTYPES if torch.promote_types(other, dtype) is dtype]
    types = (dtype, draw.choice([wide, wide, dtype, torch.bfloat16]), draw.choice(values)), wide
    flags = {name: draw.random() < 0.5 for name in ("follows", "needs_v", "all_bits")}
    later = draw.choice([_gamma(draw), Gamma(1, 1)])
    return {**_common(draw, sizes), "types": types, "later": later, "which": draw.choice(["x", "v", "both"]), **flags}


CASES: Mapping[str, Callable[[random.Random, torch.dtype, tuple[int, ...]], Choice]] = {
    "one_step": one_step,
    "exact_chain": exact_chain,
    "float_chain": float_chain,
    "gradients": gradients,
}


# --- jobs -------------------------------------------------------------------------------------------------------------


def check(found: dict[str, Any], setting: Setting, name: str, dtype: torch.dtype) -> None:
    """Draw choices for one of the cases until its time is over; what fails first is raised."""
    reason = refusal(setting.where)
    if reason is not None:
        found["left out"] = reason
        return
    from tests.mfx.engine.arithmetic.kernels import cases

    draw, end = random.Random(f"{name} {dtype}"), time.monotonic() + (1 if setting.tiny else 12)
    sizes = (1, 7, 33) if setting.tiny else (1, 7, 1023, 1024, 1025, 100_003)
    found["draws"] = 0
    while found["draws"] < (2 if setting.tiny else 60) and time.monotonic() < end:
        choice = CASES[name](draw, dtype, sizes)
        try:
            getattr(cases, name)(setting.device, **choice)
        except AssertionError as error:
            said = str(error).strip().splitlines()
            raise AssertionError(f"kernels and operations differ for {choice} {said[0] if said else ''}") from None
        found["draws"] += 1
    found["right"] = True


def by_pytest(found: dict[str, Any], setting: Setting) -> None:
    """Run all tests of the kernels, where pytest and hypothesis are installed."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing or setting.device == "cpu":
        found["left out"] = f"no {', '.join(missing)}" if missing else "the tests themselves run them on a CPU"
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}", TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    found["right"] = done.returncode == 0
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    found["said"] = lines[-1] if lines else done.stderr[-300:]
    if done.returncode:
        raise AssertionError("; ".join(line for line in lines if line.startswith(("FAILED", "ERROR")))[:2000])


def jobs(setting: Setting) -> list[Job]:
    """The checks, by importance."""
    dtypes = _DTYPES[:2] if setting.tiny else _DTYPES

    def job(name: str, dtype: torch.dtype) -> Job:
        label = f"{name.replace('_', ' ')}, {str(dtype).removeprefix('torch.')}"
        return Job("kernels", label, lambda found: check(found, setting, name, dtype), 60)

    return [job(name, dtype) for dtype in dtypes for name in CASES]
