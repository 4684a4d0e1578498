"""Read and set γ of a net's chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from mfx.engine import read_all
from mfx.net.forward import NetForward, forward_of
from mfx.options.gamma import BDIA, Gamma
from mfx.options.options import AUTO, Given, check_gamma, check_names, gamma_from, look_up
from mfx.program.chain_call import Momentum
from mfx.program.record import Record, steps_of
from mfx.text import described
from mfx_passes import MfxError


def set_gamma(net: nn.Module, gamma: Given | Mapping[str, Given]) -> None:
    """Set the momentum of a net's chains from the next call on, without capturing or compiling anything anew.

    Every graph of the net follows, also those that will be captured later. A call that is under way keeps its γ until
    its backward pass is done, so gradients are always those of the function that ran.

    Args:
        net: a momentumized net, or a module that contains some: then all of them.
        gamma: 0 <= γ < 1, an `mfx.BDIA` or "auto", for all chains or by chain name (shell patterns allowed; a name goes
            before a pattern). Chains that a mapping says nothing about keep theirs. 1 is for `mfx.MomentumNet` alone.

    Raises:
        MfxError: a γ is out of range, no chain has such a name, or there is no momentumized net. Nothing is changed.
    """
    _set(net, gamma, keeps_signs=False)


def set_magnitude(net: nn.Module, gamma: float | Mapping[str, float]) -> None:
    """Set the momentum of a net's chains as `set_gamma` does; where γ has signs, the number is its magnitude.

    Args:
        net: as there.
        gamma: 0 <= γ < 1, for all chains or by chain name.

    Raises:
        MfxError: as there, or ``gamma`` is not a number or a mapping to numbers.
    """
    for value in gamma.values() if isinstance(gamma, Mapping) else (gamma,):
        if isinstance(value, str | BDIA):
            raise MfxError(f"{value!r}: gamma of a step is a number; for chains with an mfx.BDIA it is the magnitude.")
    _set(net, gamma, keeps_signs=True)


def _set(net: nn.Module, gamma: Any, *, keeps_signs: bool) -> None:
    if not isinstance(net, nn.Module):
        raise MfxError(f"set_gamma takes a momentumized net, not {described(net)}.")
    forwards = [forward for module in net.modules() if (forward := forward_of(module))]
    calls = [module for module in net.modules() if isinstance(module, Momentum)]
    if not forwards and not calls:
        raise MfxError(
            f"{type(net).__name__} has not been momentumized, so it has no gamma to set; call "
            "mfx.momentumize(model) first."
        )
    read_all()
    only_of_functions = not forwards and not any(isinstance(module, fx.GraphModule) for module in net.modules())
    check_gamma(gamma, or_one=only_of_functions)
    if names := {call.chain for call in calls}.union(*map(_chains, forwards)):  # none before the first capture
        check_names("gamma", gamma, names)
    of_forwards = [(call, forward) for forward in forwards for call in _calls(forward)]
    all_calls = [*calls, *(call for call, _ in of_forwards)]
    before = [forward.options for forward in forwards], [call.gamma for call in all_calls]
    try:
        for forward in forwards:
            options = forward.options
            change = options.with_magnitude if keeps_signs else options.with_gamma
            forward.table.options = change(gamma, _chains(forward))
        for call in calls:
            value = look_up(gamma, call.chain) if isinstance(gamma, Mapping) else gamma
            if value is not None:
                now = Gamma.of(1.0, or_one=True) if value == 1 else gamma_from(value, sum(call.graphs.updates))
                call.gamma = call.gamma.with_magnitude(now) if keeps_signs else now
        for call, forward in of_forwards:  # as graphs captured later will have it
            call.gamma = forward.options.gamma_of(call.chain, sum(call.graphs.updates))
        for forward in forwards:  # graphs that differ in their chains were the same function at gamma = 0
            for graph in forward.table.graphs:
                forward.table.check(graph)
    except MfxError:
        for forward, options in zip(forwards, before[0], strict=True):
            forward.table.options = options
        for call, old in zip(all_calls, before[1], strict=True):
            call.gamma = old
        raise


def gammas_of(module: nn.Module) -> dict[str, Gamma]:
    """Return γ of each chain of a momentumized net; empty for any other module."""
    forward = forward_of(module)
    if forward is None:
        return {call.chain: call.gamma for call in module.children() if isinstance(call, Momentum)}
    if calls := [call for part in (forward, *forward.submodules()) for call in _calls(part)]:
        return {call.chain: call.gamma for call in calls}
    record = record_of(module)
    return {name: forward.options.gamma_of(name, n) for name, n in updates_of(record).items()}


def record_of(module: nn.Module) -> Record | None:
    """Return a record of the chains of a momentumized net, as far as they are known; None for any other module."""
    forward = forward_of(module)
    if forward is not None:
        records = (part.table.record for part in (forward, *forward.submodules()))
        return Record.merged(record for record in records if record is not None)
    chains = {c.chain: [steps_of(c.graphs.steps)] for c in module.children() if isinstance(c, Momentum)}
    return Record(chains, chains, None) if chains else None


def updates_of(record: Record | None) -> dict[str, int]:
    """Return the number of updates of each chain of a record, by name."""
    return {} if record is None else {name: len(variants[0]) for name, variants in record.known.items()}


def gammas_to_be(module: nn.Module, chains: Mapping[str, int | None]) -> dict[str, Gamma]:
    """Return γ of each chain of a net; before the first capture, γ that chains of these names would get.

    Args:
        module: the net.
        chains: the number of updates of each, by name; None if it is not known, nor γ then, where that is "auto".
    """
    forward, known_gammas = forward_of(module), gammas_of(module)
    if forward is None or known_gammas:
        return known_gammas
    options = forward.options
    known = options.gamma if isinstance(options.gamma, Mapping) else {"*": options.gamma}
    wanted = {name: look_up(known, name) for name in chains}
    return {
        name: options.gamma_of(name, chains[name] or 0)
        for name, value in wanted.items()
        if value is not None and (value != AUTO or chains[name] is not None)
    }


def _calls(forward: NetForward) -> list[Momentum]:
    active = [] if forward.active is None else [forward.active]
    return [call for graph in (*forward.table.graphs, *active) for call in graph.calls.values()]


def _chains(forward: NetForward) -> set[str]:
    return {call.chain for call in _calls(forward)}
