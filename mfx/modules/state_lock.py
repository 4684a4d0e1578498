"""Locks that threads hold while they run a net's modules: for the state of modules, and for what is recomputed.

A recomputation puts back what the forward pass found, and a run for compiled code has tensors of its own. No other
thread may run the modules meanwhile. While a thread waits for autograd, which may be busy in a device's thread with a
recomputation that waits in turn, it lends its sections to recomputations. These leave everything as they found it, and
the thread goes on when they have ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mfx.compat import around_engine
from mfx.modules.recomputing import RUNNING

_LOCK = threading.RLock()
_CHANGED = threading.Condition(_LOCK)  # some section has ended, or was lent
_WAITING: list[Section] = []


class _Own(threading.local):
    def __init__(self) -> None:
        self.sections: list[Section] = []
        self.thread = threading.get_ident()


_OWN = _Own()


class StateLock:
    """The lock of one net's modules, or of what one call recomputes.

    Attributes:
        sections: those under way, of all threads, in the order in which they began.
        writers: the number of those in which the modules have other state.
        warned: the topics of warnings about running the modules that are given once.
    """

    def __init__(self) -> None:
        self.sections: list[Section] = []
        self.writers = 0
        self.warned: set[str] = set()
        around_engine(_lent)

    def reading(self) -> Section:
        """Return a section that runs the modules as they are; several threads may at once."""
        return Section(self, writes=False, recomputes=RUNNING.again)

    def writing(self) -> Section:
        """Return a section in which the modules have other state; it leaves everything as it was."""
        return Section(self, writes=True, recomputes=RUNNING.again)

    def __reduce__(self) -> tuple[Any, ...]:
        return StateLock, ()  # a copy of a net has modules of its own


class Section:
    """A context that waits until no other thread is in a section that it must not meet.

    Args:
        lock: the lock.
        writes: True if it must not meet sections that only read, either.
        recomputes: True if it may begin in a section that is lent.
    """

    __slots__ = ("_is_lent", "_lock", "_recomputes", "_thread", "_writes")

    def __init__(self, lock: StateLock, *, writes: bool, recomputes: bool) -> None:
        self._lock, self._writes, self._recomputes, self._is_lent = lock, writes, recomputes, False

    def __enter__(self) -> None:
        self._thread = _OWN.thread
        sections = self._lock.sections
        with _LOCK:
            if sections:
                _wait_while(lambda: any(map(self._waits_for, sections)), self)
            sections.append(self)
            self._lock.writers += self._writes
        _OWN.sections.append(self)

    def __exit__(self, *raised: object) -> None:
        _OWN.sections.pop()
        with _LOCK:
            self._lock.sections.remove(self)
            self._lock.writers -= self._writes
            if _WAITING:
                _CHANGED.notify_all()

    def _meets(self, other: Section) -> bool:
        return other._thread != self._thread and (other._writes or self._writes)

    def _waits_for(self, other: Section) -> bool:
        """True if this cannot begin before another section has ended, or is lent."""
        return self._meets(other) and not (other._is_lent and self._recomputes)

    def _is_interrupted(self) -> bool:
        """True if a recomputation that this was lent to has not ended."""
        sections = self._lock.sections
        return any(map(self._meets, sections[sections.index(self) + 1 :]))


def _lent(engine: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run autograd's engine, with all sections of this thread lent."""
    lent = [section for section in _OWN.sections if not section._is_lent]
    if not lent:
        return engine(*args, **kwargs)
    _set_lent(lent, True)
    try:
        return engine(*args, **kwargs)
    finally:
        with _LOCK:
            _wait_while(lambda: any(map(Section._is_interrupted, lent)), lent[0])
            _set_lent(lent, False)


def _set_lent(sections: list[Section], lent: bool) -> None:
    with _LOCK:
        for section in sections:
            section._is_lent = lent
        _CHANGED.notify_all()


def _wait_while(condition: Callable[[], bool], section: Section) -> None:
    _WAITING.append(section)
    try:
        while condition():
            _CHANGED.wait()
    finally:
        _WAITING.remove(section)
