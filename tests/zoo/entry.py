"""The entries of a zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import nn

Call: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a call, by position and by name."""


@dataclass(frozen=True)
class Entry:
    """A model of a library.

    Args:
        library: that it is of.
        name: unique within the library; what its users call it.
        make: makes it with random weights, drawn from torch's default generator.
        call: makes the arguments of a call, drawn from torch's default generator.
        note: what differs from the library's defaults, for the table: "64 px", "4 layers of width 32".
        compiles_alike: whether the model computes the same, bit for bit, while Dynamo captures it. Where a library asks
            `torch.compiler.is_compiling()` and then computes the same function in another way, only rounding differs.
        package: it is imported from, if that is not called as the library.
    """

    library: str
    name: str
    make: Callable[[], nn.Module]
    call: Callable[[], Call]
    note: str = ""
    compiles_alike: bool = True
    package: str = ""

    @property
    def is_installed(self) -> bool:
        """True if its package can be imported."""
        return find_spec(self.package or self.library) is not None

    @property
    def versions(self) -> dict[str, str]:
        """Those of torch and of its package, by the names that they are installed by."""
        names = metadata.packages_distributions()
        found = {name for package in ("torch", self.package or self.library) for name in names.get(package, ())}
        return {name: metadata.version(name) for name in sorted(found)}
