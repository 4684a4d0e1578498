"""What a branch depends on beside its arguments, as it was in the forward pass: recorded, checked, put back."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from mfx.compat import autocast_now, is_sharded
from mfx.engine.reads import Reads, Slot
from mfx.engine.scope import inside_recomputation
from mfx_passes.errors import MfxError

__all__ = ["Autocast", "Memory", "RandomClock", "Surroundings"]

Memory = dict[Any, Any]


class RandomClock:
    """The states of the random generators that code on ``device`` draws from, read once per step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.now = self._read()

    def tick(self) -> bool:
        """Read again; whether anything was drawn since the last time."""
        before, self.now = self.now, self._read()
        return not all(torch.equal(a, b) for a, b in zip(before, self.now, strict=True))

    @contextmanager
    def turned_back(self, states: tuple[Tensor, ...]) -> Iterator[None]:
        """The generators start from ``states``; afterwards they are where they were."""
        real = self._read()
        try:
            self._write(states)
            yield
        finally:
            self._write(real)

    def _read(self) -> tuple[Tensor, ...]:
        cpu = torch.get_rng_state()
        return (cpu, torch.cuda.get_rng_state(self._device)) if self._device.type == "cuda" else (cpu,)

    def _write(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


class Autocast:
    """The autocast state of the forward pass, for ``device`` and the CPU."""

    def __init__(self, device: torch.device) -> None:
        kinds = {"cpu", device.type}
        self._contexts = [autocast_now(kind) for kind in sorted(kinds) if torch.amp.is_autocast_available(kind)]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run under that state."""
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context())
            yield


class Surroundings:
    """One step's surroundings in one forward pass.

    Made just before the branch runs; ``settle`` follows just after. ``memory`` remembers, per step and training flags,
    which buffers the branch changes. That is found out by value, at the first call: BatchNorm's kernel changes the
    running statistics without raising their version.
    """

    def __init__(
        self,
        root: Any,
        targets: tuple[str, ...],
        path: str,
        key: Any,
        memory: Memory,
        clock: RandomClock,
        cast: Autocast,
    ) -> None:
        self._root, self._targets, self._path = root, targets, path
        self._clock, self._autocast = clock, cast
        self._random: tuple[Tensor, ...] | None = clock.now
        reads = self._reads = Reads(root, targets, path)
        self._flags = reads.flags
        self._versions = [slot.tensor._version for slot in reads.slots]
        self._requires_grad = [slot.tensor.requires_grad for slot in reads.slots]
        self._memory, self._key = memory, (key, self._flags)
        self._changing = self._recall()
        self._values = [(s, s.tensor.detach().clone()) for s in reads.slots if self._may_change(s)]

    def settle(self) -> None:
        """Forget what the branch turned out not to need."""
        if not self._clock.tick():
            self._random = None
        if self._changing is None:
            # Another tensor in the slot, or another value in the tensor.
            changed = [(s, v) for s, v in self._values if s.is_replaced or not torch.equal(s.tensor, v)]
            self._values = changed
            self._changing = frozenset(s.label for s, _ in changed)
            self._remember(self._changing)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run as in the forward pass; afterwards everything is put back, buffers untouched.

        Raises:
            MfxError: if a parameter or buffer is another one, or has been modified, since the forward pass.
        """
        self._check()
        with ExitStack() as stack:
            stack.enter_context(inside_recomputation())
            stack.enter_context(self._autocast.again())
            if self._random is not None:
                stack.enter_context(self._clock.turned_back(self._random))
            stack.callback(self._set_flags, self._reads.flags)
            self._set_flags(self._flags)
            for slot, value in self._values:
                stack.callback(slot.put, slot._table()[slot.name])
                slot.put(value.clone())  # the branch will write into it, and may be run again
            yield

    def _may_change(self, slot: Slot) -> bool:
        if slot.is_parameter:
            return False
        return self._changing is None or slot.label in self._changing

    def _set_flags(self, flags: tuple[bool, ...]) -> None:
        for module, training in zip(self._reads.modules.values(), flags, strict=True):
            if module.training != training:
                module.training = training

    def _recall(self) -> frozenset[str] | None:
        modules, changing = self._memory.get(self._key, ((), None))
        same = len(modules) == len(self._reads.modules)
        same = same and all(ref() is m for ref, m in zip(modules, self._reads.modules.values(), strict=True))
        return changing if same else None

    def _remember(self, changing: frozenset[str]) -> None:
        modules = [weakref.ref(m) for m in self._reads.modules.values()]
        self._memory[self._key] = modules, changing

    def _check(self) -> None:
        now = Reads(self._root, self._targets, self._path).slots
        if [s.label for s in now] != [s.label for s in self._reads.slots]:
            raise MfxError(f"{self._path}: modules were added or removed between the forward and the backward pass")
        for slot, old, version, requires_grad in zip(
            now, self._reads.slots, self._versions, self._requires_grad, strict=True
        ):
            if self._may_change(slot):
                continue
            if is_sharded(slot.tensor) or is_sharded(old.tensor):
                continue  # FSDP2 holds shards outside a module's forward, and whole parameters inside
            if slot.tensor is not old.tensor or slot.tensor._version != version:
                raise MfxError(self._complaint(slot.label, "changed"))
            if slot.tensor.requires_grad != requires_grad:
                raise MfxError(self._complaint(slot.label, "frozen or unfrozen"))

    def _complaint(self, label: str, what: str) -> str:
        return (
            f"{self._path}: {label} was {what} between forward and backward, but the backward pass has to run this "
            "step a second time; call backward before changing it"
        )
