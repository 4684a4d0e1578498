"""What an arithmetic is: the numbers x and v of a chain, and how a step moves them on and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels
from mfx.options.gamma import Gamma


class Frozen(NamedTuple):
    """A state as tensors, and how to make it a state again: one that never writes into those tensors."""

    tensors: tuple[Tensor, ...]
    thaw: Callable[[tuple[Tensor, ...]], State]


class State(ABC):
    """x and v of one chain at one time, in the chain's own arithmetic, beside autograd.

    Forward: ``advance`` for every step. Back: for every step from the last, run the branch on what ``retreat_x``
    gives, ``retreat_v`` with what the branch gave. A state that was thawed owns its tensors only once it has moved.
    """

    name: ClassVar[str]  # as the user writes it
    verifiable: ClassVar[bool]  # walking back leads to where it came from, bit for bit
    rounds_input: ClassVar[bool]  # the first branch reads something other than the chain's input

    @classmethod
    @abstractmethod
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool, kernels: Kernels = BLOCK_KERNELS) -> Self:
        """The state before the first step.

        Args:
            x: the stream.
            v: None is no velocity.
            reversible: whether ``retreat_x`` and ``retreat_v`` will be asked for.
            kernels: who does the elementwise work, if the arithmetic has any.
        """

    @staticmethod
    @abstractmethod
    def anchor_every(gamma: Gamma, dtype: torch.dtype) -> int | None:
        """How many steps can be walked back before an anchor is needed; None: any number."""

    @staticmethod
    @abstractmethod
    def bytes_kept(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        """Bytes per element that a chain of so many steps keeps to walk back."""

    @abstractmethod
    def stream(self) -> Tensor:
        """X in the stream's dtype: what the next branch reads. Nobody may write into it."""

    @abstractmethod
    def advance(self, y: Tensor, kind: str, gamma: Gamma) -> Tensor:
        """V ← γ·v + (1−γ)·f, x ← x + v, where f is ``y``, or ``y`` − x for ``kind`` "map"; returns the stream."""

    @abstractmethod
    def retreat_x(self) -> Tensor:
        """X ← x − v; returns the stream."""

    @abstractmethod
    def retreat_v(self, y: Tensor, kind: str, gamma: Gamma) -> None:
        """V ← (v − (1−γ)·f) / γ, after ``retreat_x``."""

    @abstractmethod
    def freeze(self) -> Frozen:
        """This state as tensors; from now on it writes into none of them."""

    def remember_start(self) -> None:
        """Walks back will end here, not before the first step: let ``is_start`` recognise this; if ``verifiable``."""
        raise NotImplementedError

    def is_start(self) -> Tensor:
        """Whether a state that was walked back is the one it started as, or was marked as; if ``verifiable``."""
        raise NotImplementedError

    def overflowed(self) -> Tensor | None:
        """The largest magnitude of a finite value if it was too large, else 0, as a 0-dim tensor; None: it was not."""
        return None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The floating dtype in which states, and gradients of velocities, are kept for a stream of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
