"""The environment of a step: what its branch depends on beside its arguments, recorded, checked and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from mfx.compat import (
    HostCopy,
    are_weights_cached,
    cached_weights,
    is_capturing,
    is_sharded,
    weights_cached,
)
from mfx.engine.recompute.contents import is_same_sign
from mfx.engine.recompute.copies import copies_of
from mfx.engine.recompute.layout import Flags, StateLayout
from mfx.engine.recompute.put_back import PutBack
from mfx.engine.recompute.random_clock import Draw, RandomClock
from mfx.engine.recompute.switches import Switches
from mfx.engine.steps import ChainCache
from mfx.modules.buffers import storage_of, storages_of
from mfx.modules.state_lock import StateLock
from mfx_passes.errors import MfxError

_State = tuple[int, bool]  # of a tensor: its version, and whether it requires a gradient


@dataclass
class _Memory:
    """Knowledge of a step, kept from call to call: its layout, and the tensors that its branch changes.

    Attributes:
        layout: the last one, if it may be kept.
        modules: the modules that the other attributes are of.
        changing: for each set of training flags, if the tensor of this label changes, as far as that is known.
        asked: tensors on an accelerator of which that is being found out: where it is to be noted, the label and table
            of each, and the answers.
    """

    layout: StateLayout | None = None
    modules: list[nn.Module] = field(default_factory=list)
    changing: dict[Flags, dict[str, bool]] = field(default_factory=dict)
    asked: list[tuple[dict[str, bool], list[tuple[str, int]], HostCopy]] = field(default_factory=list)

    def layout_of(self, root: Any, targets: tuple[str, ...], path: str) -> StateLayout:
        """Return the present layout.

        Raises:
            MfxError: the model no longer has what the step reads.
        """
        layout = self.layout
        if layout is None or not layout.fits(root):
            layout = StateLayout(root, targets, path)
            if len(self.modules) != len(layout.modules) or not all(map(is_, self.modules, layout.modules)):
                self.modules, self.changing = layout.modules, {}
            self.layout = layout if layout.lasts else None
        return layout

    def known_to_change(self, flags: Flags) -> dict[str, bool]:
        """Return what is known of tensors under these training flags, without waiting for a device."""
        for answer in [answer for answer in self.asked if answer[2].has_arrived()]:
            self.asked.remove(answer)
            known, places, copy = answer
            changed = {table for (_, table), differs in zip(places, copy.values(), strict=True) if differs}
            for label, table in places:
                known[label] = known.get(label, False) or table in changed
        return self.changing.setdefault(flags, {})


class StepEnvironment:
    """The environment of one step in one forward pass.

    It is made just before the branch runs; ``settle`` follows just after. ``cache`` holds what calls of the step know
    of it. The tensors that the branch changes in place are found at the first call, by version and also by value:
    BatchNorm's kernel changes the running statistics without raising their version. From then on their values are
    copied before the branch runs. Everything else is put back by identity.

    Attributes:
        tensors: the parameters, buffers and other tensors, before the branch ran.
        hooked: the classes of modules that had hooks around both their forward and their backward.
        reproducible: see `Switches`.
    """

    def __init__(
        self,
        root: Any,
        targets: tuple[str, ...],
        path: str,
        key: Any,
        cache: ChainCache,
        clock: RandomClock,
        switches: Switches,
        lock: StateLock,
    ) -> None:
        self._path, self._lock, self._switches = path, lock, switches
        self.reproducible = switches.reproducible
        self._cached_weights = cached_weights()
        memory: _Memory | None = cache.get(key)
        if memory is None:
            memory = cache[key] = _Memory()
        layout = self._layout = memory.layout_of(root, targets, path)
        self._clock, self._own_clock = clock, RandomClock(layout.generators) if layout.generators else None
        self._draws: Sequence[Draw] | None = None  # until the branch has run
        self._versions = layout.seen  # before the tensors are: another thread may write meanwhile
        self.tensors = layout.tensors()
        self._states, self._storages = _look_at(self.tensors)
        self.hooked = layout.hooked
        # The values, before the branch runs, of tensors that it changes or may change, by identity.
        self._values: Mapping[int, Tensor] = _NONE
        self._lost: set[str] | None = None
        self._signs = layout.signs() if layout.large else None
        self._overwritten: set[str] | None = None
        self._misses = layout.misses() if layout.caches else None
        self._filled: list[str] = []  # caches
        if layout.has_state:
            self._memory, self._known = memory, memory.known_to_change(layout.flags)
            self._copy_values()

    def _copy_values(self) -> None:
        known, slots = self._known, zip(self._layout.slots, self.tensors, strict=True)
        buffers = {slot.label: tensor for slot, tensor in slots if not slot.is_parameter and tensor is not None}
        self._is_known = known.keys() >= buffers.keys()
        self._values = copies_of({id(tensor): tensor for label, tensor in buffers.items() if known.get(label, True)})

    @property
    def has_hooks(self) -> bool:
        """True if a module that the step reads had forward hooks; global hooks only observe."""
        return self._layout.has_hooks

    def has_drawn_all(self) -> bool:
        """True if the recomputation has drawn all random numbers that the forward pass drew."""
        return all(draw.is_done() for draw in self._draws or ())

    def settle(self) -> None:
        """Drop what the branch turned out not to need."""
        draws = self._clock.tick()
        self._draws = draws if self._own_clock is None else (*draws, *self._own_clock.tick())
        if self._layout.has_state:
            self._settle_values()
        if self._signs:
            self._overwritten = self._changed_signs()
        if self._misses is not None and not self._layout.is_put_back(self.tensors, self._versions):
            calls = zip(self._layout.caches, self._misses, self._layout.misses(), strict=True)
            self._filled = [cache.__qualname__ for cache, before, now in calls if now != before]

    def _changed_signs(self) -> set[str]:
        """Return the labels of what is not copied and was changed since this was made."""
        signs = zip(self._layout.large, self._signs or (), self._layout.signs(), strict=True)
        return {label for label, before, now in signs if not is_same_sign(before, now)}

    def _settle_values(self) -> None:
        known, slots, states = self._known, self._layout.slots, _look_at(self.tensors)[0]
        moved = [slot for slot, before, now in zip(slots, self._states, states, strict=True) if before != now]
        if self._is_known and all(slot.is_parameter or known[slot.label] for slot in moved):
            return  # as in earlier calls
        changed: set[int] = set()  # tables, and memory
        unsure: dict[str, tuple[int, Tensor]] = {}
        for slot, tensor, before, now in zip(slots, self.tensors, self._states, states, strict=True):
            if slot.is_parameter or tensor is None or known.get(slot.label):
                continue
            value = self._values.get(id(tensor))
            if before == now and value is not None and type(tensor) is Tensor and not tensor.is_cpu:
                unsure[slot.label] = id(slot.table), (tensor != value).any()  # the device is not waited for
            elif before != now or (value is not None and not torch.equal(tensor, value)):
                changed |= {id(slot.table), storage_of(tensor)} - {0}
                if value is None:
                    self._lost = {*(self._lost or ()), slot.label}
        kept: dict[int, Tensor] = {}
        for slot, tensor in zip(slots, self.tensors, strict=True):
            if slot.is_parameter or tensor is None:
                continue
            # On other inputs, a branch may change other buffers of the module, too; and what shares memory changes.
            changes = known.get(slot.label, False) or not changed.isdisjoint((id(slot.table), storage_of(tensor)))
            if changes or slot.label not in unsure:
                known[slot.label] = changes
            if known.get(slot.label, True) and id(tensor) in self._values:
                kept[id(tensor)] = self._values[id(tensor)]
        self._values = kept
        if asked := {label: found for label, found in unsure.items() if label not in known}:
            self._ask(asked)

    def _ask(self, unsure: dict[str, tuple[int, Tensor]]) -> None:
        """Find out later which tensors have changed; until then they are taken to."""
        answers = [differs for _, differs in unsure.values()]
        if not is_capturing(answers[0].device):
            places = [(label, table) for label, (table, _) in unsure.items()]
            self._memory.asked.append((self._known, places, HostCopy(answers)))

    def restored(self) -> AbstractContextManager[object]:
        """Return a context with the environment of the forward pass; it leaves everything as it was found.

        Raises:
            MfxError: a tensor was modified since the forward pass.
        """
        contexts = self._contexts()
        # The branch writes into the values, and may be recomputed once more.
        values = copies_of(self._values) if self._values else self._values
        put_back = PutBack(self._layout, self.tensors, self._versions, values, self._lock)
        return _all_of([*contexts, put_back]) if contexts else put_back  # the usual case

    def _contexts(self) -> list[AbstractContextManager[object]]:
        """Return contexts for what differs now from the forward pass, tables aside."""
        contexts = [*self._frozen_as_then(), *self._switches.contexts()]
        draws = self._draws
        if draws is None:  # the branch itself runs a backward pass, while it is still running
            draws = (*self._clock.all(), *(() if self._own_clock is None else self._own_clock.all()))
        if draws:
            contexts += [draw.repeated() for draw in draws]
        if self._cached_weights is not None or are_weights_cached():
            contexts.append(weights_cached(self._cached_weights))
        return contexts

    def _changed(self, label: str) -> MfxError:
        return MfxError(
            f"{self._path}: {label} was changed between forward and backward, but the backward pass has "
            "to run this step a second time; call backward before changing it"
        )

    def _frozen_as_then(self) -> list[AbstractContextManager[object]]:
        """Check tensors; return contexts for those that were frozen or unfrozen."""
        if self._lost:
            raise MfxError(
                f"{self._path}: this step wrote into {', '.join(sorted(self._lost))}, which it had not done in earlier "
                "calls, so the value that it read is gone. From the next call on it is kept"
            )
        if self._overwritten:
            raise MfxError(
                f"{self._path}: this step changed {', '.join(sorted(self._overwritten))} in place, which it would have "
                "to find as before when the backward pass runs it again. No copy is made of containers of more than 64 "
                "entries, arrays above 64 KiB, memory that something else shares and iterators: keep what changes in a "
                "buffer or a smaller container, skip the step, or use memory_budget=1.0"
            )
        if self._filled:
            raise MfxError(
                f"{self._path}: this step called {', '.join(self._filled)} for a first time, which changes attributes "
                "and keeps its result (functools.lru_cache): when the backward pass runs the step again, it would not "
                "change them. Change them outside of that method, skip the step, or use memory_budget=1.0"
            )
        if self._signs and (others := self._changed_signs()):
            raise self._changed(min(others))
        states, storages = _look_at(self.tensors)
        # Assigning to ``tensor.data`` changes no version.
        same_data = [*map(is_, storages, self._storages)]
        if states == self._states and False not in same_data:
            return []
        contexts: list[AbstractContextManager[object]] = []
        found = zip(self._layout.slots, self.tensors, states, self._states, same_data, strict=True)
        for slot, tensor, now, before, has_its_data in found:
            if (now == before and has_its_data) or id(tensor) in self._values or is_sharded(tensor):
                continue
            if now[0] != before[0] or not has_its_data:
                raise self._changed(slot.label)
            contexts.append(_requiring_grad(tensor, before[1]))
        return contexts


@contextmanager
def _requiring_grad(tensor: Tensor, required: bool) -> Iterator[None]:
    before = tensor.requires_grad
    tensor.requires_grad = required
    try:
        yield
    finally:
        tensor.requires_grad = before


@contextmanager
def _all_of(contexts: Sequence[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


_NONE: Mapping[int, Tensor] = {}
_STATE = attrgetter("_version", "requires_grad")
_ABSENT = torch.empty(0)


def _look_at(tensors: Sequence[Tensor | None]) -> tuple[list[_State], list[torch.UntypedStorage]]:
    """Return the state of each tensor, and its storage; for None those of an empty tensor."""
    present: Any = tensors
    try:
        return [*map(_STATE, present)], storages_of(present)
    except (AttributeError, RuntimeError):  # None; inference tensors have no version
        present = [_ABSENT if tensor is None else tensor for tensor in tensors]
        states = [(0 if t.is_inference() else t._version, t.requires_grad) for t in present]
        return states, storages_of(present)
