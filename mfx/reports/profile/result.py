"""What training steps of one model took: as objects, as text, as data, as a picture."""

from __future__ import annotations

import html
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfx.reports.profile.rows import ProfileRow
from mfx.text import amount, duration, ratio, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 100
_HEADER = ("variant", "kept", "", "peak", "", "time", "", "FLOPs", "")


@dataclass(frozen=True)
class Profile:
    """Training steps of one model, made in several ways.

    Attributes:
        model: the name of its class.
        device: where it ran.
        repeats: of how many steps the times are medians.
        rows: one per variant, in the order asked for.
        wrapped: paths of the modules that ``torch.utils.checkpoint`` was put around in the variant "checkpoint".
        skipped: variants that could not be run, each with the reason.
    """

    model: str
    device: str
    repeats: int
    rows: tuple[ProfileRow, ...]
    wrapped: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """The variants as lines of text, with ratios to the first."""
        lines = [self._headline(), "", *_aligned([_HEADER, *map(self._cells, self.rows)]), ""]
        for name, note in self._notes():
            lines += textwrap.wrap(f"{name}: {note}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines).rstrip()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the bytes alive in the course of a step, one line per variant.

        Args:
            path: where to save the picture, too; its suffix says as what (.png, .svg, .pdf).

        Raises:
            MfxError: matplotlib is not installed.
        """
        from mfx.reports.profile.plot import plot

        figure = plot(self.rows, f"{self.model}: activation memory in one training step ({self.device})")
        if path is not None:
            figure.savefig(path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, which ``json.dumps`` takes."""
        return {
            "model": self.model,
            "device": self.device,
            "repeats": self.repeats,
            "rows": [{**asdict(row), "timeline": [list(point) for point in row.timeline]} for row in self.rows],
            "wrapped": list(self.wrapped),
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

    def _repr_html_(self) -> str:
        rows = [_html_row("th", _HEADER), *(_html_row("td", self._cells(row)) for row in self.rows)]
        notes = [f"<br><small>{html.escape(f'{name}: {note}')}</small>" for name, note in self._notes()]
        return f"<p>{html.escape(self._headline())}</p><table>{''.join(rows)}</table><p>{''.join(notes)}</p>"

    def _headline(self) -> str:
        return f"{self.model}, one training step on {self.device}; ratios are to {self.rows[0].name}"

    def _cells(self, row: ProfileRow) -> tuple[str, ...]:
        first = self.rows[0]
        return (
            row.name,
            *(size(row.kept_bytes), ratio(row.kept_bytes, first.kept_bytes)),
            *(size(row.peak_bytes), ratio(row.peak_bytes, first.peak_bytes)),
            *(duration(row.seconds), ratio(row.seconds, first.seconds)),
            *(amount(row.flops, "FLOP"), ratio(row.flops, first.flops)),
        )

    def _notes(self) -> list[tuple[str, str]]:
        """What is to be said of single variants."""
        skipped = [(name, f"not measured: {reason}") for name, reason in self.skipped]
        return [*((row.name, row.note) for row in self.rows if row.note), *skipped]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *numbers]).rstrip())
    return lines


def _html_row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
