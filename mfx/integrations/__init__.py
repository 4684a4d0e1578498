"""Callbacks for other people's training loops; each needs its package only when it is used.

``mfx.integrations.transformers`` and ``mfx.integrations.lightning`` are imported at their first use. They use γ,
schedules and the meter, and nothing above them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_MODULES = ("lightning", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
