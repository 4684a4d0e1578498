"""The environment of a step: what its branch depends on beside its arguments, recorded, checked and put back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

from mfx.compat import autocast_as, autocast_state, cached_weights, is_sharded, weights_cached
from mfx.engine.recompute.layout import TensorSlot, layout_of
from mfx.engine.recompute.random_clock import RandomClock
from mfx.engine.scope import inside_recomputation
from mfx.engine.steps import ChainCache
from mfx_passes.errors import MfxError

_State = tuple[int, bool] | None  # of a tensor: its version, and whether it requires a gradient


class Autocast:
    """The autocast state of the forward pass, for ``device`` and the CPU."""

    def __init__(self, device: torch.device) -> None:
        kinds = sorted({"cpu", device.type})
        self._states = {kind: autocast_state(kind) for kind in kinds if torch.amp.is_autocast_available(kind)}

    def contexts(self) -> list[AbstractContextManager[object]]:
        """Return what brings that state back, as far as it differs now."""
        return [autocast_as(kind, state) for kind, state in self._states.items() if autocast_state(kind) != state]


class StepEnvironment:
    """The environment of one step in one forward pass.

    It is made just before the branch runs; ``settle`` follows just after. ``cache`` holds the layout of the step and,
    for each set of training flags, the tensors that the branch changes. Those are found at the first call, by version
    and also by value: BatchNorm's kernel changes the running statistics without raising their version.

    Attributes:
        tensors: the parameters and buffers, before the branch ran.
    """

    _is_known = True  # the set of buffers that the branch changes

    def __init__(
        self,
        root: Any,
        targets: tuple[str, ...],
        path: str,
        key: Any,
        cache: ChainCache,
        clock: RandomClock,
        cast: Autocast,
    ) -> None:
        self._root, self._path = root, path
        self._clock, self._autocast = clock, cast
        self._cached_weights = cached_weights()
        layout = self._layout = layout_of(cache, key, root, targets, path)
        self._own_clock = RandomClock(layout.generators) if layout.generators else None
        self._drawn = [draw for clock in self._clocks() for draw in clock.all()]
        self._flags = layout.flags
        self._slots = layout.slots(root)
        self.tensors = layout.tensors(self._slots)
        self._states = _states(self.tensors)
        self._buffers: list[tuple[TensorSlot, Tensor | None, _State]] = []
        # The values, before the branch runs, of what it changes or may change.
        self._values: dict[TensorSlot, Tensor] = {}
        self._lost: set[str] = set()
        if layout.has_buffers:
            self._copy_buffers()

    def _copy_buffers(self) -> None:
        known = self._layout.changing.get(self._flags)
        self._is_known = known is not None
        found = zip(self._slots, self.tensors, self._states, strict=True)
        self._buffers = [one for one in found if not one[0].is_parameter]
        for slot, tensor, _ in self._buffers:
            if tensor is not None and (known is None or slot.label in known):
                self._values[slot] = tensor.detach().clone()

    @property
    def has_hooks(self) -> bool:
        """True if a module that the step reads has forward hooks now; global hooks only observe."""
        return any(module._forward_hooks for module in self._layout.modules)

    def has_drawn_all(self) -> bool:
        """True if the recomputation has drawn all random numbers that the forward pass drew."""
        return all(draw.is_done() for draw in self._drawn)

    def _clocks(self) -> list[RandomClock]:
        return [self._clock] if self._own_clock is None else [self._clock, self._own_clock]

    def settle(self) -> None:
        """Drop what the branch turned out not to need."""
        self._drawn = [draw for clock in self._clocks() for draw in clock.tick()]
        if self._buffers:
            self._settle_buffers()

    def _settle_buffers(self) -> None:
        before = self._layout.changing.get(self._flags, frozenset())
        changed = [
            slot
            for slot, tensor, state in self._buffers
            if slot.label not in before and self._is_changed(slot, tensor, state)
        ]
        if changed or not self._is_known:
            # A branch that changes one buffer of a module may change the others on other inputs.
            tables = {id(slot.table) for slot in changed}
            labels = (slot.label for slot, _, _ in self._buffers if id(slot.table) in tables)
            self._layout.changing[self._flags] = known = before.union(labels)
            self._values = {slot: value for slot, value in self._values.items() if slot.label in known}

    def _is_changed(self, slot: TensorSlot, tensor: Tensor | None, state: _State) -> bool:
        if tensor is None:
            return False
        if slot.get() is not tensor:
            self._values.setdefault(slot, tensor.detach())
            return True
        if _state(tensor) == state:
            return not self._is_known and not torch.equal(tensor, self._values[slot])
        if slot not in self._values:
            self._lost.add(slot.label)
        return True

    def restored(self) -> AbstractContextManager[object]:
        """Restore the environment of the forward pass; afterwards put everything back, buffers untouched.

        Raises:
            MfxError: a parameter or buffer was replaced or modified since the forward pass.
        """
        self._check()
        contexts = self._contexts()
        return _all_of([inside_recomputation(), *contexts]) if contexts else inside_recomputation()  # the usual case

    def _contexts(self) -> list[AbstractContextManager[object]]:
        """Return contexts for what differs now from the forward pass."""
        contexts = self._autocast.contexts()
        contexts += [draw.repeated() for draw in self._drawn]
        if self._cached_weights is not None or cached_weights() is not None:
            contexts.append(weights_cached(self._cached_weights))
        if self._values or self._flags != self._layout.flags:
            contexts.append(self._put_back())
        return contexts

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        flags, tensors = self._layout.flags, [(slot, slot.get()) for slot in self._values]
        try:
            self._set_flags(self._flags)
            for slot, value in self._values.items():
                slot.put(value.clone())  # the branch writes into it, and may be recomputed once more
            yield
        finally:
            for slot, tensor in tensors:
                slot.put(tensor)
            self._set_flags(flags)

    def _set_flags(self, flags: tuple[bool, ...]) -> None:
        for module, training in zip(self._layout.modules, flags, strict=True):
            if module.training != training:
                module.training = training

    def _check(self) -> None:
        if not self._layout.holds(self._root):
            raise MfxError(
                f"{self._path}: modules were added, removed or replaced between forward and backward, but the backward "
                "pass has to run this step a second time; call backward before changing it"
            )
        tensors = self._layout.tensors(self._slots)
        if all(map(is_, tensors, self.tensors)) and _states(tensors) == self._states:
            return
        for slot, now, old, state in zip(self._slots, tensors, self.tensors, self._states, strict=True):
            if now is old and _state(now) == state:
                continue
            if slot in self._values:
                continue
            if is_sharded(now) or is_sharded(old):
                continue  # FSDP2 holds shards outside a module's forward, and whole parameters inside
            if slot.label in self._lost:
                raise MfxError(
                    f"{self._path}: this step wrote into {slot.label}, which it had not done in earlier calls, so the "
                    "value that it read is gone. From the next call on it is kept"
                )
            if now is old and state is not None and now._version == state[0]:
                raise MfxError(self._complaint(slot.label, "frozen or unfrozen"))
            raise MfxError(self._complaint(slot.label, "changed"))

    def _complaint(self, label: str, what: str) -> str:
        return (
            f"{self._path}: {label} was {what} between forward and backward, but the backward pass has to run this "
            "step a second time; call backward before changing it"
        )


@contextmanager
def _all_of(contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _states(tensors: Sequence[Tensor | None]) -> list[_State]:
    try:
        return [None if tensor is None else (tensor._version, tensor.requires_grad) for tensor in tensors]
    except RuntimeError:
        return [_state(tensor) for tensor in tensors]


def _state(tensor: Tensor | None) -> _State:
    """Return what changes if a tensor is modified, frozen or unfrozen; inference tensors have no version."""
    if tensor is None:
        return None
    return 0 if tensor.is_inference() else tensor._version, tensor.requires_grad
