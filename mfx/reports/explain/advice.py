"""Advice about what an explanation shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mfx.text import size

# Outputs of Hugging Face models beside their result, and the argument that leaves each out.
OPTIONAL_OUTPUTS = {
    "past_key_values": "use_cache=False",
    "cache": "use_cache=False",  # its name from transformers 5.24 on
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


TOO_SHORT = "too short for gamma > 0 to save memory: gamma=0 keeps the same inputs, and the function"


def advise_on_weights(weights: Sequence[float], gamma: float) -> str:
    """Return advice if most branches of a chain count for less than half of what they did, else ``""``.

    Branch t of T counts 1 − γ^(T−t), so half of the branches or more count for at least a half if and only if
    γ^(⌊T/2⌋+1) ≤ 1/2.

    Args:
        weights: weights of the branches, first to last.
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
    """Return advice on memory that is kept for the output only.

    Args:
        held: bytes by key of the output.
    """
    return [
        f"the output's {key} escapes the chains: pass {OPTIONAL_OUTPUTS[key]} to save another {size(number)}"
        for key, number in held.items()
        if number
    ]
