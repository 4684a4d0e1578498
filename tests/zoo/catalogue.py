"""All models of the zoo, library by library."""

from __future__ import annotations

from importlib import import_module

from tests.zoo.entry import Entry

LIBRARIES = ("torchvision", "timm", "vit_pytorch", "huggingface", "others")
"""One module beside this one for each, with ``ENTRIES``."""


def entries(library: str) -> list[Entry]:
    """The models of one library."""
    return list(import_module(f"tests.zoo.{library}").ENTRIES)


def entry(library: str, name: str) -> Entry:
    """One model.

    Raises:
        KeyError: there is no such model.
    """
    return {entry.name: entry for entry in entries(library)}[name]


def keys() -> set[tuple[str, str]]:
    """Library and name of every model."""
    return {(library, entry.name) for library in LIBRARIES for entry in entries(library)}
