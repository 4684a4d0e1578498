"""Observations of a participant, as plain values by path, and the differences between two."""

import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.promises.machine.participant import Error, Participant

_OVERLAY = frozenset(
    {"forward", "print_readable", "extra_repr", "graph", "code", "mfx_mark"}
)  # what a net has in its __dict__ beside its own
_TABLES = frozenset({"_parameters", "_buffers", "_modules"})
_HOOKS = frozenset(
    {
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    }
)
_IGNORED = frozenset(  # torch's own bookkeeping, hooks of state dicts, where a net notes its γ
    {
        "_is_full_backward_hook",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "is_called",  # of a reference
    }
)
_CALL = nn.Module.__call__
_MOST = 64  # entries of a container


class Bits(NamedTuple):
    """A tensor, bit for bit."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> "Bits":
        """Return the bits of a tensor."""
        values = tensor.detach().contiguous()
        data = values.view(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.requires_grad, data)

    def __repr__(self) -> str:
        numbers = torch.frombuffer(bytearray(self.data), dtype=self.dtype).tolist() if self.data else []
        shown = ", ".join(f"{number:.6g}" for number in numbers[:4])
        gradient = ", requires_grad" if self.requires_grad else ""
        return f"{str(self.dtype)[6:]}{list(self.shape)}({shown}{', …' if len(numbers) > 4 else ''}{gradient})"


class Difference(NamedTuple):
    """A place where two participants are not alike."""

    kind: str
    path: str
    found: Any
    expected: Any

    def __str__(self) -> str:
        return f"{self.kind} {self.path}: {self.found} instead of {self.expected}"


def value_of(value: Any, depth: int = 3) -> Any:
    """Return a value such that two are equal if nothing tells what they came from apart."""
    if isinstance(value, Tensor):
        return f"{type(value).__name__}" if _is_strange(value) else Bits.of(value)
    if value is None or isinstance(value, bool | int | str | bytes | torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Error):
        return f"{value.type}: {value.message}"
    if isinstance(value, torch.Generator):
        return Bits.of(value.get_state())
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Mapping):
        return {str(key): value_of(item, depth) for key, item in list(value.items())[:_MOST]}
    if isinstance(value, list | tuple):
        return [value_of(item, depth) for item in value[:_MOST]]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if depth and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        return type(value).__name__, {key: value_of(item, depth - 1) for key, item in vars(value).items()}
    return type(value).__name__


def _is_strange(tensor: Tensor) -> bool:
    """True for tensors without values, which no call may leave or return."""
    return type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta


def observe(participant: Participant, result: Any) -> dict[tuple[str, str], Any]:
    """Return everything observable of a participant after an action, by kind and path."""
    seen: dict[tuple[str, str], Any] = {("result", ""): value_of(result)}
    for number, model in enumerate(participant.models):
        for path, module in model.named_modules():
            seen.update(_of_module(module, f"{number}:{path}"))
    for number, call in enumerate(participant.calls):
        for place, leaf in enumerate(call.leaves):
            seen["gradient", f"call {number}, leaf {place}"] = value_of(leaf.grad)
    for number, parameter in enumerate(participant.retired):
        seen["gradient", f"replaced {number}"] = value_of(parameter.grad)
    seen["hooks", "log"] = value_of(participant.log)
    names = ("torch", "Python", "numpy")
    for name, state in zip(names, participant.states, strict=True):
        seen["random", name] = Bits.of(state) if isinstance(state, Tensor) else str(state)
    seen["warning", ""] = participant.warned
    seen["mode", ""] = modes()
    return seen


def _of_module(module: nn.Module, path: str) -> Iterator[tuple[tuple[str, str], Any]]:
    yield ("state", f"{path} class"), type(module).__name__
    for name, parameter in module._parameters.items():
        yield ("parameter", f"{path}.{name}"), value_of(parameter)
        yield ("gradient", f"{path}.{name}"), value_of(None if parameter is None else parameter.grad)
    for name, buffer in module._buffers.items():
        yield ("buffer", f"{path}.{name}"), value_of(buffer)
    for name, value in vars(module).items():
        if name in _HOOKS:
            yield ("hooks", f"{path}.{name}"), len(value)
        elif name not in _TABLES | _OVERLAY | _IGNORED:
            yield ("state", f"{path}.{name}"), value_of(value)


def modes() -> tuple[Any, ...]:
    """Return what is switched on for all code of this thread."""
    from torch.nn.utils import parametrize

    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        parametrize._cache_enabled,
        len(parametrize._cache),
        len(nn.modules.module._global_forward_hooks),
        nn.Module.__call__ is _CALL,  # which a trace replaces
    )


def differences(found: dict[tuple[str, str], Any], expected: dict[tuple[str, str], Any]) -> list[Difference]:
    """Return where two participants are not alike, in the order of observation."""
    absent = "nothing"
    return [
        Difference(*key, found.get(key, absent), expected.get(key, absent))
        for key in {**expected, **found}
        if found.get(key, absent) != expected.get(key, absent)
    ]
