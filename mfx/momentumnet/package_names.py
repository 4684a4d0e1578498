"""Names of weights: those of the original model, which mfx keeps, and those that the momentumnet package gives them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, TypeVar

from torch import nn

from mfx.net.forward import forward_of
from mfx_passes import MfxError

V = TypeVar("V")

_FIRST_KEPT = re.compile(r"(?P<layer>.+?)\.1\.0\.network\.(?P<number>\d+)\.(?P<rest>.+)")
_ALL = re.compile(r"(?P<layer>.+?)\.0\.network\.(?P<number>\d+)\.(?P<rest>.+)")


def to_package_names(
    state_dict: Mapping[str, V], sub_layers: str | Iterable[str], keep_first_layer: bool = True
) -> dict[str, V]:
    """Return weights under the names that a model of ``momentumnet.transform_to_momentumnet`` has.

    >>> to_package_names({"fc.bias": 0, "layer1.0.conv.bias": 1, "layer1.3.conv.bias": 2}, "layer1")
    {'fc.bias': 0, 'layer1.0.conv.bias': 1, 'layer1.1.0.network.2.conv.bias': 2}

    Args:
        state_dict: weights of the original model, or of one that mfx made of it.
        sub_layers: the layers that the package transforms, as its ``sub_layers``.
        keep_first_layer: as the package's ``keep_first_layer``.
    """
    paths = (sub_layers,) if isinstance(sub_layers, str) else tuple(sub_layers)
    return {_to_package(name, paths, keep_first_layer): value for name, value in state_dict.items()}


def from_package_names(
    state_dict: Mapping[str, V], sub_layers: str | Iterable[str], keep_first_layer: bool = True
) -> dict[str, V]:
    """Return weights of a model of ``momentumnet.transform_to_momentumnet`` under the original model's names.

    Nets of `mfx.transform_to_momentumnet` load the package's weights without it.

    >>> from_package_names({"fc.bias": 0, "layer1.0.conv.bias": 1, "layer1.1.0.network.2.conv.bias": 2}, "layer1")
    {'fc.bias': 0, 'layer1.0.conv.bias': 1, 'layer1.3.conv.bias': 2}

    Args:
        state_dict: the package's weights.
        sub_layers: the layers that were transformed, as the package's ``sub_layers``.
        keep_first_layer: as the package's ``keep_first_layer``.

    Raises:
        MfxError: one of the layers was not transformed by the package, or in another way.
    """
    paths = (sub_layers,) if isinstance(sub_layers, str) else tuple(sub_layers)
    wanted = {(path, keep_first_layer) for path in paths}
    names: dict[str, str] = {}
    there: set[tuple[str, bool]] = set()
    for name in state_dict:
        readings = _readings(name)
        there |= readings.keys()
        names[name] = next((original for layer, original in readings.items() if layer in wanted), name)
    if missing := [layer for layer in sorted(wanted - there) if _is_untransformed(*layer, state_dict)]:
        raise MfxError(
            f"the state_dict has no weights of {_listed(missing)} under the momentumnet package's names. It has "
            f"{_listed(there) or 'none of its layers'}."
        )
    return {names[name]: value for name, value in state_dict.items()}


def rename_loaded(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give weights of the momentumnet package that are about to be loaded the names that a net has for them.

    A hook on ``load_state_dict``. Where the package's model had other momentum nets than this net has, it warns.

    Args:
        net: a net of `mfx.transform_to_momentumnet`.
        state: the weights; renamed in place.
        prefix: path of the net in it, with a dot at its end.
    """
    weights = chain(net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False))
    own = {prefix + name for name, _ in weights}
    found: set[tuple[str, bool]] = set()
    for name in [name for name in state if name.startswith(prefix) and name not in own]:
        for (path, kept), original in _readings(name).items():
            if original in own and original not in state:
                state[original] = state.pop(name)
                found.add((path.removeprefix(prefix), kept))
                break
    if found and found != _layers_with_weights(net, (name.removeprefix(prefix) for name in own)):
        paths = sorted(path for path, _ in found)
        keep_first = {kept for _, kept in found} == {True}
        warnings.warn(
            f"mfx: the weights given to this {type(net).__name__} are those of a model of the momentumnet package, "
            f"which computes another function of them: its momentum nets are {_listed(found)}. The same function is "
            f"mfx.transform_to_momentumnet(model, {paths}, keep_first_layer={keep_first}), with the gamma and "
            "is_residual that the package's model had.",
            stacklevel=4,
        )


def _layers_with_weights(net: nn.Module, names: Iterable[str]) -> set[tuple[str, bool]]:
    """Return the layers of a net that have weights under other names in the package: a layer of one module may not."""
    forward, names = forward_of(net), list(names)
    layers = () if forward is None else forward.options.layers
    return {
        (layer.path, layer.keep_first)
        for layer in layers
        if any(_to_package(name, (layer.path,), layer.keep_first) != name for name in names)
    }


def _is_untransformed(path: str, keep_first: bool, names: Iterable[str]) -> bool:
    """True unless the layer consists of a first module that was kept."""
    inside = [name for name in names if name.startswith(f"{path}.")]
    return not inside or any(_to_package(name, (path,), keep_first) != name for name in inside)


def _to_package(name: str, layers: tuple[str, ...], keep_first: bool) -> str:
    for layer in layers:
        number, _, rest = name.removeprefix(f"{layer}.").partition(".")
        if name.startswith(f"{layer}.") and number.isdigit():
            if not keep_first:
                return f"{layer}.0.network.{number}.{rest}"
            if number != "0":
                return f"{layer}.1.0.network.{int(number) - 1}.{rest}"
    return name


def _readings(name: str) -> dict[tuple[str, bool], str]:
    """Return the original names that a weight may have, by its layer and ``keep_first_layer``."""
    return {
        (found["layer"], kept): f"{found['layer']}.{int(found['number']) + kept}.{found['rest']}"
        for pattern, kept in ((_FIRST_KEPT, True), (_ALL, False))
        if (found := pattern.fullmatch(name))
    }


def _listed(layers: Iterable[tuple[str, bool]]) -> str:
    return ", ".join(f"{path}{' without its first module' if kept else ''}" for path, kept in sorted(layers))
