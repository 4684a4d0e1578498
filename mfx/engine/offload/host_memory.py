"""The host memory that kept tensors may take, and what they take."""

from __future__ import annotations

import os
import threading
import weakref

from mfx.options.memory_budget import MemoryBudget
from mfx.text import size
from mfx_passes.errors import MfxError

_SHARE = 0.8  # of the machine's memory


class HostMemory:
    """A count of the bytes in use, with a limit.

    The limit is the environment variable MFX_HOST_MEMORY, such as "64GiB"; without it, four fifths of the machine's
    memory.
    """

    def __init__(self) -> None:
        self.used = 0
        self._lock = threading.Lock()

    def take(self, owner: object, count: int, what: str) -> None:
        """Count bytes as used for as long as ``owner`` lives.

        Raises:
            MfxError: there would be more of them than there may be; ``what`` says what they are for.
        """
        limit = _limit()
        with self._lock:
            if self.used + count > limit:
                raise MfxError(
                    f"{what}: offload='cpu' needs another {size(count)} of host memory, where {size(self.used)} of "
                    f"{size(limit)} are in use. Set MFX_HOST_MEMORY higher, raise gamma or memory_budget, or use a "
                    "smaller batch"
                )
            self.used += count
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
    return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


HOST_MEMORY = HostMemory()
