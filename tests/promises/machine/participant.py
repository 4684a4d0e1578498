"""Participants: the plain model and its nets, each in a world of its own that the same actions go through."""

import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mfx
from tests.promises.machine import layers, models

LOGS: dict[str, list[Any]] = {}
"""Notes of user hooks, by participant: outside of all models, so that copies of a hook write there, too."""

SAID = re.compile(  # what the README's limits announce
    r"mfx: (hooks on .* will not run|loading weights|.* is called by itself|the residual add .* is left as it was|"
    r"forward hooks on .* may run again|.* is called inside of torch.nn.utils.parametrize.cached|"
    r".* has no chain|.* cannot be captured as one graph|chain .*: the backward pass runs steps a second time)"
)


class Interrupted(BaseException):
    """An exception that is not an Exception, as KeyboardInterrupt."""


@dataclass(eq=False)
class Call:
    """A forward pass whose backward pass is to come.

    Attributes:
        outputs: its tensors with a history.
        leaves: what a gradient is asked for beside parameters: inputs, fast weights.
        disturbed: reasons why a recomputation may be refused by now.
        read: buffers that the call did not change, by identity.
    """

    outputs: list[Tensor]
    leaves: list[Tensor]
    disturbed: set[str] = field(default_factory=set)
    read: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Error:
    """An exception that an action raised."""

    type: str
    message: str


class Participant:
    """A model or net, its copies, and everything that belongs to it.

    Args:
        name: "plain", or of a net.
        model: the module.

    Attributes:
        models: the module and copies of it, of which the last one is worked with.
        calls: forward passes whose backward pass is to come.
        retired: parameters that were replaced, and may get gradients yet.
        states: of the random generators that this participant draws from.
        warned: what the last action warned of, but for what is announced.
    """

    def __init__(self, name, model):
        self.name = name
        self.models = [model]
        self.calls: list[Call] = []
        self.retired: list[Tensor] = []
        self.states = seeded_states()
        self.warned: list[str] = []
        self.reasons: set[str] = set()
        LOGS[name] = []

    @property
    def model(self) -> nn.Module:
        """The module that is worked with."""
        return self.models[-1]

    @property
    def is_momentum(self) -> bool:
        """True if it is a net with another function than the model's."""
        return self.name.startswith("momentum")

    @property
    def log(self) -> list[Any]:
        """The notes of user hooks."""
        return LOGS[self.name]

    def layers(self, of=nn.Module) -> list[nn.Module]:
        """Return the modules inside of branches that hold no chain, in a fixed order."""
        return [
            module
            for path, module in self.model.named_modules()
            if re.search(r"branches\.\d+\.\d+", path)
            and isinstance(module, of)
            and "parametrizations" not in path
            and not any(isinstance(inner, models.Chain) for inner in module.modules())
        ]

    def apply(self, action, arguments) -> Any:
        """Return what an action results in, or the `Error` that it raised."""
        calls, before = list(self.calls), self._buffers()
        with self._world(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = action(self, **arguments)
            except (Exception, Interrupted) as error:
                result = Error(type(error).__name__, str(error))
        self._note_changed_buffers(calls, before)
        said = [str(warning.message) for warning in caught]
        self.warned = [message for message in said if message.startswith("mfx") and not SAID.match(message)]
        return result

    @contextmanager
    def _world(self) -> Iterator[None]:
        outside = random_states()
        set_random_states(self.states)
        try:
            yield
        finally:
            self.states = random_states()
            set_random_states(outside)

    def _buffers(self) -> dict[int, tuple[Tensor, int]]:
        buffers = (buffer for model in self.models for buffer in model.buffers())
        return {id(buffer): (buffer, buffer._version) for buffer in buffers if not buffer.is_inference()}

    def _note_changed_buffers(self, calls: list[Call], before: dict[int, tuple[Tensor, int]]) -> None:
        """Note, for calls under way, that a buffer has changed which they did not change themselves.

        So it is with statistics of a normalization, if a call in evaluation waits while one in training runs.
        """
        same = {key: buffer for key, (buffer, version) in before.items() if buffer._version == version}
        for call in self.calls:
            if call not in calls:
                call.read = same
            elif call.read.keys() & (before.keys() - same.keys()):
                call.disturbed.add("statistics")

    def disturb(self, reason: str) -> None:
        """Note that something was changed that calls under way may depend on."""
        for call in self.calls:
            call.disturbed.add(reason)

    def forget(self) -> None:
        """Drop calls and gradients."""
        self.calls.clear()
        for parameter in (*self.retired, *(p for model in self.models for p in model.parameters())):
            parameter.grad = None


def seeded_states():
    """Return states of the three random generators, always the same."""
    outside = random_states()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = random_states()
    set_random_states(outside)
    return states


def random_states():
    """Return the states of the random generators of torch, Python and numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def set_random_states(states) -> None:
    """Set the states of the random generators of torch, Python and numpy."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002


GROUPS = {"plain": ("zero_exact", "zero_float"), "momentum_kept": ("momentum",)}
"""Those that every action must leave alike: a reference, and who is compared with it."""


def participants(spec) -> dict[str, Participant]:
    """Return the plain model and its nets, each over weights of its own."""
    chosen = spec["options"]
    common = {"recompute": chosen["recompute"]}
    zero = {"gamma": 0.0, "capture": chosen["capture"]}  # another γ and "dynamo": an error where a call is no one graph
    options = {
        "zero_exact": zero,
        "zero_float": {**zero, "arithmetic": "float"},
        "momentum_kept": {"gamma": chosen["gamma"], "memory_budget": 1.0},
        "momentum": {"gamma": chosen["gamma"]},
    }
    plain = models.build(spec)
    for module in plain.modules():
        if isinstance(module, layers.Checkpointed):
            module.is_called = True  # torch's checkpoint runs it again with the weights and hooks of the backward pass
    # No copies of one model: these share the classes that torch makes for parametrized modules.
    nets = {name: mfx.momentumize(models.build(spec), **common, **options[name]) for name in options}
    return {name: Participant(name, model) for name, model in {"plain": plain, **nets}.items()}
