"""The part of its streams that a chain keeps between forward and backward, and the reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from mfx.engine import Stream, choose_storage
from mfx.program.chain_call import Momentum
from mfx.text import count, size

_STATES = {"exact": "integer states and a store of digits", "float": "states"}


@dataclass(frozen=True)
class ExplainedStorage:
    """The part of its streams that one call of a chain keeps for its backward pass.

    Attributes:
        streams: shape and dtype of each stream.
        policy: ``"states"`` that others are rebuilt from, ``"inputs"`` of all steps, or ``"activations"``, as ordinary
            backpropagation does.
        states: bytes that states take, with the digit store or with anchors; None if none can be rebuilt.
        inputs: bytes that the steps' inputs take.
        anchors: number of states beside the end state among those states.
        error: predicted relative error in a rebuilt state; 0 if it is the forward pass's, bit for bit.
        reason: the reason for this policy.
    """

    streams: tuple[Stream, ...]
    policy: str
    states: int | None
    inputs: int
    anchors: int
    error: float
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first stream."""
        return self.streams[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first stream."""
        return self.streams[0].dtype

    @property
    def kept(self) -> int | None:
        """Bytes kept; None if autograd decides that (``"activations"``)."""
        return {"states": self.states, "inputs": self.inputs}.get(self.policy)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        streams = [{"shape": list(s.shape), "dtype": str(s.dtype).removeprefix("torch.")} for s in self.streams]
        return {**self.__dict__, **streams[0], "streams": streams, "kept": self.kept}


def explain_storage(call: Momentum, streams: tuple[Stream, ...]) -> ExplainedStorage:
    """Explain what a call of a chain on such streams keeps, by the same decision as the call's."""
    steps = len(call.graphs.steps)
    plan, arithmetic = call.settings.plan, call.settings.arithmetic
    keeps_all = plan is not None and len(plan.kept) == steps
    found = choose_storage(arithmetic, call.gamma, streams, keeps_all=keeps_all)
    states = None if math.isinf(found.states) else round(found.states)
    inputs = round(found.inputs)
    if found.policy == "activations":
        reason = "memory_budget=1.0: kept as in ordinary backpropagation"
    elif call.gamma.is_zero:
        reason = f"gamma = 0: nothing can be walked back, the inputs of {steps} steps take {size(inputs)}"
    else:
        kind = _STATES[arithmetic.name] + (f" with {count(found.anchors, 'anchor')}" if found.anchors else "")
        takes = "an anchor every other step or so" if states is None else size(states)
        reason = f"{kind}: {takes}; inputs of {steps} steps: {size(inputs)}"
        if found.policy == "inputs" and states is not None and states < inputs:
            reason += ", which is no more than states of full width"  # the reference that decides
    if call.plans is not None and call.plans.budget.is_partial:
        reason += f"; as far as memory_budget={call.plans.budget} goes, steps keep their activations instead"
    if call.settings.offload and found.policy != "activations":
        reason += "; all of it that takes a MiB or more in host memory, but for what the caller holds"
    return ExplainedStorage(tuple(streams), found.policy, states, inputs, found.anchors, found.error, reason)
