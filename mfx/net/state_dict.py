"""γ in the metadata of a net's ``state_dict``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from mfx import compat
from mfx.net.forward import forward_of
from mfx.net.gammas import gammas_of, gammas_to_be
from mfx.options.gamma import Gamma

_KEY = "mfx.gamma"
_PER_MODULE = "mfx.in_parts"  # as in older checkpoints
_ZERO = Gamma(0, 1)  # of a chain that was not rewritten


def note_gamma(net: nn.Module) -> None:
    """Have a net's ``state_dict()`` record its γ, and ``load_state_dict`` warn of another γ.

    There are no new keys: γ lies in ``state_dict()._metadata``, with the versions of modules; ``torch.save`` saves it.
    Weights of a model that was never momentumized have no γ, and load without a warning.
    """
    if not compat.has_state_dict_hook(net, _note):
        net.register_state_dict_post_hook(_note)
        net.register_load_state_dict_pre_hook(_compare)


def _note(net: nn.Module, state: Mapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    if gammas := gammas_of(net):
        metadata[_KEY] = {chain: (gamma.numerator, gamma.denominator) for chain, gamma in gammas.items()}
        metadata[_PER_MODULE] = _is_per_module(net)


def _compare(net: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    saved = {chain: Gamma(*fraction) for chain, fraction in metadata.get(_KEY, {}).items()}
    now = gammas_to_be(net, saved)
    if not now or not saved:
        return
    if metadata.get(_PER_MODULE) and not _is_per_module(net) and any(gamma != _ZERO for gamma in saved.values()):
        warnings.warn(
            f"mfx: the weights given to this {type(net).__name__} are those of a net that was rewritten module by "
            "module, because a call of it was not one graph. This net is not, so far; as one graph it may have other "
            "chains, and so compute another function. Call it once as the other was called (in training mode, say) "
            "before it is used.",
            stacklevel=3,
        )
    others = [name for name in sorted({**saved, **now}) if saved.get(name, _ZERO) != now.get(name, _ZERO)]
    if others:
        warnings.warn(f"mfx: {_message(type(net).__name__, others, saved, now)}", stacklevel=4)


def _is_per_module(net: nn.Module) -> bool:
    forward = forward_of(net)
    return forward is not None and forward.per_module


def _message(name: str, chains: list[str], saved: Mapping[str, Gamma], now: Mapping[str, Gamma]) -> str:
    there, here = ([table[chain].value for chain in chains if chain in table] for table in (saved, now))
    everywhere = len(set(there)) == len(set(here)) == 1 and len(there) == len(here) == len(chains)
    if everywhere and set(chains) == set(now):
        differences, setting = f"gamma = {there[0]!r}, and this net has gamma = {here[0]!r}", repr(there[0])
    else:
        listed = (f"{chain}: {_shown(saved, chain)} there, {_shown(now, chain)} here" for chain in chains)
        differences = f"another gamma than this net has ({'; '.join(listed)})"
        setting = repr({chain: saved.get(chain, _ZERO).value for chain in chains if chain in now})
    advice = f" To go on with the function that was saved, call mfx.set_gamma(net, {setting})."
    return f"the weights given to this {name} were saved at {differences}: another function of the same weights." + (
        advice if any(chain in now for chain in chains) else ""
    )


def _shown(gammas: Mapping[str, Gamma], chain: str) -> str:
    return repr(gammas[chain].value) if chain in gammas else "not rewritten"
