"""The lock under which torch's and the model's globals are patched for a moment, and patches for one thread only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

_LOCK = threading.RLock()


def patching() -> AbstractContextManager[object]:
    """Return a context that one thread at a time is in; that thread may enter it again."""
    return _LOCK


@contextmanager
def patched(
    owner: Any, name: str, function: Callable[..., Any], elsewhere: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Put a function in the place of another one, for calls by this thread.

    Args:
        owner: the module or class that has the function as an attribute.
        name: the name of the attribute.
        function: what this thread calls.
        elsewhere: what other threads call; by default the function that was there.
    """
    thread, original = threading.get_ident(), getattr(owner, name)
    other = original if elsewhere is None else elsewhere

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if threading.get_ident() == thread else other)(*args, **kwargs)

    with patching(), patch.object(owner, name, call):
        yield
