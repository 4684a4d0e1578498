"""HTML whose text is escaped unless it was made here."""

from __future__ import annotations

import html

from mfx.drawing.text import escape

__all__ = ["Markup", "element", "joined"]


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: str | Markup | None, **attributes: str | None) -> Markup:
    """An element; what is no `Markup` in it is escaped, None is left out, ``class_`` is ``class``.

    >>> str(element("p", "a < b", element("b", "!"), class_="x"))
    '<p class="x">a &lt; b<b>!</b></p>'
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = "".join(f' {key}="{html.escape(value)}"' for key, value in named.items())
    return Markup(f"<{name}{words}>{joined(*children)}</{name}>")


def joined(*children: str | Markup | None) -> Markup:
    """Several pieces behind each other, escaped as in `element`."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children if child))


def _escaped(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))  # XML's escape is HTML's, outside of attributes
