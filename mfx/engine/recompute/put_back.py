"""Puts the state of a step back for its recomputation, and afterwards what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mfx.compat import Table
from mfx.engine.recompute.layout import StateLayout
from mfx.engine.recompute.tables import dict_of, set_contents, set_dicts, set_types
from mfx.modules.state_lock import Section, StateLock


class PutBack:
    """A context in which all is as it was when a layout was made; it leaves all as it found it.

    Args:
        layout: the layout.
        tensors: what its ``tensors`` returned then.
        versions: of the tables, just before.
        values: the values to put in the place of tensors, by identity.
        lock: of the modules; it is held, unless nothing differs.
    """

    __slots__ = ("_dicts", "_found", "_layout", "_lock", "_section", "_tensors", "_types", "_values", "_versions")

    def __init__(
        self,
        layout: StateLayout,
        tensors: Sequence[Any],
        versions: object,
        values: Mapping[int, Tensor],
        lock: StateLock,
    ) -> None:
        self._layout, self._tensors, self._versions, self._values, self._lock = layout, tensors, versions, values, lock
        self._section: Section | None = None
        self._found: Sequence[tuple[Table, dict[Any, Any]]] = ()
        self._types: list[type] | None = None
        self._dicts: list[Any] = []

    def __enter__(self) -> None:
        layout, tensors, versions, values = self._layout, self._tensors, self._versions, self._values
        if not (values or layout.has_mutable or self._lock.writers) and layout.is_put_back(tensors, versions):
            return
        section = self._lock.writing()
        section.__enter__()
        self._section = section
        if not layout.has_mutable and layout.is_put_back(tensors, versions):  # now that nobody else writes
            self._found = layout.holding(values)
            for table, contents in self._found:
                table.update({name: values.get(id(tensor), tensor) for name, tensor in contents.items()})
            return
        self._found, self._types = layout.written(), list(map(type, layout.typed))
        self._dicts = list(map(dict_of, layout.owners))
        try:
            layout.write(tensors, values)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *raised: object) -> None:
        layout = self._layout
        for table, contents in self._found:
            set_contents(table, contents)
        if self._types is not None:
            set_types(layout.typed, self._types)
            set_dicts(layout.owners, self._dicts)
        elif not layout.is_put_back(self._tensors, self._versions):
            layout.write(self._tensors, {})
        if self._section is not None:
            self._section.__exit__()
