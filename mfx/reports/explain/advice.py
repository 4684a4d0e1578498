"""What could be done about what an explanation shows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from mfx.text import size

# What Hugging Face models return beside their result, and how to do without.
OPTIONAL_OUTPUTS = {
    "past_key_values": "use_cache=False",
    "hidden_states": "output_hidden_states=False",
    "encoder_hidden_states": "output_hidden_states=False",
    "decoder_hidden_states": "output_hidden_states=False",
    "attentions": "output_attentions=False",
    "cross_attentions": "output_attentions=False",
    "encoder_attentions": "output_attentions=False",
    "decoder_attentions": "output_attentions=False",
    "router_logits": "output_router_logits=False",
}

PRETRAINED = "to go on from trained weights, start at gamma=0 and raise it in training (mfx.GammaScheduler)"

_REMEDIES = {
    "both sides of the sum are computed": "nothing, if the shortcut changes the shape; else write the step as x + f(x)",
    "scaled or subtracted": "scale the branch instead of the skip: x + c*f(x)",
    "rearranged on its way": "add before rearranging, or rearrange the sum back",
    "a single residual step": "nothing is lost: one step has nothing to walk back over",
    "a chain of .* chains have at least": "lower min_steps to rewrite it",
    "partly inside a step of another chain": "leave the other chain out with skip= to rewrite this one",
    "left out by only/skip": "change only= or skip= to rewrite it",
    "changes in place a value that lives on outside": "write x = x + f(x) in the place of x += f(x), or give a clone",
    "changes in place a value": "use the out-of-place operation (y = y.relu() for y.relu_())",
    "changes the stream in place": "use the out-of-place operation, or take the view after it",
    "the sum is in place and gives": "write x = x + f(x) in the place of x += f(x), or cast the branch",
    "not floating point": "nothing: only floating-point streams have gradients",
    "the step changes the stream from": "let the branch give the stream's own shape and dtype, on its device",
    "is broadcast over the stream": "expand the branch to the stream's shape: x + f(x).expand_as(x)",
}


def remedy(reason: str) -> str:
    """What could be done about a rejection, ``""`` if nothing is known.

    Args:
        reason: the rejection's.
    """
    return next((what for pattern, what in _REMEDIES.items() if re.search(pattern, reason)), "")


def advise_on_weights(weights: Sequence[float], gamma: float) -> str:
    """What to do where most branches of a chain count for less than half of what they did, ``""`` elsewhere.

    Branch t of T counts 1 − γ^(T−t), so half of the branches or more count for at least a half if and only if
    γ^(⌊T/2⌋+1) ≤ 1/2.

    Args:
        weights: of the branches, first to last.
        gamma: γ.
    """
    small = sum(weight < 0.5 for weight in weights)
    if gamma == 0 or 2 * small <= len(weights):
        return ""
    enough = math.floor(100 * 0.5 ** (1 / (len(weights) // 2 + 1))) / 100
    return (
        f"{small} of {len(weights)} branches count for less than half of what they did, the last for "
        f"{weights[-1]:.2g}; at gamma={enough:g} at least half of them count for more"
    )


def advise_on_output(held: Mapping[str, int]) -> list[str]:
    """How to save what is kept for nothing but the output.

    Args:
        held: bytes by key of the output.
    """
    return [
        f"the output's {key} escapes the chains: pass {OPTIONAL_OUTPUTS[key]} to save another {size(number)}"
        for key, number in held.items()
        if number
    ]
