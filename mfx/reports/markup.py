"""Text in a drawing: how wide it is, how it is cut, how it is escaped."""

from __future__ import annotations

import html
import re
from xml.sax.saxutils import escape as _escape
from xml.sax.saxutils import quoteattr as _quoteattr

_CHARACTER = 0.615  # of the font size: what the usual fixed-width fonts need, and a little more
_FORBIDDEN = re.compile("[^\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2; and line breaks


def escape(text: str) -> str:
    """Text as XML, whatever is in it; what XML cannot say at all becomes U+FFFD.

    >>> escape("a < b" + chr(0)) == "a &lt; b" + chr(0xFFFD)
    True
    """
    return _escape(_FORBIDDEN.sub("\ufffd", text))


def attribute(text: str) -> str:
    """Text as the value of an XML attribute, quotes included."""
    return _quoteattr(_FORBIDDEN.sub("\ufffd", text))


def width(text: str, size: float) -> float:
    """How wide a line of fixed-width text is, in the units of its font size."""
    return len(text) * _CHARACTER * size


def fit(text: str, characters: int) -> str:
    """Cut out of the middle what is too much: the ends of paths tell most.

    >>> fit("encoder.layers.encoder_layer_11", 15)
    'encoder…ayer_11'
    """
    if len(text) <= characters:
        return text
    half = (characters - 1) // 2
    return f"{text[: characters - 1 - half]}…{text[-half:]}"


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
