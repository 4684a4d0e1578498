"""The binding of a captured graph: the calls that it serves, and how their arguments reach its inputs."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mfx_passes.paths import resolve

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, type)
_PLAIN_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)


Answer = tuple[str, tuple[Hashable, ...], tuple[tuple[str, Hashable], ...], Any]
"""The name of a function of torch that tells of a mode, its arguments, and what it returned."""


class Binding(Protocol):
    """The conditions under which a captured graph serves a call, and the way from the call's arguments to its inputs.

    Attributes:
        guards_modules: True if `holds` includes the attributes of the net's modules, and speaks of these very ones.
    """

    guards_modules: bool

    @property
    def key(self) -> Hashable | None:
        """Equal for calls whose arguments, values of tensors aside, are the same; None if they cannot be compared."""

    def holds(self, net: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """True if the graph serves a call of the net with these arguments."""

    def function(self, graph_function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward with ``graph_function`` in place of the graph; it takes the net, then the arguments."""


class Sizes(Protocol):
    """Conditions on the shapes of a call."""

    def are_those_of(self, net: Any, inputs: Mapping[str, Tensor]) -> bool:
        """True if a call of the net with these inputs, by name, meets them."""


class Values(Protocol):
    """Values that somebody may change between two calls."""

    def are_as_before(self) -> bool:
        """True if nobody has."""


@dataclass(eq=False)
class ByName:
    """Arguments bound by name: tensors go through the graph, all else is fixed in it.

    Args:
        inputs: names of the arguments that are tensors, in the order of the signature.
        constants: names and values of the others.
        positional: names of the arguments that may come by position.
        nameless: those of them that cannot come by name.
        defaults: the default values that the signature has, by name.
        kinds: dtype and device of the inputs, by name, if the graph holds for these only.
        sizes: conditions on the shapes of the inputs, None without any.
        lacking: attributes that the inputs must not have.
        asked: what the model was told of modes.
        looked_at: dtype and device of parameters and buffers that constants may depend on, by path.
        outside: values outside of the model that they may depend on.
    """

    inputs: tuple[str, ...]
    constants: Mapping[str, Any]
    positional: tuple[str, ...] = ()
    nameless: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes | None = None
    lacking: tuple[str, ...] = ()
    asked: tuple[Answer, ...] = ()
    looked_at: Mapping[str, Any] = field(default_factory=dict)
    outside: Values | None = None

    guards_modules = False

    @cached_property
    def key(self) -> tuple[tuple[str, ...], tuple[tuple[str, Hashable], ...]]:
        """The inputs, and the constants as `frozen` makes them; equal for calls that one graph serves.

        Raises:
            NotPlainError: a constant is not plain.
        """
        return self.inputs, tuple((name, frozen(value)) for name, value in self.constants.items())

    def holds(self, net: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """True if the same arguments are tensors, and the others are equal to the constants."""
        by_position = self.positional[: len(args)]
        if len(args) > len(by_position) or not kwargs.keys().isdisjoint(by_position + self.nameless):
            return False
        given = self._given(args, kwargs)
        inputs, constants = self.key
        if len(given) != len(inputs) + len(constants):
            return False
        for name in inputs:
            if not isinstance(given.get(name), Tensor):
                return False
        if any((given[name].dtype, given[name].device) != kind for name, kind in self.kinds.items()):
            return False
        if any(hasattr(given[name], attribute) for attribute in self.lacking for name in inputs):
            return False
        if (self.asked and not self._is_answered_alike()) or (self.looked_at and not self._is_as_looked_at(net)):
            return False
        if self.outside is not None and not self.outside.are_as_before():
            return False
        try:
            for name, value in constants:
                if name not in given or frozen(given[name]) != value:
                    return False
        except NotPlainError:
            return False
        return self.sizes is None or self.sizes.are_those_of(net, {name: given[name] for name in inputs})

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the inputs of a call, by name."""
        given = self._given(args, kwargs)
        return {name: given[name] for name in self.inputs}

    def for_inputs(self, inputs: Mapping[str, Tensor], sizes: Sizes | None, lacking: Iterable[str]) -> ByName:
        """Return the same binding for inputs of these dtypes and devices only.

        Args:
            inputs: tensors for the inputs, by name.
            sizes: conditions on their shapes, None without any.
            lacking: attributes that inputs must not have.
        """
        kinds = {name: (tensor.dtype, tensor.device) for name, tensor in inputs.items()}
        return replace(self, kinds=kinds, sizes=sizes, lacking=tuple(sorted(lacking)))

    def function(self, graph_function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the net and the arguments of a call; the net is not used."""

        def call(net: Any, /, *args: Any, **kwargs: Any) -> Any:
            given = self._given(args, kwargs)
            return graph_function(*[given[name] for name in self.inputs])

        return call

    def _is_answered_alike(self) -> bool:
        asked = ((getattr(torch, name)(*args, **dict(kwargs)), answer) for name, args, kwargs, answer in self.asked)
        return all(now == then for now, then in asked)

    def _is_as_looked_at(self, net: Any) -> bool:
        try:
            tensors = [(resolve(net, path), kind) for path, kind in self.looked_at.items()]
        except AttributeError:
            return False
        return all((tensor.dtype, tensor.device) == kind for tensor, kind in tensors)

    def _given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.defaults, **dict(zip(self.positional, args, strict=False)), **kwargs}


class NotPlainError(TypeError):
    """A value that is neither a tensor nor plain data."""

    def __init__(self, value: Any) -> None:
        super().__init__(type(value).__name__)
        self.value = value


def frozen(value: Any) -> Hashable:
    """Return a plain value as something hashable that tells 1, 1.0 and True apart.

    Raises:
        NotPlainError: the value, or one inside of it, is not plain.
    """
    if isinstance(value, list | tuple):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, dict):
        return type(value), tuple((key, frozen(item)) for key, item in value.items())
    if isinstance(value, (*_PLAIN, *_PLAIN_TORCH)):
        return type(value), value
    raise NotPlainError(value)
