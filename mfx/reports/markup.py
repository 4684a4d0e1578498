"""Text as HTML and SVG: escaped, in elements, and measured."""

from __future__ import annotations

import html
import re

_CHARACTER = 0.615  # of the font size; the usual fixed-width fonts need a little less
_FORBIDDEN = re.compile("[^\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2; and line breaks


def escape(text: str) -> str:
    """Return any text as XML and HTML; characters that XML forbids, and line breaks, become U+FFFD.

    >>> escape("a < b" + chr(0)) == "a &lt; b" + chr(0xFFFD)
    True
    """
    return html.escape(_FORBIDDEN.sub("\ufffd", text), quote=False)


def attribute(text: str) -> str:
    """Return any text as the value of an attribute, with its quotes."""
    return f'"{html.escape(_FORBIDDEN.sub(chr(0xFFFD), text))}"'


def text_width(text: str, size: float) -> float:
    """Return the width of a line of fixed-width text, in the units of its font size."""
    return len(text) * _CHARACTER * size


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, *children: str | Markup | None, **attributes: str | None) -> Markup:
    """Return an element; what is not `Markup` in it is escaped, None is left out, ``class_`` is ``class``.

    >>> str(element("p", "a < b", element("b", "!"), class_="x"))
    '<p class="x">a &lt; b<b>!</b></p>'
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = "".join(f" {key}={attribute(value)}" for key, value in named.items())
    return Markup(f"<{name}{words}>{joined(*children)}</{name}>")


def joined(*children: str | Markup | None) -> Markup:
    """Return several pieces behind each other, escaped as in `element`."""
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children if child))


def _escaped(text: str) -> str:
    return "\n".join(map(escape, text.split("\n")))  # XML's escape is HTML's, outside of attributes
