"""A fake accelerator: a device type "fake" whose tensors lie on the CPU, for tests without a GPU.

It has what mfx has to reckon with on a GPU, and nothing that would be quick: an autograd device thread of its own, a
random generator of its own, streams, copies to the host that arrive when they are said to, and graph capture. Launches
of kernels, synchronisations and copies from the host are counted.

Importing this registers the device for the whole process, so it is done in processes of their own: see `test_files`.
Every tensor has a twin on the CPU, kept as long as the process, and operators run on the twins.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

NAME = "fake"
LAUNCHES: Counter[str] = Counter()
SYNCHRONISATIONS: list[str] = []
FROM_HOST: list[str] = []
THREADS: set[int] = set()
_NUMBERS = itertools.count(100)  # of streams that are made, not asked for by number
_TWINS: dict[int, tuple[Tensor, Any]] = {}


class _State:
    """The state of a generator, which may be that of several, as graph capture has it."""

    def __init__(self, registered: bool) -> None:
        self.generator, self.draws, self.is_registered = torch.Generator(), 0, registered


class Generator:
    """A generator with a seed and an offset, as a GPU's; its state cannot be read while a graph is captured."""

    def __init__(self, device: Any = None, *, registered: bool = False) -> None:
        self._state = _State(registered)

    def drawn(self) -> torch.Generator:
        if backend.capturing and not self._state.is_registered:
            raise RuntimeError("Attempt to increase offset for a FAKE generator not in capture mode.")
        self._state.draws += 1
        return self._state.generator

    def manual_seed(self, seed: int) -> None:
        self._state.generator.manual_seed(seed)
        self._state.draws = 0

    def initial_seed(self) -> int:
        return self._state.generator.initial_seed()

    def get_offset(self) -> int:
        _not_captured()
        return self._state.draws

    def get_state(self) -> Tensor:
        _not_captured()
        draws = torch.tensor([self._state.draws]).view(torch.uint8)
        return torch.cat([draws, self._state.generator.get_state()])

    def set_state(self, state: Tensor) -> None:
        _not_captured()
        self._state.draws = int(state[:8].clone().view(torch.int64))
        self._state.generator.set_state(state[8:].clone())

    def graphsafe_get_state(self) -> Generator:
        alias = Generator()
        alias._state = self._state
        return alias

    def graphsafe_set_state(self, other: Generator) -> None:
        self._state = other._state


def _not_captured() -> None:
    if backend.capturing:
        raise RuntimeError("Cannot read a generator while a graph is captured")


class Event:
    """A mark in the queue of the device; what was queued before it is done when the test says `arrive`."""

    def record(self, stream: Any = None) -> None:
        self._number = len(backend.queue)
        self.stream = None if stream is None else stream.stream_id

    def query(self) -> bool:
        if backend.capturing:
            raise RuntimeError("An event cannot be queried while a graph is captured")
        return self._number <= backend.done

    def synchronize(self) -> None:
        _synchronise("event")


class Stream(torch.Stream):
    """A stream, by number; 0 is the default one."""

    def __new__(cls, number: int | torch.device) -> Stream:
        made = number if isinstance(number, int) else next(_NUMBERS)
        return super().__new__(cls, stream_id=made, device_index=0, device_type=20)

    def wait_stream(self, other: torch.Stream) -> None:
        backend.waits.append((self.stream_id, other.stream_id))

    def wait_event(self, event: Event) -> None:  # as a real one does: it does not arrive for the host
        assert event.stream is not None
        backend.waits.append((self.stream_id, event.stream))
        backend.arrive()


class _Local(threading.local):
    stream = Stream(0)


class _Backend:
    """The module ``torch.fake``."""

    Event, Stream = Event, Stream

    def __init__(self) -> None:
        self.default_generators = [Generator(registered=True)]
        self.capturing = False
        self.has_float64 = True
        self.queue: list[Any] = []  # copies under way to the host
        self.done = 0
        self.waits: list[tuple[int, int]] = []
        self.recorded: list[tuple[int, int]] = []  # a stream that uses a storage, and the storage
        self._local = _Local()

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        self.default_generators[0].manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self.default_generators[0].get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self.default_generators[0].set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def current_stream(self, device: Any = None) -> Stream:
        return self._local.stream

    @contextmanager
    def stream(self, stream: Stream) -> Any:
        before, self._local.stream = self._local.stream, stream
        try:
            yield
        finally:
            self._local.stream = before

    def arrive(self) -> None:
        """Let everything that is queued be done."""
        for into, value in self.queue[self.done :]:
            into.copy_(value)
        self.done = len(self.queue)

    @contextmanager
    def capture(self) -> Any:
        """Capture a graph in this context."""
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


def _synchronise(what: str) -> None:
    if backend.capturing:
        raise RuntimeError("operation not permitted when stream is capturing")
    SYNCHRONISATIONS.append(what)
    backend.arrive()


def _wrap(twin: Tensor) -> Tensor:
    twin = twin.detach()
    tensor = torch._C._acc.create_empty_tensor(list(twin.shape), twin.dtype)
    _TWINS[tensor.untyped_storage()._cdata] = twin, tensor.untyped_storage()
    return tensor


def _twin(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type != NAME else _TWINS[tensor.untyped_storage()._cdata][0]


_RANDOM = {"bernoulli_", "normal_", "uniform_", "random_", "exponential_"}
_WAITS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}
_FREE = {"empty", "empty_strided", "empty_like", "new_empty", "record_stream", "detach", "_local_scalar_dense"}


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    schema = op._schema
    name = schema.name.partition("::")[2]
    THREADS.add(threading.get_ident())
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    if not is_view and name not in _FREE:
        LAUNCHES[name] += 1
    if name in _WAITS:
        _synchronise(name)
    if name == "record_stream":
        backend.recorded.append((args[1].stream_id, args[0].untyped_storage()._cdata))
        return None
    to = kwargs.get("device")
    if to is not None:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
    if name in _RANDOM and kwargs.get("generator") is None:
        kwargs["generator"] = backend.default_generators[0].drawn()
    given, named = tree_map_only(Tensor, _twin, (args, kwargs))
    if name == "_copy_from":
        _copy(given[1], given[0], args, non_blocking=len(args) > 2 and args[2])
        return args[1]
    if name == "_to_copy" and to is not None and to.type == NAME and args[0].device.type == "cpu":
        FROM_HOST.append(f"{args[0].dtype} {tuple(args[0].shape)}")
    if name == "_to_copy" and to is not None and to.type == "cpu":
        named.pop("non_blocking", None)
        value = op(*given, **named).clone()
        return _to_host(value, non_blocking=bool(kwargs.get("non_blocking")))
    if name == "native_dropout":
        x, p, _ = given
        mask = torch.empty_like(x).bernoulli_(1 - p, generator=backend.default_generators[0].drawn()).bool()
        return _wrap(x * mask / (1 - p)), _wrap(mask)
    out = op(*given, **named)
    if schema.is_mutable:
        names = [argument.name for argument in schema.arguments]
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        where = {**dict(zip(names, args, strict=False)), **kwargs}
        found = [where[name] for name in written if name in where]
        return None if not schema.returns else found[0] if isinstance(out, Tensor) else tuple(found)
    return tree_map_only(Tensor, _wrap, out)


def _copy(into: Tensor, value: Tensor, args: Any, *, non_blocking: bool) -> None:
    if args[1].device.type == "cpu":
        into.copy_(_to_host(value.to(into.dtype), non_blocking=non_blocking))
        if non_blocking:
            backend.queue[-1] = into, backend.queue[-1][1]
        return
    if args[0].device.type == "cpu" and value.dim():
        FROM_HOST.append(f"{value.dtype} {tuple(value.shape)}")
    into.copy_(value)


def _to_host(value: Tensor, *, non_blocking: bool) -> Tensor:
    """Return a value on the host; before it arrives, what is there is something else."""
    LAUNCHES["_to_copy"] -= 1
    if not non_blocking:
        _synchronise("copy to the host")
        return value
    garbage = torch.full_like(value, 77)
    backend.queue.append((garbage, value))
    return garbage


def _register() -> None:
    backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _LIBRARIES.append(torch.library.Library("_", "IMPL"))
        _LIBRARIES[0].fallback(_run, "PrivateUse1")
        _LIBRARIES.append(aten := torch.library.Library("aten", "IMPL"))
        # Else these would be made of others on this device, not as on a GPU.
        for full_name in torch._C._dispatch_get_all_op_names():
            if full_name.startswith("aten::") and full_name != "aten::detach" and _is_composite(full_name):
                packet, _, overload = full_name.removeprefix("aten::").partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                aten.impl(full_name.removeprefix("aten::"), _running(op), "PrivateUse1")


_EXPLICIT = ("CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
_LIBRARIES: list[torch.library.Library] = []


def _is_composite(name: str) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in _EXPLICIT)


def _running(op: Any) -> Any:
    return lambda *args, **kwargs: _run(op, *args, **kwargs)


def to_device(value: Any) -> Any:
    """Return a tensor, or a module whose parameters and buffers were moved, on the fake device."""
    if isinstance(value, Tensor):
        return _wrap(value.detach().clone()).requires_grad_(value.requires_grad)
    for module in value.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_wrap(parameter.detach().clone()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _wrap(buffer.clone())
    return value


def on_host(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, which counts as nothing."""
    return _twin(tensor.detach()).clone()


def forget() -> None:
    """Start the counts anew."""
    LAUNCHES.clear()
    SYNCHRONISATIONS.clear()
    FROM_HOST.clear()
    THREADS.clear()
    backend.waits.clear()
    backend.recorded.clear()


backend = _Backend()
_register()
