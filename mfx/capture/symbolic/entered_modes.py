"""Modes that a model enters while it runs: a symbolic trace records what it computes in them, but not the modes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from mfx import compat

_CLASSES = (torch.autocast, torch.no_grad, torch.enable_grad, torch.set_grad_enabled, torch.inference_mode)
_LOCK = threading.RLock()  # what is patched belongs to all threads


class Modes:
    """Whether what is computed in the course of a trace is computed in a mode of the model's own.

    Whether such a mode makes a difference depends on who calls the model: ``autocast(enabled=False)`` does nothing but
    under autocast. So what counts is that it is entered, and not only whether something is another than it was.
    """

    def __init__(self) -> None:
        self._entered: list[str] = []
        self._before = compat.modes()
        self._thread = threading.get_ident()

    def check(self) -> None:
        """To be called wherever something is computed.

        Raises:
            RuntimeError: a mode is on that was not when the trace began.
        """
        if self._entered:
            raise RuntimeError(f"a part of it is computed in {self._entered[-1]}, which a trace does not record")
        if compat.modes() != self._before:
            raise RuntimeError("a part of it is computed in another mode (gradients, autocast, kernels of attention)")

    @contextmanager
    def watched(self) -> Iterator[None]:
        """See the modes that are entered in the course of the block."""
        with _LOCK, ExitStack() as stack:
            for mode in _CLASSES:
                stack.enter_context(patch.object(mode, "__enter__", self._entering(mode)))
                stack.enter_context(patch.object(mode, "__exit__", self._leaving(mode)))
            stack.enter_context(patch.object(torch, "set_rng_state", self._resetting(torch.set_rng_state)))
            yield

    def _entering(self, mode: Any) -> Callable[..., Any]:
        enter = mode.__enter__

        def note(context: Any) -> Any:
            if threading.get_ident() == self._thread:
                self._entered.append(mode.__name__)
            return enter(context)

        return note

    def _leaving(self, mode: Any) -> Callable[..., Any]:
        leave = mode.__exit__

        def note(context: Any, *error: Any) -> Any:
            if threading.get_ident() == self._thread:
                self._entered.pop()
            return leave(context, *error)

        return note

    def _resetting(self, reset: Callable[..., Any]) -> Callable[..., Any]:
        def note(state: Any) -> Any:
            if threading.get_ident() == self._thread:
                raise RuntimeError("it sets the state of the random generator, which a trace does not record")
            return reset(state)

        return note
