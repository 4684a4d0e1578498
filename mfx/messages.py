"""Words that messages to the user have in common."""

from __future__ import annotations

from torch import nn

__all__ = ["described", "listed", "without_chains"]


def described(value: object) -> str:
    """What was given in a module's place, for messages."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def listed(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def without_chains(model: nn.Module) -> str:
    """What to say of a model in which there is nothing to rewrite."""
    return (
        f"{type(model).__name__} has no chain of residual adds to rewrite and is returned unchanged. Looked for: two "
        "or more sums x + f(x) in a row, where the sum is the x of the next one. mfx.explain(model) lists what came "
        "close."
    )
