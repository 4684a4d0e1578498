"""The result of a plan: what each way to train needs, and the most that fits, as text, data and a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfx.reports.figure_file import check_figure_file, save_figure
from mfx.reports.markup import element, joined
from mfx.reports.table import Table
from mfx.reports.training_state import TrainingState
from mfx.text import size
from mfx_passes import MfxError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIBIBYTE = 2**30


@dataclass(frozen=True)
class PlannedWay:
    """One way to train, on each device.

    Attributes:
        name: its name.
        kept: bytes of activations between forward and backward, at the given inputs.
        peak: the most bytes of activations at once.
        total: with what parameters take.
        host: bytes of host memory that are taken for each device.
        time: of a step, relative to plain training, by operations and bytes.
        batch: the largest batch that fits, with the given sequence; 0 if none does. By multiples of the given one where
            the model refuses others.
        batch_refusal: the model's error at the next batch; None where memory ends it.
        sequence: the longest sequence that fits, with the given batch: a multiple of 64, of the given one where the
            model refuses others, or the given one itself; 0 if none fits, None if inputs are none.
        sequence_refusal: the model's error at the next sequence; None where memory ends it.
    """

    name: str
    kept: int
    peak: int
    total: float
    host: int
    time: float
    batch: int
    batch_refusal: str | None
    sequence: int | None
    sequence_refusal: str | None

    @property
    def largest(self) -> str:
        """The largest batch as text; with a plus where the model, not its memory, ends it."""
        return f"{self.batch or 'none'}{'+' if self.batch_refusal is not None else ''}"

    @property
    def longest(self) -> str:
        """The longest sequence as text; with a plus where the model, not its memory, ends it."""
        return f"{self.sequence or 'none'}{'+' if self.sequence_refusal is not None else ''}"


@dataclass(frozen=True)
class Plan:
    """The ways to train a model, and what fits.

    Attributes:
        model: the name of the model's class.
        chip: the name of the device.
        memory: bytes of each device.
        devices: how many there are.
        batch: size of the given inputs.
        sequence: size of the given inputs; None if they are no sequences.
        state: the bytes that parameters take on each device.
        ways: one per way to train.
    """

    model: str
    chip: str
    memory: int
    devices: int
    batch: int
    sequence: int | None
    state: TrainingState
    ways: tuple[PlannedWay, ...]

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return the ways as lines of text."""
        return "\n".join([self._headline(), "", *self._table().lines(), *self._notes()])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw what each way needs, in parts, against what there is.

        Args:
            path: a file to save the picture in; its suffix is that of the format (.png, .svg, .pdf).

        Raises:
            MfxError: matplotlib is not installed, or the file is not a picture's or cannot be written.
        """
        if path is not None:
            check_figure_file(path, "Plan.plot")
        try:
            from matplotlib.figure import Figure  # not pyplot, which opens windows and shares state
        except ImportError as error:
            raise MfxError(
                "Plan.plot draws with matplotlib: pip install 'mfx[report]', or matplotlib itself."
            ) from error
        figure = Figure(figsize=(7, 4), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        names, base = [way.name for way in self.ways], 0.0
        for label in ("parameters", "gradients", "optimizer", "gathered"):
            if part := getattr(self.state, label) / _GIBIBYTE:
                axes.bar(names, [part] * len(names), bottom=base, label=label)
                base += part
        axes.bar(names, [way.peak / _GIBIBYTE for way in self.ways], bottom=base, label="activations")
        axes.axhline(self.memory / _GIBIBYTE, color="0.2", linestyle="--", label="of one device")
        axes.set_title(f"{self.model}: GiB on each device, batch {self.batch}")
        axes.tick_params("x", labelrotation=20)
        axes.legend(frameon=False)
        if path is not None:
            save_figure(figure, path, "Plan.plot")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, which ``json.dumps`` takes."""
        return asdict(self)

    def _repr_html_(self) -> str:
        notes = [element("p", element("small", note)) for note in self._notes()]
        return joined(element("p", self._headline()), self._table().html(), *notes)

    def _headline(self) -> str:
        state = self.state
        parts = [f"{size(state.parameters)} of parameters", f"{size(state.gradients)} of gradients"]
        parts.append(f"{size(state.optimizer)} of optimizer state")
        if state.gathered:
            parts.append(f"{size(state.gathered)} gathered for a while")
        devices = f"{self.devices} × {self.chip}" if self.devices > 1 else self.chip
        return f"{self.model} on {devices} of {size(self.memory)}: {', '.join(parts)}"

    def _notes(self) -> list[str]:
        """Return what the table has no column for."""
        notes = [f"{way.name}: {size(way.host)} of host memory for each device" for way in self.ways if way.host]
        refusals = dict.fromkeys(r for way in self.ways for r in (way.batch_refusal, way.sequence_refusal) if r)
        return notes + [f"+ the model itself refuses more: {refusal}" for refusal in refusals]

    def _table(self) -> Table:
        has_sequence = self.sequence is not None
        given = f"batch {self.batch}" + (f", sequence {self.sequence}" if has_sequence else "")
        head = (given, "kept", "peak", "in all", "", "time", "largest batch", *(("longest",) if has_sequence else ()))
        rows = [
            (
                way.name,
                size(way.kept),
                size(way.peak),
                size(way.total),
                "" if way.total <= self.memory else "too much",
                f"{way.time:.2f}×",
                way.largest,
                *((way.longest,) if has_sequence else ()),
            )
            for way in self.ways
        ]
        return Table(head, rows, numbers=len(head) - 1)
