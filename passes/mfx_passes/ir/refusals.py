"""The refusals: all reasons for which residual adds stay as they are, with remedies."""

from __future__ import annotations

from enum import Enum


class Refusal(Enum):
    """A reason to leave a residual add as it is.

    Args:
        reason: the text for a residual add, a format string for the facts that a rejection holds.
        condition: the text for any residual add, for a table.
        why: the reason why such a residual add cannot be rewritten, for a table.
        remedy: a way to have it rewritten, ``""`` if none is known.
    """

    def __init__(self, reason: str, condition: str, why: str, remedy: str) -> None:
        self.reason = reason
        self.condition = condition
        self.why = why
        self.remedy = remedy

    MERGE = (
        (
            "both sides of the sum are computed (a projection shortcut, or two branches merging): there is no state "
            "that is carried on unchanged"
        ),
        "both sides of the sum are computed (projection shortcut, two branches merging)",
        "no state is carried on unchanged; the chain starts after it",
        "nothing, if the shortcut changes the shape; else write the step as x + f(x)",
    )
    SINGLE = (
        "a single residual step; chains have at least {min_steps}",
        "it is a single residual step",
        "nothing to gain",
        "min_steps=1 rewrites it, too: it keeps its input, and its branch runs twice",
    )
    SHORT = (
        "a chain of {steps} steps; chains have at least {min_steps}",
        "its chain is shorter than `min_steps`",
        "you asked for longer ones",
        "lower min_steps to rewrite it",
    )
    SCALED = (
        "the skip is scaled, gated or subtracted, and no plain step x + f(x) is in its chain",
        "the skip is scaled, gated or subtracted, and no plain step x + f(x) is in its chain",
        "gates and encodings of positions have such sums, too",
        "name it with only= to have it rewritten",
    )
    RECURRENT = (
        "the skip is scaled, gated or subtracted, and {weights} is read in another step, too",
        "the skip is scaled, gated or subtracted, and another step reads the same weights",
        "a recurrence over time is no depth",
        "give each step weights of its own",
    )
    REARRANGED = (
        "the skip is rearranged on its way and not put back after the sum",
        "the skip is rearranged on its way and not put back after the sum",
        "the states would have different layouts",
        "add before rearranging, or rearrange the sum back",
    )
    CHANGES_INPUT = (
        "{node} changes in place a value that the branch is given from outside",
        "the branch changes in place a value it is given from outside",
        "running it again would change it again (without gradients it may write into a cache that it alone reads)",
        "use the out-of-place operation (y = y.relu() for y.relu_())",
    )
    CHANGED_LATER = (
        "{node} changes in place a value that the branch reads",
        "a value the branch reads is changed in place later",
        "recomputation would see another value",
        "use the out-of-place operation (y = y.relu() for y.relu_())",
    )
    DIFFERENTIATES = (
        "{node} differentiates in the branch through what lies outside of it, or by torch.func",
        "the branch differentiates by a value from outside or a parameter, or by `torch.func`",
        "run again alone, it has no history beyond its input, and torch.func takes no rebuilt tensors",
        "differentiate by the branch's own input, with torch.autograd.grad",
    )
    VIEW_READ = (
        "{node} changes the stream in place and a view of it is read afterwards",
        "the stream is changed in place and a view of it is read afterwards",
        "the view would see another value",
        "use the out-of-place operation, or take the view after it",
    )
    LIVES_OUTSIDE = (
        "{node} changes in place a value that lives on outside of the model's forward",
        "the sum changes in place a value from outside of the model (`x += f(x)` on its input)",
        "the caller would miss the change",
        "write x = x + f(x) in the place of x += f(x), or give a clone",
    )
    NARROWS = (
        "the sum is in place and gives {kept}, where x + f(x) would give {promoted}",
        "the sum is in place and narrows the result (`x_bf16 += f_fp32`)",
        "x + f(x) would give another dtype; found at the first call",
        "write x = x + f(x) in the place of x += f(x), or cast the branch",
    )
    CHANGES_SHAPE = (
        "the step changes the stream from {before} to {after}",
        "the step changes the stream's shape, dtype or device",
        "states must be alike; found at the first call (a warning)",
        "let the branch give the stream's own shape and dtype, on its device",
    )
    BROADCAST = (
        "the branch {branch} is broadcast over the stream {stream}",
        "the branch is broadcast over the stream",
        "velocity and states must be alike; found at the first call (a warning)",
        "expand the branch to the stream's shape: x + f(x).expand_as(x)",
    )
    NOT_FLOATING = (
        "the stream is {dtype}, not floating point{enough}",
        "the stream is not floating point, or of 8 bits",
        "no gradient, no reversal",
        "nothing: only floating-point streams of at least 16 bits have gradients",
    )
    CROSSING = (
        "the chain lies partly inside a step of another chain",
        "the chain lies partly inside a step of another chain",
        "only nested or separate chains can be rewritten",
        "leave the other chain out with skip= to rewrite this one",
    )
    LEFT_OUT = (
        "left out by only/skip",
        "it was left out by `only`/`skip`",
        "you asked for it",
        "change only= or skip= to rewrite it",
    )
    UNNAMED = (
        "it lies in none of the sub layers that were asked for",
        "it lies in none of the sub layers that were asked for",
        "you asked for these alone",
        "",
    )
    OTHER = ("{reason}", "the caller of the passes refused it by name", "its own reason", "")


def table() -> list[str]:
    """Return all refusals as rows of a Markdown table: the condition, and why."""
    rows = [f"| {refusal.condition} | {refusal.why} |" for refusal in Refusal if refusal is not Refusal.OTHER]
    return ["| a residual add stays as it was if | why |", "|---|---|", *rows]
