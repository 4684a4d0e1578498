"""What a user may ask of `mfx.momentumize`, checked once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from mfx.options.gamma import Gamma
from mfx.options.memory_budget import MemoryBudget
from mfx_passes import MfxError, Selection

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """The checked arguments of `mfx.momentumize`, which documents them."""

    gamma: float | Mapping[str, float]
    velocity: str | nn.Module | Mapping[str, nn.Module]
    arithmetic: str
    memory_budget: MemoryBudget
    verify: str
    selection: Selection
    capture: str = "auto"
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    layers: tuple[Layer, ...] = ()  # of `mfx.transform_to_momentumnet`
    recompute: str | None = None

    @property
    def plans(self) -> bool:
        """Whether what a net keeps is planned for the net as a whole."""
        return self.memory_budget.is_partial or (self.recompute is not None and self.memory_budget.share != 1.0)

    def gamma_of(self, chain: str) -> Gamma:
        """The momentum of a chain.

        Raises:
            MfxError: the chain is in no key of a mapping.
        """
        if not isinstance(self.gamma, Mapping):
            return Gamma.of(self.gamma)
        value = look_up(self.gamma, chain)
        if value is None:
            raise MfxError(
                f"gamma is a mapping without a value for the chain {chain!r}; add it, or the key '*' for all others."
            )
        return Gamma.of(value)

    def velocity_of(self, chain: str) -> str | nn.Module:
        """The initial velocity of a chain: ``"zero"``, ``"residual"`` or a module; zero where a mapping is silent."""
        if isinstance(self.velocity, Mapping):
            module = look_up(self.velocity, chain)
            return "zero" if module is None else module
        return self.velocity

    def check_chains(self, chains: Collection[str]) -> None:
        """Check that whatever is given by chain name is given for a chain that is there.

        Raises:
            MfxError: it is not.
        """
        for option in ("gamma", "velocity") if chains else ():
            check_names(option, getattr(self, option), chains)

    def with_gamma(self, gamma: float | Mapping[str, float], chains: Collection[str]) -> Options:
        """The same options at another momentum; of ``chains``, those that a mapping says nothing about keep theirs."""
        if not isinstance(gamma, Mapping):
            return replace(self, gamma=gamma)
        before = self.gamma if isinstance(self.gamma, Mapping) else {"*": self.gamma}
        gamma = {name: value for name, value in gamma.items() if not chains or any(_fits(name, c) for c in chains)}
        named = {chain: value for chain in chains if (value := look_up(gamma, chain)) is not None}
        now = {**named, **gamma}  # what is said last goes before what was said before
        return replace(self, gamma={**now, **{name: value for name, value in before.items() if name not in now}})


def check_names(option: str, value: Any, chains: Collection[str]) -> None:
    """Check that every key of a mapping by chain name is the name of a chain, or a pattern that fits one.

    Raises:
        MfxError: it is not.
    """
    for pattern in value if isinstance(value, Mapping) else ():
        if not any(_fits(pattern, chain) for chain in chains):
            raise MfxError(f"{option}: no chain is called {pattern!r}. Chains: {', '.join(sorted(chains))}.")


def _fits(pattern: str, chain: str) -> bool:
    return chain == pattern or fnmatchcase(chain, pattern)


def look_up(mapping: Mapping[str, T], chain: str) -> T | None:
    """The value under a chain's own name, else under the first pattern that fits it."""
    if chain in mapping:
        return mapping[chain]
    return next((value for pattern, value in mapping.items() if fnmatchcase(chain, pattern)), None)


def check_options(
    *,
    gamma: Any = 0.9,
    velocity: Any = "zero",
    arithmetic: Any = "exact",
    memory_budget: Any = 0.0,
    recompute: Any = None,
    min_steps: Any = 2,
    only: Any = None,
    skip: Any = None,
    capture: Any = "auto",
    example_inputs: Any = None,
    verify: Any = "warn",
) -> Options:
    """Check all options before anything is done with them; the defaults are those of `mfx.momentumize`.

    Raises:
        MfxError: an option has a value it cannot have, or one that this version does not offer.
    """
    check_gamma(gamma)
    _check_velocity(velocity)
    _one_of("arithmetic", arithmetic, ("exact", "float"))
    _one_of("verify", verify, ("warn", "raise", "off"))
    _one_of("capture", capture, ("auto", "symbolic", "dynamo"))
    budget = MemoryBudget.of(memory_budget)
    if recompute is not None and recompute != "all":
        raise MfxError(
            f"recompute={recompute!r}: must be None (only the steps of the chains run again) or 'all' (what lies "
            "between the chains, too)."
        )
    if not isinstance(min_steps, int) or isinstance(min_steps, bool) or min_steps < 1:
        raise MfxError(f"min_steps={min_steps!r}: the number of steps a chain must have is an integer of at least 1.")
    chosen = None if only is None else _patterns("only", only)
    if chosen == ():
        raise MfxError(
            "only is empty, so nothing would be rewritten; give it chain names or module paths, or None for all."
        )
    selection = Selection(min_steps, chosen, () if skip is None else _patterns("skip", skip))
    gamma = dict(gamma) if isinstance(gamma, Mapping) else gamma  # the caller may change theirs later
    inputs = None if example_inputs is None else _as_call(example_inputs)
    return Options(gamma, velocity, arithmetic, budget, verify, selection, capture, inputs, recompute=recompute)


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and named arguments: a mapping names them, a tuple or list lists them."""
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def check_gamma(gamma: Any, *, or_one: bool = False) -> None:
    """Check a momentum, or a mapping from chain names to momenta; whether one may be 1 is ``or_one``.

    Raises:
        MfxError: it is neither, or not one that can be had.
    """
    values = gamma.values() if isinstance(gamma, Mapping) else (gamma,)
    if isinstance(gamma, Mapping) and not (gamma and all(isinstance(name, str) for name in gamma)):
        raise MfxError(f"gamma={gamma!r}: a mapping goes from chain names (shell patterns) to numbers.")
    for value in values:
        Gamma.of(value, or_one=or_one)


def _check_velocity(velocity: Any) -> None:
    if isinstance(velocity, nn.Module) or (isinstance(velocity, str) and velocity in ("zero", "residual")):
        return
    if isinstance(velocity, Mapping) and all(_is_named_module(*item) for item in velocity.items()):
        return
    raise MfxError(
        f"velocity={velocity!r}: the velocity before the first step is 'zero', 'residual' (that of the first branch), "
        "a module that computes it from the state, or a mapping from chain names (shell patterns) to such modules."
    )


def _is_named_module(name: Any, module: Any) -> bool:
    return isinstance(name, str) and isinstance(module, nn.Module)


def _one_of(name: str, value: Any, values: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in values:
        raise MfxError(f"{name}={value!r}: must be {' or '.join(map(repr, values))}.")


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise MfxError(f"{name}={value!r}: must be a chain name or module path, or several of them.")
    return patterns


@dataclass(frozen=True)
class Layer:
    """One entry of ``sub_layers``, and what was said about it; see `mfx.transform_to_momentumnet`."""

    path: str
    keep_first: bool
    is_residual: bool
