"""What each command does."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import mfx
from mfx.capture import CaptureError
from mfx.command_line.inputs import made
from mfx.command_line.spec import build
from mfx.net import forward_of

__all__ = ["COMMANDS", "UsageError", "run"]

_OPTIONS = ("arithmetic", "memory_budget", "recompute", "velocity", "min_steps", "only", "skip", "capture")


class UsageError(Exception):
    """What stands on the command line does not go together."""


@dataclass(frozen=True)
class Subject:
    """The model, the arguments of a call, and how it is to be rewritten."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]

    def rewritten(self) -> nn.Module:
        """The momentumized net; one that is no one graph was called, so that it is known what it consists of."""
        net = mfx.momentumize(self.model, **self.options)
        if (self.args or self.kwargs) and (forward := forward_of(net)) is not None:
            try:
                forward.entry_for(*self.args, **self.kwargs)
            except CaptureError:
                with torch.no_grad():
                    net(*self.args, **self.kwargs)
        return net

    def inputs_of(self, net: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """What to look at a net with: not a net in parts, which has its graphs already."""
        forward = forward_of(net)
        return ((), {}) if forward is not None and forward.in_parts else (self.args, self.kwargs)


def run(words: Namespace) -> None:
    """Do what the command line says.

    Raises:
        MfxError: the model or the request cannot be served.
        UsageError: the words do not go together.
    """
    COMMANDS[words.command](words)


def _subject(words: Namespace) -> Subject:
    args, more = words.args
    first, kwargs = words.kwargs
    if first:
        raise UsageError("--kwargs takes arguments by name, as in 'depth=18'; --args takes the others")
    model = build(words.spec, args, {**more, **kwargs}, words.config, words.device)
    if words.mode is not None:
        model.train(words.mode == "train")
    return Subject(model, *made(words.inputs, words.device), _options(words))


def _options(words: Namespace) -> dict[str, Any]:
    given = {name: value for name in _OPTIONS if (value := getattr(words, name)) is not None}
    if words.gamma is None:
        return given
    unnamed = [gamma for chain, gamma in words.gamma if chain is None]
    named = {chain: gamma for chain, gamma in words.gamma if chain is not None}
    if len(unnamed) > 1:
        raise UsageError("--gamma is given twice for all chains")
    if not named:
        return {**given, "gamma": unnamed[0]}
    return {**given, "gamma": {**named, "*": unnamed[0] if unnamed else 0.9}}


def _explain(words: Namespace) -> None:
    subject = _subject(words)
    net = subject.rewritten()
    args, kwargs = subject.inputs_of(net)
    explanation = mfx.explain(net, *args, **kwargs)
    print(json.dumps(explanation.to_dict(), indent=2) if words.json else explanation)


def _profile(words: Namespace) -> None:
    _check_measuring(words)
    if words.device == "meta":
        raise UsageError("profile computes, which needs values: --device cpu or cuda, not meta")
    subject = _subject(words)
    profile = mfx.profile(
        subject.model,
        *subject.args,
        against=words.against,
        options=subject.options,
        repeats=words.repeats,
        **subject.kwargs,
    )
    if words.output is not None:
        profile.plot(words.output)
    print(json.dumps(profile.to_dict(), indent=2) if words.json else profile)


def _draw(words: Namespace) -> None:
    subject = _subject(words)
    net = subject.rewritten()
    args, kwargs = subject.inputs_of(net)
    mfx.draw(net, words.output, *args, **kwargs)
    print(words.output)


def _check_measuring(words: Namespace) -> None:
    if not words.inputs:
        raise UsageError(f"{words.command} calls the model: say with what, as in --input 8,3,224,224")
    if words.repeats < 1:
        raise UsageError(f"--repeats {words.repeats}: at least 1")


COMMANDS: Mapping[str, Callable[[Namespace], None]] = {"explain": _explain, "profile": _profile, "draw": _draw}
