"""The data that a chain's call takes and gives: steps, settings, the call itself, its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from mfx.engine.arithmetic import BLOCK_KERNELS, Kernels, State
from mfx.engine.memory.plan import ChainPlan, StepCost
from mfx.engine.offload import Offload
from mfx.modules.state_lock import StateLock
from mfx.options.gamma import Gamma, check_velocity_with
from mfx_passes.ir import Container

ChainCache = dict[Any, Any]


class Phase(Enum):
    """The phases of a step in a training step: its branch runs, has run, and the gradient of its values has come."""

    RUN = "run"
    DONE = "done"
    GRADIENT = "gradient"


Mark = Callable[[int, Phase], None]
StepOutputs = tuple[Sequence[Any], Sequence[Any]]  # the values for the streams, and side outputs


def mark_gradients(mark: Mark, step: int, values: Iterable[Tensor]) -> None:
    """Call ``mark`` with the number of a step when the gradients of its values have come."""
    for value in values:
        if value.requires_grad:
            value.register_hook(lambda _: mark(step, Phase.GRADIENT))


@dataclass(frozen=True)
class StepFunction:
    """One step of a chain.

    Attributes:
        path: the step's module path in the user's model, for messages.
        kinds: for each value of the branch, "residual" if it is f(x); "map" if it is h(x), where f = h(x) − x is formed
            in the chain's arithmetic.
        branch: ``branch(root, *xs, *captures)`` gives ``(*ys, *side_outputs)``.
        original: ``original(root, *xs, *captures)`` gives ``(*xs_next, *side_outputs)``: the step before it was
            rewritten.
        captures: numbers of the chain's captures that the step reads; numbers past them are side outputs of earlier
            steps, counted from the first step on, which must not be tensors.
        targets: dotted paths of the modules and tensors that the step reads through the root.
        reads: numbers of the streams that the branch reads, as they are before the step.
        writes: numbers of the streams that it gives values for.
    """

    path: str
    kinds: tuple[str, ...]
    branch: Callable[..., tuple[Any, ...]]
    original: Callable[..., tuple[Any, ...]]
    captures: tuple[int, ...]
    targets: tuple[str, ...]
    reads: tuple[int, ...] = (0,)
    writes: tuple[int, ...] = (0,)

    def split(self, outputs: Sequence[Any]) -> StepOutputs:
        """Return the values for the streams, and the side outputs."""
        count = len(self.writes)
        return outputs[:count], outputs[count:]


@dataclass(frozen=True)
class ChainSettings:
    """The settings by which a chain runs, made once and handed on as one object.

    Attributes:
        gamma: γ. At 0 the steps' ``original`` functions run, and of each only the input is kept. With signs, every call
            draws them.
        arithmetic: the class of the chain's state.
        velocity: v before the first step: "zero"; "residual": such that v after the first step is f(x); "module": an
            argument of the call.
        verify: "warn", "raise" or "off": what to do if a backward pass in exact arithmetic does not end where the
            forward pass began. On a CPU at once; elsewhere "raise" at the end of the backward pass, "warn" later.
        plan: what the steps keep for the backward pass; None: as little as possible. The function is the same.
        kernels: the implementation of the elementwise work of exact arithmetic. The values are the same.
        lock: the lock of the modules that the steps read.
        offload: keep what is kept between forward and backward in host memory. The function is the same.
    """

    gamma: Gamma
    arithmetic: type[State]
    velocity: str = "zero"
    verify: str = "warn"
    plan: ChainPlan | None = None
    kernels: Kernels = BLOCK_KERNELS
    lock: StateLock = field(default_factory=StateLock, compare=False)
    offload: bool = False

    def __post_init__(self) -> None:
        check_velocity_with(self.gamma, is_default=self.velocity == "zero")


@dataclass(frozen=True)
class ChainCall:
    """The arguments of one call of a chain, see `run_chain`.

    Attributes:
        plan: the decided plan: that of the settings, or of the step around the call.
        mark: called with the number of a step when a phase of it begins.
        offload: moves what the call keeps to host memory; None: it stays where it is.
    """

    name: str
    steps: Sequence[StepFunction]
    captures: Sequence[Any]
    root: Any
    settings: ChainSettings
    plan: ChainPlan
    v0: Sequence[Tensor | None]
    taps: Sequence[tuple[int, int]]
    containers: Sequence[Container]
    cache: ChainCache
    costs: list[StepCost] | None
    mark: Mark | None = None
    offload: Offload | None = None

    @property
    def updates(self) -> list[int]:
        """The number of updates of each stream."""
        counts = Counter(stream for step in self.steps for stream in step.writes)
        return [counts[stream] for stream in range(len(self.v0))]

    @property
    def keeps_all(self) -> bool:
        """True if all steps keep their activations, as ordinary backpropagation does."""
        return len(self.plan.kept) >= len(self.steps)

    @property
    def verifies(self) -> bool:
        """True if recomputations are compared with the forward pass."""
        return self.settings.arithmetic.verifiable and self.settings.verify != "off"


@dataclass
class ChainOutput:
    """The streams ``xs`` after the last step, the ``taps`` asked for, and each step's side outputs, ``sides``."""

    xs: tuple[Tensor, ...]
    taps: tuple[Tensor, ...]
    sides: tuple[tuple[Any, ...], ...]
