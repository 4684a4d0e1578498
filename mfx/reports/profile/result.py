"""The result of a profile: training steps of one model as objects, text, data and a picture."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfx.reports.figure_file import check_figure_file, save_figure
from mfx.reports.markup import Markup, element, joined
from mfx.reports.profile.rows import ProfileRow
from mfx.reports.table import WIDTH, Table
from mfx.text import amount, duration, ratio, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = ("variant", "kept", "", "peak", "", "whole", "", "time", "", "FLOPs", "")


@dataclass(frozen=True)
class Profile:
    """Training steps of one model, in several variants.

    Attributes:
        model: the name of the model's class.
        device: the device on which it ran.
        repeats: the number of steps that each time is the median of.
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
        """Return the variants as lines of text, with ratios to the first."""
        lines = [self._headline(), "", *self._table().lines(), ""]
        for note in notes_of(self):
            lines += textwrap.wrap(note, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(lines).rstrip()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the bytes alive in the course of a step, one line per variant.

        Args:
            path: a file to save the picture in; its suffix is that of the format (.png, .svg, .pdf).

        Raises:
            MfxError: matplotlib is not installed, or the file is not a picture's or cannot be written.
        """
        from mfx.reports.profile.plot import plot

        if path is not None:
            check_figure_file(path, "Profile.plot")
        figure = plot(self.rows, f"{self.model}: activation memory in one training step ({self.device})")
        if path is not None:
            save_figure(figure, path, "Profile.plot")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, which ``json.dumps`` takes."""
        return {
            "model": self.model,
            "device": self.device,
            "repeats": self.repeats,
            "rows": [{**asdict(row), "timeline": [list(point) for point in row.timeline]} for row in self.rows],
            "wrapped": list(self.wrapped),
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

    def _repr_html_(self) -> str:
        notes = [joined(Markup("<br>"), element("small", note)) for note in notes_of(self)]
        return joined(element("p", self._headline()), self._table().html(), element("p", *notes))

    def _headline(self) -> str:
        return f"{self.model}, one training step on {self.device}; ratios are to {self.rows[0].name}"

    def _table(self) -> Table:
        rows = [(row.name, *chain.from_iterable(measures(row, self.rows[0]))) for row in self.rows]
        return Table(_HEAD, rows, numbers=len(_HEAD) - 1)


def measures(row: ProfileRow, first: ProfileRow) -> list[tuple[str, str]]:
    """Return what a step takes, each with its ratio to that of the first row: kept, peak, whole, time and FLOPs."""
    return [
        (size(row.kept_bytes), ratio(row.kept_bytes, first.kept_bytes)),
        (size(row.peak_bytes), ratio(row.peak_bytes, first.peak_bytes)),
        (size(row.whole_bytes), ratio(row.whole_bytes, first.whole_bytes)),
        (duration(row.seconds), ratio(row.seconds, first.seconds)),
        (amount(row.flops, "FLOP"), ratio(row.flops, first.flops)),
    ]


def notes_of(profile: Profile) -> list[str]:
    """Return the notes: the largest tensor at each peak; what was run, or why nothing was."""
    notes = ["whole: the peak with parameters, buffers, inputs and gradients; in peak are activations alone"]
    largest = {row.largest: [r.name for r in profile.rows if r.largest == row.largest] for row in profile.rows}
    notes += [f"largest at the peak ({', '.join(names)}): {text}" for text, names in largest.items() if text]
    notes += [f"{row.name}: {row.note}" for row in profile.rows if row.note]
    return notes + [f"{name}: not measured: {reason}" for name, reason in profile.skipped]
