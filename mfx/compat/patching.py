"""The lock under which torch's and the model's globals are patched for a moment: all threads see what is patched."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

_LOCK = threading.RLock()


def patching() -> AbstractContextManager[object]:
    """Return a context that one thread at a time is in; that thread may enter it again."""
    return _LOCK
