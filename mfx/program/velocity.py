"""The modules that compute the velocity before a chain's first step, under ``velocity.`` in the net."""

from __future__ import annotations

from torch import nn

from mfx.modules.overlay import Extra
from mfx.options.options import Options
from mfx_passes import MfxError
from mfx_passes.momentum_pass import call_name


def velocity_target(net: nn.Module, chain: str, options: Options) -> str | None:
    """Return the path in the net of the module that computes a chain's initial velocity; it is added the first time."""
    module = options.velocity_of(chain)
    if isinstance(module, str):
        return None
    modules = _velocity_modules(net)
    if chain not in modules.names:
        modules.names[chain] = call_name(chain, {f"momentum_{name}" for name in modules.names.values()}).removeprefix(
            "momentum_"
        )
        modules.add_module(modules.names[chain], module)
    return f"velocity.{modules.names[chain]}"


def _velocity_modules(net: nn.Module) -> Extra:
    found = net._modules.get("velocity")
    if isinstance(found, Extra):
        return found
    if hasattr(net, "velocity"):
        raise MfxError(
            f"{type(net).__name__} has an attribute 'velocity', and the modules that compute v0 go by that name. "
            "Rename it, or use velocity='zero' or 'residual'."
        )
    made = Extra()
    net.add_module("velocity", made)
    return made
