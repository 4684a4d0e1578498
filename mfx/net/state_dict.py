"""γ and the steps of the chains in the metadata of a net's ``state_dict``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from mfx import compat
from mfx.engine import read_all
from mfx.net.forward import forward_of
from mfx.net.gammas import gammas_of, gammas_to_be, record_of, set_gamma, updates_of
from mfx.net.loaded import Loaded
from mfx.options.gamma import Drawn, Gamma
from mfx.program.record import Record
from mfx_passes import MfxError

_GAMMA = "mfx.gamma"  # in evaluation
_SIGNED = "mfx.bdia"  # of chains whose γ has signs: n, d, and how these are drawn
_CHAINS = "mfx.chains"
_PER_MODULE = "mfx.in_parts"  # all that older checkpoints say about chains
_ZERO = Gamma(0, 1)  # of a chain that was not rewritten


def note_gamma(net: nn.Module) -> None:
    """Have a net's ``state_dict()`` record its γ and its chains, and ``load_state_dict`` compare them.

    There are no new keys: both lie in ``state_dict()._metadata``, with the versions of modules; ``torch.save`` saves
    it. Weights of a model that was never momentumized have no record, and load without a warning.
    """
    if not compat.has_state_dict_hook(net, _note):
        net.register_state_dict_post_hook(_note)
        net.register_load_state_dict_pre_hook(_compare)


def _note(net: nn.Module, state: Mapping[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    read_all()  # before weights are saved that wrong gradients have moved
    record = record_of(net)
    if record is None and (loaded := _loaded(net)):
        record = loaded.record  # weights on their way from one file to another
    if gammas := gammas_to_be(net, {**updates_of(record)}):
        metadata[_GAMMA] = {chain: _fraction(gamma.in_evaluation) for chain, gamma in gammas.items()}
        if signed := {c: (*_fraction(gamma), *gamma.drawn) for c, gamma in gammas.items() if gamma.drawn}:
            metadata[_SIGNED] = signed
        metadata[_PER_MODULE] = _is_per_module(net)
        if record is not None:
            metadata[_CHAINS] = record.to_metadata()


def _compare(net: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    saved = {chain: Gamma(*fraction) for chain, fraction in metadata.get(_GAMMA, {}).items()}
    record, here = Record.of_metadata(metadata[_CHAINS]) if _CHAINS in metadata else None, record_of(net)
    moving = frozenset(chain for chain, gamma in saved.items() if gamma != _ZERO)
    loaded = None if record is None else Loaded(record, moving)
    _load(net, loaded)
    difference = ""
    if record is not None and loaded is not None and here is not None:
        if moving and here.differs(record, here.known, moving):
            difference = f" Besides, {loaded.difference(net, here)}"
        saved = {here.name_of(chain, record): gamma for chain, gamma in saved.items()}
    now = gammas_to_be(net, {chain: updates_of(record).get(chain) for chain in saved})
    now = {chain: gamma.in_evaluation for chain, gamma in now.items()}  # as which the weights are compared
    if loaded is not None and moving and any(gamma != _ZERO for gamma in now.values()):
        saved = {chain: gamma for chain, gamma in saved.items() if chain in now}  # the others: see `Loaded`
        now = {chain: gamma for chain, gamma in now.items() if chain in saved}
    if not now or not saved:
        return
    if record is None and metadata.get(_PER_MODULE) and not _is_per_module(net) and moving:
        warnings.warn(
            f"mfx: the weights given to this {type(net).__name__} are those of a net that was rewritten module by "
            "module, because a call of it was not one graph. This net is not, so far; as one graph it may have other "
            "chains, and so compute another function. Call it once as the other was called (in training mode, say) "
            "before it is used.",
            stacklevel=3,
        )
    others = [name for name in sorted({**saved, **now}) if saved.get(name, _ZERO) != now.get(name, _ZERO)]
    if others:
        warnings.warn(f"mfx: {_message(type(net).__name__, others, saved, now)}{difference}", stacklevel=4)


def adopt_gammas(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
    """Set γ of the nets in a module to what a ``state_dict`` that is about to be loaded was saved with.

    A hook on ``load_state_dict``, to run before the one that compares γ.

    Args:
        module: a module that contains nets.
        state: the whole ``state_dict``; without metadata nothing is changed.
        prefix: path of the module in it, with a dot at its end.
    """
    metadata = getattr(state, "_metadata", {})
    for path, net in module.named_modules():
        saved = metadata.get(f"{prefix}{path}".rstrip("."), {})
        if gammas := saved.get(_GAMMA):
            signed = {c: Gamma(n, d, Drawn(*drawn)) for c, (n, d, *drawn) in saved.get(_SIGNED, {}).items()}
            set_gamma(net, {**{chain: Gamma(*fraction).value for chain, fraction in gammas.items()}, **signed})


def _fraction(gamma: Gamma) -> tuple[int, int]:
    return gamma.numerator, gamma.denominator


def _loaded(net: nn.Module) -> Loaded | None:
    forward = forward_of(net)
    return None if forward is None else forward.table.loaded


def _load(net: nn.Module, loaded: Loaded | None) -> None:
    """Compare the chains of a net with those that weights were saved with, and have it compare later ones.

    Raises:
        MfxError: they are others.
    """
    forward, here = forward_of(net), record_of(net)
    if forward is not None:
        forward.load(loaded)
    elif loaded is not None and here is not None:
        moving = {chain for chain, gamma in gammas_of(net).items() if gamma.in_evaluation != _ZERO}
        if moving and loaded.moving and here.differs(loaded.record, moving, loaded.moving):
            raise MfxError(f"{loaded.difference(net, here)} Make this net as the other one was made.")


def _is_per_module(net: nn.Module) -> bool:
    forward = forward_of(net)
    return forward is not None and forward.per_module and not forward.table.graphs


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
