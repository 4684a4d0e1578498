"""Whole layers of a model turned into momentum nets: the function of the momentumnet package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx, nn

from mfx.capture.named_steps import check_layer
from mfx.compat import put_load_hook_first
from mfx.modules.tree_copy import M
from mfx.momentumnet.momentum_net import check_flags
from mfx.momentumnet.package_names import rename_loaded
from mfx.net.build import build_net
from mfx.net.forward import forward_of
from mfx.net.gammas import gammas_of
from mfx.options.gamma import BDIA
from mfx.options.options import Layer, Options
from mfx.text import described
from mfx_passes import MfxError


def transform_to_momentumnet(
    model: M,
    sub_layers: str | Iterable[str] | None = None,
    gamma: float | BDIA = 0.9,
    use_backprop: bool = False,
    is_residual: bool = False,
    keep_first_layer: bool = True,
    *,
    arithmetic: str = "exact",
    verify: str = "warn",
    offload: str | None = None,
) -> M:
    """Return the same model with whole layers turned into momentum nets, as the momentumnet package does.

    Every module in such a layer is one step, whatever it does inside: the modules B of a layer compute
    v ← γ·v + (1−γ)·(B(x) − x), x ← x + v, from v = 0 on, one momentum net a layer. Without ``sub_layers`` they are the
    package's default, ``layer1`` to ``layer4`` of a ResNet; for a model that has no such layers this is
    `mfx.momentumize`: chains of residual adds are found in the graph of the model.

    Args:
        model: a model that can be traced symbolically; it stays as it is. With ``sub_layers``, also a net that this
            function returned: its layers stay momentum nets, at their γ.
        sub_layers: paths of ``Sequential`` or ``ModuleList`` layers, such as ``"encoder.layers"``, whose modules are
            called one after the other, each on the state that the one before gave and on any further arguments.
        gamma: momentum, 0 <= γ < 1, or an `mfx.BDIA`.
        use_backprop: True for ordinary backpropagation, which keeps all activations. The function is the same.
        is_residual: True if a module is the branch f of a step x + f(x), not the whole step. A sum that the model
            writes around f is part of the step; without one, f is added to x nevertheless.
        keep_first_layer: with ``sub_layers``, leave the first module of each layer as it is; it may change the shape.
        arithmetic: ``"exact"`` or ``"float"``; see `mfx.momentumize`.
        verify: ``"warn"``, ``"raise"`` or ``"off"``; see `mfx.momentumize`.
        offload: None or ``"cpu"``; see `mfx.momentumize`.

    Returns:
        A model of the same class that shares all parameters and buffers with ``model``, with the same ``state_dict``
        keys. It also loads weights under the names that a model of the package has.

    Raises:
        MfxError: an argument is wrong; the model has no such layer, or cannot be traced; the modules of a layer are
            not a chain, or change the state's shape.
    """
    if not isinstance(model, nn.Module):
        raise MfxError(f"transform_to_momentumnet takes a torch.nn.Module, not {described(model)}.")
    check_flags(use_backprop=use_backprop, is_residual=is_residual, keep_first_layer=keep_first_layer)
    budget = 1.0 if use_backprop else 0.0
    options = Options(gamma=gamma, memory_budget=budget, arithmetic=arithmetic, verify=verify, offload=offload)
    sub_layers = _default_layers(model) if sub_layers is None else sub_layers
    if sub_layers is None:
        if is_residual:
            raise MfxError(
                "is_residual=True is about the modules in sub_layers; name them, or leave is_residual False."
            )
        return _loads_packages_weights(build_net(model, options))
    paths = _paths(sub_layers)
    if isinstance(model, fx.GraphModule):
        raise MfxError("sub_layers name modules of a model, and a GraphModule is a graph already; transform the model.")
    for path in paths:
        check_layer(model, path)
    layers = tuple(Layer(path, keep_first_layer, is_residual) for path in paths)
    options = replace(options, layers=layers, min_steps=1)
    return _loads_packages_weights(build_net(model, _with_earlier(model, options)))


def _loads_packages_weights(net: M) -> M:
    if forward_of(net) is not None:
        put_load_hook_first(net, rename_loaded)
    return net


def _default_layers(model: nn.Module) -> tuple[str, ...] | None:
    """Return the package's default, if a model has these layers."""
    inner = [getattr(model, path, None) for path in _DEFAULT]
    has_all = not isinstance(model, fx.GraphModule) and all(isinstance(m, nn.Sequential | nn.ModuleList) for m in inner)
    return _DEFAULT if has_all else None


_DEFAULT = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet of torchvision


def _paths(sub_layers: Any) -> tuple[str, ...]:
    if not isinstance(sub_layers, Iterable):
        raise MfxError(f"sub_layers={sub_layers!r}: must be the path of a layer, such as 'encoder.layers', or several.")
    paths = (sub_layers,) if isinstance(sub_layers, str) else tuple(sub_layers)
    if not paths:
        raise MfxError("sub_layers is empty, so nothing would be transformed; leave it out to have chains looked for.")
    if doubles := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise MfxError(f"sub_layers names {', '.join(doubles)} twice.")
    return paths


def _with_earlier(model: nn.Module, options: Options) -> Options:
    """Add the layers that were transformed before, with their γ, to the options."""
    forward = forward_of(model)
    if forward is None:
        return options
    before = forward.options
    if not before.layers:
        raise MfxError(
            f"this {type(model).__name__} has been momentumized: its chains were found by themselves. Transform the "
            "model that it was made from."
        )
    again = [layer.path for layer in options.layers if layer.path in {old.path for old in before.layers}]
    if again:
        raise MfxError(f"{', '.join(again)}: transformed before. Use mfx.set_gamma to set another gamma.")
    for name in ("memory_budget", "arithmetic", "verify", "offload"):
        if getattr(before, name) != getattr(options, name):
            raise MfxError(
                "a net has one use_backprop, arithmetic, verify and offload for all its layers, and earlier layers of "
                "this one were transformed with others. Transform all layers in the same way."
            )
    gamma: Any = options.gamma
    return replace(options, layers=(*before.layers, *options.layers), gamma={**gammas_of(model), "*": gamma})
