"""The result of a plan: what each way to train needs, and the most that fits, as text, data and a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mfx.reports.plan.training_state import TrainingState
from mfx.reports.table import Table
from mfx.text import size
from mfx_passes import MfxError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GIBIBYTE, _TOKENS = 2**30, 64


@dataclass(frozen=True)
class PlannedWay:
    """One way to train, on each device.

    Attributes:
        name: its name.
        kept: bytes of activations between forward and backward, at the given inputs.
        peak: the most bytes of activations at once.
        total: with what parameters take.
        time: of a step, relative to plain training, by operations and bytes.
        batch: the largest batch that fits, with the given sequence; 0 if none does.
        sequence: the longest sequence that fits, by multiples of 64, with the given batch; None if inputs are none.
        refused: a length that the model itself does not take; None if none was met.
    """

    name: str
    kept: int
    peak: int
    total: float
    time: float
    batch: int
    sequence: int | None
    refused: int | None = None

    @property
    def longest(self) -> str:
        """The longest sequence as text; with a plus where the model, not its memory, ends it."""
        if not self.sequence:
            return "none"
        ends = self.refused is not None and self.refused <= self.sequence + _TOKENS
        return f"{self.sequence}{'+' if ends else ''}"


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
        state, given = self.state, f"batch {self.batch}"
        if self.sequence is not None:
            given += f", sequence {self.sequence}"
        parts = [f"{size(state.parameters)} of parameters", f"{size(state.gradients)} of gradients"]
        parts.append(f"{size(state.optimizer)} of optimizer state")
        if state.gathered:
            parts.append(f"{size(state.gathered)} gathered for a while")
        devices = f"{self.devices} × {self.chip}" if self.devices > 1 else self.chip
        lines = [
            f"{self.model} on {devices} of {size(self.memory)}: {', '.join(parts)}",
            "",
            *self._table(given).lines(),
        ]
        if any(way.longest.endswith("+") for way in self.ways):
            lines.append("+ the model itself takes no longer ones")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw what each way needs, in parts, against what there is.

        Args:
            path: a file to save the picture in; its suffix is that of the format (.png, .svg, .pdf).

        Raises:
            MfxError: matplotlib is not installed.
        """
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
            figure.savefig(path)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, which ``json.dumps`` takes."""
        return asdict(self)

    def _repr_html_(self) -> str:
        return self._table(f"batch {self.batch}").html()

    def _table(self, given: str) -> Table:
        has_sequence = self.sequence is not None
        head = (given, "kept", "peak", "in all", "", "time", "largest batch", *(("longest",) if has_sequence else ()))
        rows = [
            (
                way.name,
                size(way.kept),
                size(way.peak),
                size(way.total),
                "" if way.total <= self.memory else "too much",
                f"{way.time:.2f}×",
                str(way.batch or "none"),
                *((way.longest,) if has_sequence else ()),
            )
            for way in self.ways
        ]
        return Table(head, rows, numbers=len(head) - 1)
