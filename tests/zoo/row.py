"""The row of one model: what the sweep found out about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

EQUAL, ROUNDED = "equal", "equal to rounding"
SUMMED, REDRAWN = "equal, gradients to rounding", "equal without dropout"
AGREE = (EQUAL, SUMMED, REDRAWN, ROUNDED)
"""How what was compared agrees: bit for bit; so but for the order in which gradients were added up, or dropout masks
drawn; to rounding."""


@dataclass(frozen=True)
class Row:
    """One model's row of the table. Fields that were not reached before something failed keep their defaults.

    Args:
        library: that it is of.
        model: its name there.
        note: what differs from the library's defaults.
        parameters: how many numbers there are to learn.
        capture: ``"symbolic"``, ``"dynamo"`` or ``"module by module"``.
        adds: identity residual adds of a forward pass, counted on the autograd graph of the original model.
        chained: those of them in chains of two or more, by the same graph.
        rewritten: updates of streams that a forward pass of the momentumized model ran, by the same random
            numbers; 0 if calls with other random numbers are refused.
        chains: how many steps each chain has.
        refused: how many of the sums that stay as they were, for which reason.
        says: what mfx warned of, first lines.
        keys: whether the names in the `state_dict` are the model's.
        gamma0: whether at γ = 0 outputs, gradients, buffers and random state are the model's: one of `AGREE`, or what
            differs; ``""`` where momentumize returned the model itself.
        exact: whether at γ = 0.9 all these are those of the same network with all activations kept: `EQUAL`, or what
            differs.
        kept, peak: bytes of activations after the forward pass and at worst, with mfx relative to without.
        failure: what went wrong, if anything did.
        seconds: of a processor that all of this took.
        captured: seconds of a processor that a training step takes longer if it captures; 0 if that was not measured.
        day: of the judgement, "2026-11-30".
        versions: of the packages that were judged, by name.
    """

    library: str
    model: str
    note: str = ""
    parameters: int = 0
    capture: str = ""
    adds: int = 0
    chained: int = 0
    rewritten: int = 0
    chains: tuple[int, ...] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    says: tuple[str, ...] = ()
    keys: bool = False
    gamma0: str = ""
    exact: str = ""
    kept: float = 0.0
    peak: float = 0.0
    failure: str = ""
    seconds: float = 0.0
    captured: float = 0.0
    day: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.library, self.model

    @property
    def missed(self) -> int:
        """Adds in chains of two or more that were not rewritten."""
        return max(0, self.chained - self.rewritten)

    @property
    def is_right(self) -> bool:
        return not self.failure and self.keys and not self.is_wrong

    @property
    def is_wrong(self) -> bool:
        """True if a comparison was made and failed."""
        return any(verdict not in ("", *AGREE) for verdict in (self.gamma0, self.exact))

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.failure:
            return "failed"
        if not self.gamma0:
            return "unchanged"
        wrong = [f"γ = 0: {self.gamma0}"] * (self.gamma0 not in AGREE)
        wrong += [f"γ = 0.9: {self.exact}"] * (self.exact != EQUAL)
        return "; ".join(wrong) or self.gamma0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Row:
        """From what `to_dict` made, perhaps by way of JSON."""
        given = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
