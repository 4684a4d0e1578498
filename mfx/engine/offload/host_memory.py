"""The host memory that kept tensors may take, and what they take."""

from __future__ import annotations

import math
import os
import threading
import weakref
from pathlib import Path

from mfx.options.memory_budget import MemoryBudget
from mfx.text import size
from mfx_passes.errors import MfxError

_SHARE = 0.8  # of the machine's memory
_CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")


class HostMemory:
    """A count of the bytes in use, with a limit.

    The limit is the environment variable MFX_HOST_MEMORY, such as "64GiB"; without it, four fifths of the machine's
    memory, or of what its control group may take, divided by the number of this machine's processes (LOCAL_WORLD_SIZE).
    """

    def __init__(self) -> None:
        self.used = 0
        self._lock = threading.RLock()  # a collection within it may end an owner, which gives

    def take(self, owner: object, count: int, what: str) -> None:
        """Count bytes as used for as long as ``owner`` lives.

        Raises:
            MfxError: there would be more of them than there may be; ``what`` says what they are for.
        """
        limit = _limit()
        with self._lock:
            used = self.used
            fits = used + count <= limit
            if fits:
                self.used += count
        if not fits:
            raise MfxError(
                f"{what}: offload='cpu' needs another {size(count)} of host memory, where {size(used)} of "
                f"{size(limit)} are in use. Set MFX_HOST_MEMORY higher, raise gamma or memory_budget, or use a "
                "smaller batch"
            )
        weakref.finalize(owner, self._give, count)

    def _give(self, count: int) -> None:
        with self._lock:
            self.used -= count


def _limit() -> int:
    asked = os.environ.get("MFX_HOST_MEMORY")
    if asked is not None:
        try:
            return MemoryBudget.of(asked).size
        except MfxError:
            raise MfxError(
                f"MFX_HOST_MEMORY is {asked!r}; it is a number of bytes, such as '64GiB', or not set"
            ) from None
    whole = min(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), _of_control_group())
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # as torchrun sets it
    return int(_SHARE * whole / max(1, int(processes) if processes.isdecimal() else 1))


def _of_control_group() -> float:
    """Return the bytes that this process's container may take; infinity where nothing limits them."""
    try:
        text = _CONTROL_GROUP.read_text().strip()
    except OSError:
        return math.inf
    return int(text) if text.isdecimal() else math.inf  # or "max"


HOST_MEMORY = HostMemory()
