"""The options of `mfx.momentumize`: a frozen dataclass that checks itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

from torch import nn

from mfx.options.gamma import BDIA, Gamma, check_velocity_with
from mfx.options.memory_budget import MemoryBudget
from mfx_passes import MfxError, Selection

T = TypeVar("T")
Given: TypeAlias = float | str | BDIA | Gamma  # γ of a chain as it may be asked for
AUTO = "auto"
_DEEP = 12  # updates from which on "auto" is 0.9


# Arguments of `mfx.momentumize` that go with any graph of a model, however it was captured.
OF_GRAPHS = (
    "gamma",
    "velocity",
    "arithmetic",
    "memory_budget",
    "recompute",
    "offload",
    "min_steps",
    "only",
    "skip",
    "verify",
)


@dataclass(frozen=True)
class Layer:
    """One entry of ``sub_layers`` with its settings; see `mfx.transform_to_momentumnet`."""

    path: str
    keep_first: bool
    is_residual: bool


@dataclass(frozen=True)
class Options:
    """The arguments of `mfx.momentumize`, which documents them, in its order and with its defaults.

    Args:
        layers: layers that `mfx.transform_to_momentumnet` turns into chains; no other chain is looked for then.
        within: path of the submodule that the options are for, "" for the net itself.
        decided: γ that "auto" means for the chains found so far, by ``within`` and name; shared with options made of
            these.

    Raises:
        MfxError: an option has a value it cannot have, or one that this version does not offer.
    """

    gamma: Given | Mapping[str, Given] = 0.9
    velocity: str | nn.Module | Mapping[str, nn.Module] = "zero"
    arithmetic: str = "exact"
    memory_budget: float | str = 0.0
    recompute: str | None = None
    offload: str | None = None
    min_steps: int = 2
    only: str | Sequence[str | Sequence[str]] | None = None
    skip: str | Sequence[str] | None = None
    capture: str = "auto"
    example_inputs: Any = None
    verify: str = "warn"
    layers: tuple[Layer, ...] = ()
    within: str = ""
    decided: dict[tuple[str, str], float] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        _check_velocity(self.velocity, self.gamma)
        _check_choice("arithmetic", self.arithmetic, ("exact", "float"))
        _check_choice("verify", self.verify, ("warn", "raise", "off"))
        _check_choice("capture", self.capture, ("auto", "symbolic", "dynamo"))
        MemoryBudget.of(self.memory_budget)
        if self.recompute is not None and self.recompute != "all":
            raise MfxError(
                f"recompute={self.recompute!r}: must be None (the steps of the chains and blocks like theirs run "
                "again) or 'all' (all that lies between the chains, too)."
            )
        if self.offload is not None and self.offload != "cpu":
            raise MfxError(
                f"offload={self.offload!r}: must be None (what chains keep stays on their device) or 'cpu' (it lies in "
                "host memory)."
            )
        if not isinstance(self.min_steps, int) or isinstance(self.min_steps, bool) or self.min_steps < 1:
            raise MfxError(
                f"min_steps={self.min_steps!r}: the number of steps a chain must have is an integer of at least 1."
            )
        only, skip = _groups(self.only), _patterns("skip", self.skip)
        if only is not None and (not only or () in only):
            raise MfxError(
                "only is empty, so nothing would be rewritten; give it chain names or module paths, or None for all."
            )
        gamma = dict(self.gamma) if isinstance(self.gamma, Mapping) else self.gamma
        inputs = [*self.example_inputs] if isinstance(self.example_inputs, list) else self.example_inputs
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
        # Copies: the caller may change theirs later.
        self.__dict__.update(gamma=gamma, only=only, skip=skip, example_inputs=inputs)

    @property
    def budget(self) -> MemoryBudget:
        """The memory budget, parsed."""
        return MemoryBudget.of(self.memory_budget)

    @property
    def selection(self) -> Selection:
        """The residual adds that may be rewritten."""
        only, skip = _groups(self.only), _patterns("skip", self.skip)
        return Selection(self.min_steps, only, skip or (), within=self.within, marked=bool(self.layers))

    @property
    def example_calls(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Example inputs as positional and named arguments of one call, or of several.

        A mapping names them, a tuple or list lists them; a list of nothing but tuples and mappings is of several calls.
        """
        inputs = self.example_inputs
        is_several = isinstance(inputs, list) and inputs and all(isinstance(i, tuple | Mapping) for i in inputs)
        return [call_of(one) for one in inputs] if is_several else [call_of(inputs)]

    @property
    def plans(self) -> bool:
        """True if one plan for the whole net says what is kept."""
        return self.budget.is_partial or (self.recompute is not None and self.budget.share != 1.0)

    @property
    def may_change_function(self) -> bool:
        """True if γ is not 0 for every chain."""
        return not all(value != AUTO and Gamma.of(value).is_zero for value in _values(self.gamma))

    @property
    def draws_signs(self) -> bool:
        """True if γ of some chain has signs that calls draw, of whatever magnitude."""
        return any(value != AUTO and Gamma.of(value).drawn is not None for value in _values(self.gamma))

    @property
    def given_gamma(self) -> Any:
        """γ as a user writes it."""

        def given(value: Given) -> Given:
            return value.given if isinstance(value, Gamma) else value

        if isinstance(self.gamma, Mapping):
            return {name: given(value) for name, value in self.gamma.items()}
        return given(self.gamma)

    def gamma_of(self, chain: str, updates: int) -> Gamma:
        """Return the momentum of a chain.

        Args:
            chain: its name.
            updates: the number of its updates, by which ``"auto"`` is decided when the chain is first found.

        Raises:
            MfxError: gamma is a mapping without a key for the chain.
        """
        value = look_up(self.gamma, chain) if isinstance(self.gamma, Mapping) else self.gamma
        if value is None:
            raise MfxError(
                f"gamma is a mapping without a value for the chain {chain!r}; add it, or the key '*' for all others."
            )
        known = self.decided.get((self.within, chain)) if value == AUTO else None
        return gamma_from(value if known is None else known, updates)

    def decide(self, updates: Mapping[str, int]) -> None:
        """Decide γ of chains where it is "auto", for good.

        Args:
            updates: the number of updates of each chain, by name.
        """
        for chain, count in updates.items():
            self.decided.setdefault((self.within, chain), gamma_from(AUTO, count).value)

    def velocity_of(self, chain: str) -> str | nn.Module:
        """Return the initial velocity of a chain: ``"zero"``, ``"residual"`` or a module; zero if no key fits."""
        if isinstance(self.velocity, Mapping):
            module = look_up(self.velocity, chain)
            return "zero" if module is None else module
        return self.velocity

    def check_chains(self, chains: Collection[str]) -> None:
        """Check that each key of a mapping by chain name fits a chain.

        Raises:
            MfxError: one does not.
        """
        for option in ("gamma", "velocity") if chains else ():
            check_names(option, getattr(self, option), chains)

    def with_magnitude(self, gamma: float | Mapping[str, float], chains: Collection[str]) -> Options:
        """Return what `with_gamma` returns, but chains whose γ has signs keep these: the number is the magnitude."""
        before = self.gamma if isinstance(self.gamma, Mapping) else {"*": self.gamma}

        def signed(name: str, value: float) -> Given:
            old = look_up(before, name)
            return value if old is None or isinstance(old, str) else Gamma.of(old).with_magnitude(value)

        if isinstance(gamma, Mapping):
            named = {chain: value for chain in chains if (value := look_up(gamma, chain)) is not None}
            return self.with_gamma({name: signed(name, value) for name, value in {**named, **gamma}.items()}, chains)
        now = {name: signed(name, gamma) for name in before}
        return replace(self, gamma=now if isinstance(self.gamma, Mapping) else now["*"])

    def with_gamma(self, gamma: Given | Mapping[str, Given], chains: Collection[str]) -> Options:
        """Return the same options at another momentum; those of ``chains`` that a mapping leaves out keep theirs."""
        if not isinstance(gamma, Mapping):
            return replace(self, gamma=gamma)
        before = self.gamma if isinstance(self.gamma, Mapping) else {"*": self.gamma}
        gamma = {name: value for name, value in gamma.items() if not chains or any(_fits(name, c) for c in chains)}
        named = {chain: value for chain in chains if (value := look_up(gamma, chain)) is not None}
        now = {**named, **gamma}  # new keys go before old ones
        return replace(self, gamma={**now, **{name: value for name, value in before.items() if name not in now}})


def call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call, and those by name: of one input, a tuple of them, or a mapping from names."""
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def gamma_from(value: Given, updates: int) -> Gamma:
    """Return γ of a chain of so many updates as it was asked for."""
    if value == AUTO:
        return Gamma.of(0.9 if updates >= _DEEP else 0.0)
    assert not isinstance(value, str), "options are checked"
    return Gamma.of(value)


def check_names(option: str, value: Any, chains: Collection[str]) -> None:
    """Check that every key of a mapping by chain name is the name of a chain, or a pattern that fits one.

    Raises:
        MfxError: one is not.
    """
    for pattern in value if isinstance(value, Mapping) else ():
        if not any(_fits(pattern, chain) for chain in chains):
            raise MfxError(f"{option}: no chain is called {pattern!r}. Chains: {', '.join(sorted(chains))}.")


def _fits(pattern: str, chain: str) -> bool:
    return chain == pattern or fnmatchcase(chain, pattern)


def look_up(mapping: Mapping[str, T], chain: str) -> T | None:
    """Return the value under a chain's own name, else under the first pattern that fits it."""
    if chain in mapping:
        return mapping[chain]
    return next((value for pattern, value in mapping.items() if fnmatchcase(chain, pattern)), None)


def check_gamma(gamma: Any, *, or_one: bool = False) -> None:
    """Check a momentum, or a mapping from chain names to momenta.

    Args:
        gamma: the momentum, or the mapping.
        or_one: allow γ = 1, and not "auto".

    Raises:
        MfxError: it is neither, or a γ is out of range.
    """
    if isinstance(gamma, Mapping) and not (gamma and all(isinstance(name, str) for name in gamma)):
        raise MfxError(f"gamma={gamma!r}: a mapping goes from chain names (shell patterns) to numbers.")
    for value in _values(gamma):
        if or_one or not (isinstance(value, str) and value == AUTO):
            Gamma.of(value, or_one=or_one)


def _values(gamma: Any) -> Collection[Any]:
    return gamma.values() if isinstance(gamma, Mapping) else (gamma,)


def _check_velocity(velocity: Any, gamma: Any) -> None:
    for value in _values(gamma):
        if isinstance(value, BDIA):
            check_velocity_with(Gamma.of(value), is_default=isinstance(velocity, Mapping) or velocity == "zero")
    if isinstance(velocity, nn.Module) or (isinstance(velocity, str) and velocity in ("zero", "residual")):
        return
    if isinstance(velocity, Mapping) and all(
        isinstance(name, str) and isinstance(module, nn.Module) for name, module in velocity.items()
    ):
        return
    raise MfxError(
        f"velocity={velocity!r}: the velocity before the first step is 'zero', 'residual' (that of the first branch), "
        "a module that computes it from the state, or a mapping from chain names (shell patterns) to such modules."
    )


def _check_choice(name: str, value: Any, values: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in values:
        raise MfxError(f"{name}={value!r}: must be {' or '.join(map(repr, values))}.")


def _groups(only: Any) -> tuple[str | tuple[str, ...], ...] | None:
    """Return ``only`` as a tuple of patterns and of tuples of patterns."""
    if isinstance(only, str) or not isinstance(only, Iterable):
        return _patterns("only", only)
    entries = tuple(only)
    flat = [entry if isinstance(entry, str) or not isinstance(entry, Iterable) else tuple(entry) for entry in entries]
    for entry in flat:
        _patterns("only", entry if isinstance(entry, tuple) else (entry,))
    return tuple(flat)


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise MfxError(f"{name}={value!r}: must be a chain name or module path, or several of them.")
    return patterns
