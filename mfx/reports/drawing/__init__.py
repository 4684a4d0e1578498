"""The drawing of a net's rewritten graph: chains with their steps folded, the rest of the model around them.

The views of a model (`mfx.net.views`) become pictures, which are boxes and edges; boxes get a shape, and the shapes
become one SVG document. The package imports nothing above ``mfx.net``, and of the other reports only what all share.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mfx.net.views import written
from mfx.progress import waiting_for
from mfx.reports.drawing.picture_file import SUFFIXES, check_painter, paint
from mfx.reports.drawing.subject import pictures_of
from mfx.reports.drawing.svg import svg_of
from mfx.text import described
from mfx_passes import MfxError

__all__ = ["Drawing", "draw"]


@dataclass(frozen=True)
class Drawing:
    """A drawing; a notebook shows it.

    Attributes:
        svg: an SVG document that loads nothing, and is light or dark as the reader's system is.
    """

    svg: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return f"<Drawing, {len(self.svg)} bytes of SVG>"


def draw(model: nn.Module, path: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any) -> Drawing:
    """Draw a model's rewritten graph.

    Every chain is a box with one line per step; steps that look the same share a line with their number. Around the
    chains there is one box per module, or per run of operations between modules.

    Args:
        model: a net that `mfx.momentumize` returned; ``torch.compile(model, backend="mfx")`` after a call, one picture
            per graph; or any model, drawn as momentumize would rewrite it by default.
        path: the file to write: .svg, or .png or .pdf, for which matplotlib must be installed; None writes none.
        *args: inputs, as for a call of the model, which select the graph; nothing is computed with them. By default it
            is the graph that ran last, else the one for default arguments.
        **kwargs: inputs by name.

    Raises:
        MfxError: the model cannot be captured, or the file cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"draw takes a torch.nn.Module, not {described(model)}.")
    file = _file(path)
    name = type(written(model)).__name__
    with waiting_for(f"drawing {name}"):
        drawing = Drawing(svg_of(name, pictures_of(model, args, kwargs)))
        if file is not None:
            _write(drawing, file)
    return drawing


def _write(drawing: Drawing, file: Path) -> None:
    try:
        if file.suffix.lower() in SUFFIXES:
            paint(drawing.svg, file)
        else:
            file.write_text(drawing.svg, encoding="utf-8")
    except OSError as error:
        raise MfxError(f"draw: {file} cannot be written: {error.strerror}.") from error


def _file(path: Any) -> Path | None:
    if path is None:
        return None
    if not isinstance(path, str | os.PathLike):
        raise MfxError(
            f"draw: the second argument is the file to write, not {described(path)}; inputs come behind it: "
            "mfx.draw(net, 'net.svg', x), or mfx.draw(net, None, x) for a notebook."
        )
    file = Path(path)
    if file.suffix.lower() not in (".svg", *SUFFIXES):
        raise MfxError(
            f"draw writes .svg, .png and .pdf files; call the file {file.with_suffix('.svg').name}, not {file.name}."
        )
    if file.suffix.lower() in SUFFIXES:
        check_painter(file)
    return file
