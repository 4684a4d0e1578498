"""The interface of an arithmetic: the numbers x and v of a chain, and how a step moves them on and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from mfx.engine.arithmetic.gradients import gradients_of
from mfx.engine.arithmetic.kernels import BLOCK_KERNELS, Kernels
from mfx.engine.arithmetic.signed import UpdateGamma
from mfx.options.gamma import Gamma


class Frozen(NamedTuple):
    """A state as tensors; ``thaw`` makes a state of them that never writes into them."""

    tensors: tuple[Tensor, ...]
    thaw: Callable[[tuple[Tensor, ...]], State]


class State(ABC):
    """x and v of one chain at one time, in the chain's own arithmetic, beside autograd.

    Forward: ``advance`` for every step. Back, for every step from the last: run the branch on the result of
    ``retreat_x``, then ``retreat_v`` with the branch's value. A state that was thawed owns its tensors only once it has
    moved.
    """

    name: ClassVar[str]  # as the user writes it
    verifiable: ClassVar[bool]  # walking back leads to where it came from, bit for bit
    needs_float64: ClassVar[bool]  # of the device
    rounds_input: ClassVar[bool]  # the first branch reads something other than the chain's input
    gradients = staticmethod(gradients_of)  # of a step's x, v and branch's value, from those of its outputs

    @classmethod
    @abstractmethod
    def start(cls, x: Tensor, v: Tensor | None, *, reversible: bool, kernels: Kernels = BLOCK_KERNELS) -> Self:
        """Return the state before the first step.

        Args:
            x: the stream.
            v: the velocity; None is zero.
            reversible: whether ``retreat_x`` and ``retreat_v`` will be called.
            kernels: the implementation of the elementwise work, where the arithmetic has a choice.
        """

    @staticmethod
    @abstractmethod
    def anchor_every(gamma: Gamma, dtype: torch.dtype) -> int | None:
        """Return the number of steps that can be walked back before an anchor is needed; None: any number."""

    @staticmethod
    @abstractmethod
    def bytes_counted(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        """Return the bytes per element that states count for where a chain decides between them and its inputs."""

    @classmethod
    def walks_back(cls, gamma: Gamma, dtype: torch.dtype, steps: int) -> bool:
        """True if a chain of so many steps on a stream of ``dtype`` keeps states rather than the steps' inputs."""
        return cls.bytes_counted(gamma, dtype, steps) < dtype.itemsize * steps

    @staticmethod
    @abstractmethod
    def bytes_kept(gamma: Gamma, dtype: torch.dtype, steps: int) -> float:
        """Return the bytes per element that a chain of so many steps keeps to walk back."""

    @abstractmethod
    def stream(self) -> Tensor:
        """Return x in the stream's dtype, the input of the next branch. It must not be written into."""

    @abstractmethod
    def advance(self, y: Tensor, kind: str, gamma: UpdateGamma) -> Tensor:
        """V ← γ·v + (1−γ)·f, x ← x + v, where f is ``y``, or ``y`` − x for ``kind`` "map". Return the stream."""

    @abstractmethod
    def retreat_x(self) -> Tensor:
        """X ← x − v. Return the stream."""

    @abstractmethod
    def retreat_v(self, y: Tensor, kind: str, gamma: UpdateGamma) -> None:
        """V ← (v − (1−γ)·f) / γ, after ``retreat_x``."""

    @abstractmethod
    def freeze(self) -> Frozen:
        """Return this state as tensors, into which it does not write from now on."""

    def remember_start(self) -> None:
        """Let ``is_start`` recognize the present state: walks back end here, not before the first step.

        Only if ``verifiable``.
        """
        raise NotImplementedError

    def is_start(self) -> Tensor:
        """True if a state that was walked back is the first one, or ``remember_start``'s; if ``verifiable``."""
        raise NotImplementedError

    def overflowed(self) -> Tensor | None:
        """Return the largest finite magnitude, 0 if it was in range, as a 0-dim tensor; None: all were in range.

        Only if ``verifiable``: others have no range.
        """
        return None


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the floating dtype of states, and of gradients of velocities, for a stream of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
