"""Numbers, names and sentences as messages and reports show them."""

from __future__ import annotations

from torch import nn


def described(value: object) -> str:
    """Return a phrase for a value that should have been a module, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def listed(names: list[str]) -> str:
    """Return the first few names as a list in words."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def shorten(text: str, characters: int) -> str:
    """Return a text with its middle cut out if it is too long: the ends of paths tell most.

    >>> shorten("encoder.layers.encoder_layer_11", 15)
    'encoder…ayer_11'
    """
    if len(text) <= characters:
        return text
    half = (characters - 1) // 2
    return f"{text[: characters - 1 - half]}…{text[-half:]}"


def without_chains(model: nn.Module, consequence: str) -> str:
    """Return the warning for a model in which there is nothing to rewrite, with what follows from that."""
    return (
        f"{type(model).__name__} has no chain of residual adds to rewrite and {consequence}. Looked for: two "
        "or more sums x + f(x) in a row, where the sum is the x of the next one. mfx.explain(model) lists what came "
        "close."
    )


def size(number: float) -> str:
    """Return a number of bytes in words.

    >>> size(512), size(1536), size(3 * 2**40)
    ('512 B', '1.5 KiB', '3.0 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(number, 1) < 1024:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def amount(number: float, unit: str) -> str:
    """Return a large number of units, abbreviated by powers of ten.

    >>> amount(1234567, "FLOP"), amount(17, "FLOP")
    ('1.23 MFLOP', '17 FLOP')
    """
    prefixes = ("", "k", "M", "G", "T", "P")
    power = 0
    while number >= 999.5 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {prefixes[power]}{unit}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where needed.

    >>> count(1, "step"), count(3, "step")
    ('1 step', '3 steps')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time in words.

    >>> duration(0.05), duration(2.5)
    ('50.0 ms', '2.50 s')
    """
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def ratio(value: float, first: float) -> str:
    """Return a value as a multiple of another, ``"–"`` if that one is 0.

    >>> ratio(3, 4), ratio(3, 0)
    ('0.75×', '–')
    """
    return f"{value / first:.2f}×" if first else "–"
