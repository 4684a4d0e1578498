"""The random generators while a chain runs: which steps draw from which of them, and from where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from mfx.compat import is_capturing, sign_reader
from mfx.modules.random_state import Generator, RandomState
from mfx_passes.errors import MfxError

_UNTOLD = object()  # a sign that is never read
_last: dict[str, RandomState] = {}  # of the global generators: their states take long to read


class Draw(NamedTuple):
    """A generator that a step draws from, with the states before and after."""

    generator: Generator
    before: RandomState
    after: RandomState

    def is_done(self) -> bool:
        """True if the generator is where the step left it."""
        return self.generator.state(self.after) is self.after

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Let the generator start where it did in the forward pass; afterwards put it back.

        Raises:
            MfxError: the generator is that of a device whose work is captured as a graph.
        """
        device = self.generator.device
        if device is not None and is_capturing(device):
            raise MfxError(
                "a step draws random numbers, and the backward pass, which has to draw them again, is captured as a "
                "graph. Use memory_budget=1.0, or leave the net out of the capture"
            )
        real = self.generator.read()
        try:
            self.generator.write(self.before.value)
            yield
        finally:
            self.generator.write(real)


class RandomClock:
    """Random generators, looked at after every step.

    Args:
        generators: the generators.
        are_global: True if their states may be remembered by name.
    """

    def __init__(self, generators: Sequence[Generator], *, are_global: bool = False) -> None:
        self._generators = generators
        known = _last if are_global else {}
        self._look([known.get(generator.name) for generator in generators])
        if are_global:
            _last.update({generator.name: s for generator, s in zip(generators, self._states, strict=True) if s.sign})

    def all(self) -> list[Draw]:
        """Return a draw from every generator, for a step that has not ended."""
        return [Draw(generator, now, now) for generator, now in zip(self._generators, self._states, strict=True)]

    def tick(self) -> Sequence[Draw]:
        """Look at the generators again; return what was drawn since the last time."""
        if self._read() == self._sign:  # the usual case
            return ()
        before = self._states
        self._look(before)
        found = zip(self._generators, before, self._states, strict=True)
        return [Draw(generator, then, now) for generator, then, now in found if then is not now]

    def _look(self, before: Sequence[RandomState | None]) -> None:
        """Read the states, and before that the signs: another thread may draw meanwhile."""
        signs = [generator.sign() for generator in self._generators]
        known = [sign for sign in signs if sign is not None]
        # The sign of a state may change though it does not: torch leaves gaps in memory as they are.
        self._read = sign_reader(known)
        self._sign = self._read() if len(known) == len(signs) else _UNTOLD
        self._states = [generator.state(then) for generator, then in zip(self._generators, before, strict=True)]
