"""An explanation for a terminal: at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mfx.reports.explain.tables import (
    CHAINS,
    MEMORY,
    RejectedGroup,
    chain_rows,
    groups,
    headline,
    memory_rows,
    policies,
    sources,
)

if TYPE_CHECKING:
    from mfx.reports.explain.explanation import Explanation


WIDTH = 100
_SHOWN = 3  # rejections per reason


def text(explanation: Explanation) -> str:
    """All there is to say, section by section."""
    sections = (_chains, _memory, _policies, _advice, _rejections, _flat)
    lines = _wrapped(headline(explanation))
    for section in sections:
        if found := section(explanation):
            lines += ["", *found]
    return "\n".join(lines)


def _chains(explanation: Explanation) -> list[str]:
    rows = chain_rows(explanation)
    if not rows:
        return []
    if not any(row[-1] for row in rows):  # no shapes
        rows = [row[:-1] for row in rows]
    places = [line for chain in explanation.chains for line in _wrapped(f"  {_fit(chain.name, 44)}: {sources(chain)}")]
    return [*_table([CHAINS[: len(rows[0])], *rows]), "", "from the first step to the last:", *places]


def _memory(explanation: Explanation) -> list[str]:
    rows = memory_rows(explanation)
    if rows:
        return _table([MEMORY, *rows], right=(1, 2, 3, 4))
    return _wrapped(f"memory could not be predicted: {explanation.unpredicted}") if explanation.unpredicted else []


def _policies(explanation: Explanation) -> list[str]:
    rows = policies(explanation)
    lines = ["kept between forward and backward:"] if rows else []
    for name, policy in rows:
        lines += _wrapped(f"  {_fit(name, 44)}: {policy}")
    return lines


def _advice(explanation: Explanation) -> list[str]:
    lines = ["what could be done:"] if explanation.advice else []
    for advice in explanation.advice:
        lines += _wrapped(f"  {advice}")
    return lines


def _rejections(explanation: Explanation) -> list[str]:
    found = groups(explanation)
    return ["left as they are:", *(line for group in found for line in _group(group))] if found else []


def _group(group: RejectedGroup) -> list[str]:
    lines = _wrapped(f"  {len(group.places)} x {group.reason}")
    lines += [_fit(f"      {place}", WIDTH) for place in group.places[:_SHOWN]]
    lines += [f"      and {len(group.places) - _SHOWN} more"] if len(group.places) > _SHOWN else []
    return [*lines, *(_wrapped(f"      to do: {group.remedy}") if group.remedy else [])]


def _flat(explanation: Explanation) -> list[str]:
    paths = [_fit(path, 60) for path in explanation.flat if path]
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
