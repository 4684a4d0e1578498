"""A net's rewritten graph as a drawing: chains with their steps folded, the rest of the model around them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mfx.reports.drawing.subject import pictures_of
from mfx.reports.drawing.svg import svg_of
from mfx.text import described
from mfx_passes import MfxError

__all__ = ["Drawing", "draw"]


@dataclass(frozen=True)
class Drawing:
    """A drawing; a notebook shows it.

    Attributes:
        svg: an SVG document that needs nothing from elsewhere, and is light or dark as its reader's system is.
    """

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing, {len(self.svg)} bytes of SVG>"


def draw(model: nn.Module, path: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any) -> Drawing:
    """Draw a model's rewritten graph.

    Every chain is a box with one line per step, where steps that look the same are one line and their number; what
    lies around the chains is one box per module, or per run of operations between modules.

    Args:
        model: a net that `mfx.momentumize` returned, or a model: then what momentumize would do by default.
        path: an SVG file to write; None writes none.
        *args: inputs, as for a call of the model, that say which graph is meant; they are not computed with. By default
            it is the graph that ran last, else that for default arguments.
        **kwargs: inputs by name.

    Raises:
        MfxError: the model cannot be captured, or the file not written.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"draw takes a torch.nn.Module, not {described(model)}.")
    file = _file(path)
    name = type(model).__name__
    drawing = Drawing(svg_of(name, pictures_of(model, args, kwargs)))
    if file is not None:
        try:
            file.write_text(drawing.svg, encoding="utf-8")
        except OSError as error:
            raise MfxError(f"draw: {file} cannot be written: {error.strerror}.") from error
    return drawing


def _file(path: Any) -> Path | None:
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise MfxError(
            f"draw: the second argument is the file to write, not {described(path)}; inputs come behind it: "
            "mfx.draw(net, 'net.svg', x), or mfx.draw(net, None, x) for a notebook."
        )
    file = Path(path)
    if file.suffix.lower() != ".svg":
        raise MfxError(f"draw writes SVG; call the file {file.with_suffix('.svg').name}, not {file.name}.")
    return file
