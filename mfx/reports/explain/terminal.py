"""An explanation for a terminal: at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mfx.reports.explain.tables import CHAINS, MEMORY, Contents, RejectedGroup

WIDTH = 100
_SHOWN = 3  # rejections per reason


def text(contents: Contents) -> str:
    """Return all of an explanation, section by section."""
    sections = (_chains, _memory, _policies, _advice, _rejections, _flat)
    lines = _wrapped(contents.headline)
    for section in sections:
        if found := section(contents):
            lines += ["", *found]
    return "\n".join(lines)


def _chains(contents: Contents) -> list[str]:
    rows = contents.chains
    if not rows:
        return []
    if not any(row[-1] for row in rows):  # no shapes
        rows = [row[:-1] for row in rows]
    places = [line for name, where in contents.sources for line in _wrapped(f"  {_fit(name, 44)}: {where}")]
    return [*_table([CHAINS[: len(rows[0])], *rows]), "", "from the first step to the last:", *places]


def _memory(contents: Contents) -> list[str]:
    if contents.memory:
        return _table([MEMORY, *contents.memory], right=(1, 2, 3, 4))
    return _wrapped(f"memory could not be predicted: {contents.unpredicted}") if contents.unpredicted else []


def _policies(contents: Contents) -> list[str]:
    lines = ["kept between forward and backward:"] if contents.policies else []
    for name, policy in contents.policies:
        lines += _wrapped(f"  {_fit(name, 44)}: {policy}")
    return lines


def _advice(contents: Contents) -> list[str]:
    lines = ["what could be done:"] if contents.advice else []
    for advice in contents.advice:
        lines += _wrapped(f"  {advice}")
    return lines


def _rejections(contents: Contents) -> list[str]:
    found = contents.rejections
    return ["left as they are:", *(line for group in found for line in _group(group))] if found else []


def _group(group: RejectedGroup) -> list[str]:
    lines = _wrapped(f"  {len(group.places)} x {group.reason}")
    lines += [_fit(f"      {place}", WIDTH) for place in group.places[:_SHOWN]]
    lines += [f"      and {len(group.places) - _SHOWN} more"] if len(group.places) > _SHOWN else []
    return [*lines, *(_wrapped(f"      to do: {group.remedy}") if group.remedy else [])]


def _flat(contents: Contents) -> list[str]:
    paths = [_fit(path, 60) for path in contents.flat]
    if not paths:
        return []
    shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    return _wrapped(f"hooks on these modules do not run, since sums in them are part of a chain: {shown}")


def _table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Aligned columns; the first one is cut to what the others leave of the width."""
    rest = sum(2 + max(map(len, column)) for column in list(zip(*rows, strict=True))[1:])
    rows = [(_fit(row[0], max(WIDTH - rest, 12)), *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(cells)).rstrip()

    return [line(row) for row in rows]


def _wrapped(line: str) -> list[str]:
    line = " " * (len(line) - len(line.lstrip())) + " ".join(_fit(word, WIDTH - 10) for word in line.split())
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _fit(text: str, width: int) -> str:
    """Cut out of the middle what is too much: the ends of paths tell most."""
    if len(text) <= width:
        return text
    half = (width - 1) // 2
    return f"{text[: width - 1 - half]}…{text[-half:]}"
