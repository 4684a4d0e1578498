"""Measures training steps of a model in several variants side by side."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointError

from mfx.modules.random_state import undisturbed
from mfx.net.views import backend_options, written
from mfx.progress import waiting_for
from mfx.reports.profile.result import Profile
from mfx.reports.profile.rows import ProfileRow
from mfx.reports.profile.step import TrainingStep, parameters_of
from mfx.reports.profile.untouched import check_values, free_gradients, restored
from mfx.reports.profile.variants import Against, Variant, variants_of
from mfx.text import described
from mfx_passes import MfxError

T = TypeVar("T")


def profile(
    model: nn.Module,
    *args: Any,
    against: Against = ("plain", "checkpoint", "momentum"),
    loss: Callable[[Any], Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    repeats: int = 3,
    progress: bool | None = None,
    **kwargs: Any,
) -> Profile:
    """Measure a training step of a model in several ways: activations kept, their peak, time and work.

    The steps are made on copies that share the parameters' values, in training mode; a model that is in training mode
    keeps parts of it that are not. Model, gradients, buffers and random generators are afterwards what they were.
    Activations are counted: see `mfx.ActivationMeter`. The gradients of a step are freed at its end.

    Args:
        model: any module, on one device, a CPU or a GPU (CUDA); a momentumized net, too. Of what ``torch.compile``
            returned, the model inside is measured, not compiled; with ``backend="mfx"``, with the backend's options.
        *args: inputs, as for a call of the model.
        against: the variants, in the order of the table, whose ratios are to the first. ``"plain"``: the model, before
            it was momentumized. ``"checkpoint"``: the model with ``torch.utils.checkpoint`` around its blocks, the
            smallest modules with whole steps of a chain in them, and what else mfx runs again (`Profile.wrapped` lists
            them); left out with a reason if it does not run. ``"momentum"``: the model momentumized. A mapping gives
            variants names of your own, and is from these to one of the three, to options of `mfx.momentumize`, or to a
            module or function that is called as the model is, as it is.
        loss: from the model's output to a scalar. By default the output's ``.loss``, else the sum of all floating-point
            tensors in it.
        options: options of `mfx.momentumize`, for ``"momentum"``; a momentumized net keeps its own if there are none.
        repeats: number of timed steps; the variants take turns.
        progress: True to show a progress bar, for which tqdm must be installed; by default, on a terminal.
        **kwargs: inputs by name.

    Raises:
        MfxError: there is no such variant, the model cannot be captured, there is nothing to differentiate, or bytes
            cannot be counted where the model is.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"profile takes a torch.nn.Module, not {described(model)}.")
    if options is None:
        options = backend_options(model)
    model = written(model)
    if not isinstance(repeats, int) or repeats < 1:
        raise MfxError(f"repeats={repeats!r}: the number of steps to take the time of is an integer of at least 1.")
    check_values(model)
    device = _device_of(model, args, kwargs)
    step = TrainingStep(args, kwargs, loss, device)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(undisturbed(model))
        stack.enter_context(restored([model, *_modules_in(against), *_modules_in((options or {}).get("velocity"))]))
        variants = variants_of(model, args, kwargs, against, options)
        stack.enter_context(restored(net for variant in variants if (net := variant.net) is not None))
        rows, skipped = _measure(variants, step, [model], repeats, progress)
    wrapped = tuple(dict.fromkeys(path for variant in variants for path in variant.wrapped or ()))
    return Profile(type(model).__name__, str(device), repeats, rows, wrapped, skipped)


def _measure(
    variants: Sequence[Variant], step: TrainingStep, models: Sequence[nn.Module], repeats: int, progress: bool | None
) -> tuple[tuple[ProfileRow, ...], tuple[tuple[str, str], ...]]:
    """Return the rows, and the variants that did not run, each with the reason."""
    rows: dict[str, ProfileRow] = {}
    skipped: list[tuple[str, str]] = []
    for variant in _with_progress(variants, "measuring training steps", progress):
        modules = _trained(models, variant)
        try:
            _from_same_state(variant, modules, step.run)  # the work of the first call, done once, is not part of a step
        except Exception as error:
            if variant.wrapped is None:
                raise
            skipped.append((variant.name, _why(error)))
            continue
        measured = partial(step.measured, parameters=parameters_of(modules[-1:]))
        rows[variant.name] = _from_same_state(variant, modules, measured)
    if not rows:
        raise MfxError("; ".join(f"{name}: {reason}" for name, reason in skipped))
    ran = [variant for variant in variants if variant.name in rows]
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in _with_progress(range(repeats), "timing training steps", progress):
        for variant in ran:  # in turns, so that a change of the machine's speed hits all
            times[variant.name].append(_from_same_state(variant, _trained(models, variant), step.seconds))
    return tuple(replace(row, seconds=statistics.median(times[row.name])) for row in rows.values()), tuple(skipped)


def _trained(models: Sequence[nn.Module], variant: Variant) -> list[nn.Module]:
    return [*models, *([] if variant.net is None else [variant.net])]


def _from_same_state(variant: Variant, modules: Sequence[nn.Module], run: Callable[[Variant], T]) -> T:
    """Run a step with the same random numbers as every other step, and without gradients before and afterwards."""
    try:
        with undisturbed(variant.net if variant.net is not None else nn.Module()):
            return run(variant)
    finally:
        free_gradients(modules)


def _why(error: Exception) -> str:
    first = str(error).strip().split("\n")[0]
    hint = " Does the model fill a cache (use_cache=True), which a second run would find full?"
    return f"{type(error).__name__}: {first}{hint if isinstance(error, CheckpointError) else ''}"


def _device_of(model: nn.Module, args: Any, kwargs: Any) -> torch.device:
    """Return the model's device; without parameters, the inputs' device.

    Raises:
        MfxError: bytes cannot be counted there, or the model is on several devices.
    """
    inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = list(dict.fromkeys(tensor.device for tensor in parameters_of([model]) or inputs))
    if len(devices) > 1:
        raise MfxError(
            f"this {type(model).__name__} is on {', '.join(map(str, devices))}; profile counts bytes on one device. "
            "Move the model to one."
        )
    device = devices[0] if devices else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise MfxError(f"profile counts bytes on CPU and CUDA devices, not on {device}. Move model and inputs there.")
    return device


def _modules_in(value: Any) -> list[nn.Module]:
    """Return the modules in a user's argument."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, nn.Module)]


def _with_progress(items: Sequence[T], what: str, progress: bool | None) -> Iterable[T]:
    """Show a progress bar if wanted, or on a terminal, and possible; else the line of `waiting_for`."""
    if progress is False or (progress is None and os.environ.get("MFX_PROGRESS") == "0"):
        return items
    if progress or (sys.stderr is not None and sys.stderr.isatty()):
        with suppress(ImportError):
            return import_module("tqdm").tqdm(items, desc=f"mfx.profile: {what}", leave=False)  # type: ignore[no-any-return]
    return _spoken_of(items, what)


def _spoken_of(items: Sequence[T], what: str) -> Iterator[T]:
    with waiting_for(f"profile: {what}"):
        yield from items
