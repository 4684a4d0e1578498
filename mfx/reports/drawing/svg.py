"""The SVG document of a drawing: boxes below each other, edges beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mfx.reports.drawing.boxes import ChainBox, ModuleBox, Picture
from mfx.reports.drawing.shapes import FONT, STYLE, Shape, line, shape
from mfx.reports.markup import attribute, text_width

_MARGIN = 16.0
_GAP = 24.0  # between boxes
_LANE = 12.0  # between edges beside the boxes
_LEGEND = (
    "momentum chain (blue): v ← γ·v + (1−γ)·f(x), x ← x + v",
    "x + f(x): f is what is added; h(x): f = h(x) − x",
)


def svg_of(name: str, pictures: Sequence[Picture]) -> str:
    """Return pictures below each other as one SVG document, which loads nothing, and is light or dark as the system is.

    Args:
        name: name of the model.
        pictures: the pictures of its graphs.
    """
    pictures = pictures or [Picture("", (ModuleBox(name, "no chain in any part", name),), ())]
    columns = [_Column(picture, titled=len(pictures) > 1) for picture in pictures]
    has_chain = any(isinstance(box, ChainBox) for picture in pictures for box in picture.boxes)
    legend = [line(0, 12 + 16 * i, text, "small") for i, text in enumerate(_LEGEND)] if has_chain else []
    width = max([column.width for column in columns] + [text_width(text, 11) for text in _LEGEND if has_chain])
    elements, y = [], _MARGIN
    for column in columns:
        elements.append(f'<g transform="translate({_MARGIN:g} {y:g})">{column.svg}</g>')
        y += column.height + 2 * _GAP
    elements.append(f'<g transform="translate({_MARGIN:g} {y - _GAP:g})">{"".join(legend)}</g>')
    full, height = width + 2 * _MARGIN, y - _GAP + 16 * len(legend) + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mfx-drawing" viewBox="0 0 {full:.0f} {height:.0f}" '
        f'width="{full:.0f}" height="{height:.0f}" role="img" aria-label={attribute(f"rewritten graph of {name}")}>'
        f'<style>{STYLE}</style><rect class="ground" width="100%" height="100%"/>{"".join(elements)}</svg>\n'
    )


class _Column:
    """A picture with its boxes below each other."""

    def __init__(self, picture: Picture, *, titled: bool) -> None:
        shapes = [shape(box) for box in picture.boxes]
        title = picture.title if titled else ""
        self._box_width = max([drawn.width for drawn in shapes] + [text_width(title, FONT)], default=0.0)
        self._shapes: list[tuple[Shape, float]] = []
        y = 2 * _GAP if title else 0.0
        for drawn in shapes:
            self._shapes.append((drawn, y))
            y += drawn.height + _GAP
        self.height = max(y - _GAP, 0.0)
        beside, lanes = self._beside(picture.edges)
        self.width = self._box_width + _LANE * (lanes + 1) * bool(lanes)
        boxes = [drawn.at((self._box_width - drawn.width) / 2, y) for drawn, y in self._shapes]
        heading = [line(0, 14, title, "name")] if title else []
        self.svg = "".join([*heading, *self._straight(picture.edges), *beside, *boxes])

    def _straight(self, edges: Sequence[tuple[int, int]]) -> list[str]:
        """Return the edges from a box to the next."""
        x = self._box_width / 2
        found = []
        for source, target in edges:
            if target == source + 1:
                drawn, y = self._shapes[source]
                below = self._shapes[target][1]
                found.append(f'<path class="edge" d="M{x:g} {y + drawn.height:g}V{below - 6:g}"/>{_head(x, below)}')
        return found

    def _beside(self, edges: Sequence[tuple[int, int]]) -> tuple[list[str], int]:
        """Return the edges past other boxes, and their number of lanes: edges from one box share a lane."""
        targets: defaultdict[int, list[int]] = defaultdict(list)
        for source, target in edges:
            if target != source + 1:
                targets[source].append(target)
        free_from: list[float] = []  # per lane, the y below which it is free
        found = []
        for source, reached in sorted(targets.items()):
            drawn, y = self._shapes[source]
            start, ends = y + drawn.height / 2, [self._entry(target) for target in reached]
            lane = next((i for i, free in enumerate(free_from) if free < start), len(free_from))
            free_from[lane : lane + 1] = [max(ends)]
            x = self._box_width + _LANE * (lane + 1)
            found.append(
                f'<path class="edge" d="M{(self._box_width + drawn.width) / 2:g} {start:g}H{x:g}V{max(ends):g}"/>'
            )
            for target, end in zip(reached, ends, strict=True):
                side = (self._box_width + self._shapes[target][0].width) / 2
                found.append(f'<path class="edge" d="M{x:g} {end:g}H{side + 6:g}"/>{_head(side, end, left=True)}')
        return found, len(free_from)

    def _entry(self, target: int) -> float:
        """Return the y of edges that arrive from the side: above the middle, which is where edges leave."""
        drawn, y = self._shapes[target]
        return y + min(drawn.height / 4, 14)


def _head(x: float, y: float, *, left: bool = False) -> str:
    corners = f"{x:g},{y:g} {x + 7:g},{y - 4:g} {x + 7:g},{y + 4:g}" if left else ""
    return f'<polygon class="head" points="{corners or f"{x:g},{y:g} {x - 4:g},{y - 7:g} {x + 4:g},{y - 7:g}"}"/>'
