"""The plot of a profile, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mfx.reports.profile.rows import ProfileRow
from mfx.text import size
from mfx_passes import MfxError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_COLOURS = (
    "#444444",
    "#d9822b",
    "#2563c9",
    "#2f9e60",
    "#a3478f",
    "#8a6d3b",
)  # distinguishable for the colour-blind, too
_MEBIBYTE = 2**20


def plot(rows: Sequence[ProfileRow], title: str) -> Figure:
    """Draw the bytes alive in the course of a step, one line per row.

    Raises:
        MfxError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which opens windows and shares state
    except ImportError as error:
        raise MfxError(
            "Profile.plot draws with matplotlib: pip install 'mfx[report]', or matplotlib itself."
        ) from error
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    for number, row in enumerate(rows):
        _draw(axes, row, _COLOURS[number % len(_COLOURS)])
    axes.set_title(title)
    axes.set_xlabel("share of the step's operations; a dot marks the end of the forward pass")
    axes.set_ylabel("activations alive (MiB)")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _draw(axes: Axes, row: ProfileRow, colour: str) -> None:
    where, live = [x for x, _ in row.timeline], [alive / _MEBIBYTE for _, alive in row.timeline]
    axes.plot(where, live, color=colour, linewidth=1.8, label=f"{row.name}: peak {size(row.peak_bytes)}")
    axes.plot([row.forward_ends], [row.kept_bytes / _MEBIBYTE], "o", color=colour, markersize=5)
