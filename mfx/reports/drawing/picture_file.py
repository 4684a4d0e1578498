"""A drawing as a PNG or PDF file: its SVG document, of which it uses little, painted by matplotlib."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from mfx.reports.drawing.shapes import FONT, STYLE
from mfx.reports.markup import text_width
from mfx_passes import MfxError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf")
_SIZE = re.compile(r"([\d.]+)px")
_PIXELS = 144  # per inch, of which the document's units are 72
_LONGEST = 60_000  # pixels that a side of a PNG may have


def check_painter(file: Path) -> None:
    """Check that there is what paints.

    Raises:
        MfxError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MfxError(
            f"draw paints {file.suffix} files with matplotlib: pip install 'mfx[report]', or matplotlib itself. "
            f"Without it, draw writes {file.with_suffix('.svg').name}."
        ) from error


def paint(svg: str, file: Path) -> None:
    """Write an SVG document of a drawing as PNG or PDF, by the file's suffix, in light colours."""
    figure = figure_of(svg)
    longest = max(figure.get_size_inches())
    figure.savefig(file, dpi=min(_PIXELS, _LONGEST / longest), facecolor=figure.get_facecolor())


def figure_of(svg: str) -> Figure:
    """Return an SVG document of a drawing as a figure."""
    from matplotlib.figure import Figure  # not pyplot, which opens windows and shares state

    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    figure = Figure(figsize=(width / 72, height / 72), facecolor=_style("ground")["fill"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    _Painter(axes).paint(root, 0.0, 0.0)
    return figure


class _Painter:
    """Paints SVG elements on axes."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._layer = 0

    def paint(self, element: ElementTree.Element, x: float, y: float) -> None:
        """Paint an element and what is in it, at a position."""
        for child in element:
            kind = child.tag.rpartition("}")[2]
            if kind == "g":
                moved = [float(number) for number in re.findall(r"-?[\d.]+", child.get("transform", "0 0"))]
                self.paint(child, x + moved[0], y + moved[1])
            elif kind in ("rect", "path", "polygon", "text"):
                self._layer += 1
                getattr(self, f"_{kind}")(child, x, y, _style(child.get("class", "")))

    def _rect(self, element: ElementTree.Element, x: float, y: float, style: Mapping[str, str]) -> None:
        from matplotlib.patches import FancyBboxPatch

        if element.get("class") == "ground":
            return  # the figure's own
        corner, size = float(element.get("rx", 0)), (float(element.attrib["width"]), float(element.attrib["height"]))
        left, top = x + float(element.get("x", 0)), y + float(element.get("y", 0))
        box = FancyBboxPatch((left, top), *size, boxstyle=f"round,pad=0,rounding_size={corner}", **self._colours(style))
        self._axes.add_patch(box)

    def _polygon(self, element: ElementTree.Element, x: float, y: float, style: Mapping[str, str]) -> None:
        from matplotlib.patches import Polygon

        corners = [tuple(map(float, corner.split(","))) for corner in element.attrib["points"].split()]
        self._axes.add_patch(Polygon([(x + a, y + b) for a, b in corners], **self._colours(style)))

    def _path(self, element: ElementTree.Element, x: float, y: float, style: Mapping[str, str]) -> None:
        points = [(x, y)]
        for command, text in re.findall(r"([MVHvh])([^MVHvh]*)", element.attrib["d"]):
            (px, py), numbers = points[-1], [float(number) for number in text.split()]
            if command == "M":
                points = [(x + numbers[0], y + numbers[1])]
            elif command in "Hh":
                points.append(((x if command == "H" else px) + numbers[0], py))
            else:
                points.append((px, (y if command == "V" else py) + numbers[0]))
        width = float(style.get("stroke-width", 1))
        self._axes.plot(*zip(*points, strict=True), color=style["stroke"], linewidth=width, zorder=self._layer)

    def _text(self, element: ElementTree.Element, x: float, y: float, style: Mapping[str, str]) -> None:
        left, base = x + float(element.get("x", 0)), y + float(element.get("y", 0))
        for part in (element, *element):
            look = {**style, **(_style(part.get("class", "")) if part is not element else {})}
            self._words(part.text or "", left, base, look, element.get("text-anchor", "start"))
            left += text_width(part.text or "", FONT)

    def _words(self, text: str, x: float, y: float, style: Mapping[str, str], anchor: str) -> None:
        size = _SIZE.match(style.get("font-size", ""))
        self._axes.text(
            x,
            y,
            text.replace("$", r"\$"),
            color=style.get("fill", _style("")["fill"]),
            fontsize=float(size[1]) if size else FONT,
            family="DejaVu Sans Mono",
            weight="bold" if int(style.get("font-weight", 400)) > 500 else "normal",
            ha={"start": "left", "middle": "center", "end": "right"}[anchor],
            va="baseline",
            zorder=self._layer,
        )

    def _colours(self, style: Mapping[str, str]) -> dict[str, Any]:
        stroke = style.get("stroke", "none")
        width = float(style.get("stroke-width", 1))
        return {
            "facecolor": style.get("fill", "none"),
            "edgecolor": stroke,
            "linewidth": width,
            "zorder": self._layer,
        }


def _style(name: str) -> dict[str, str]:
    """Return the properties of a class in the style sheet, in light colours; of text for an empty name."""
    light = re.sub(r"@media.*?\} \}", "", STYLE, flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w+)", light))
    found: dict[str, str] = {}
    for selectors, body in re.findall(r"^([^{\n]+)\{([^}]*)\}", light, flags=re.MULTILINE):
        wanted = f".{name}" if name else "text"
        if any(selector.split()[-1] == wanted for selector in selectors.split(",") if selector.strip()):
            found.update(part.strip().split(": ", 1) for part in body.split(";") if ": " in part)
    return {key: re.sub(r"var\(--([\w-]+)\)", lambda m: colours[m[1]], value) for key, value in found.items()}
