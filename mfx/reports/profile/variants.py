"""The variants that a profile compares: a model trained in several ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Union

from torch import fx, nn

from mfx.api import momentumize
from mfx.net.views import View, last_views
from mfx.program.chain_call import Momentum
from mfx.reports.profile.checkpoint_baseline import Checkpointed, blocks_of
from mfx.reports.profile.untouched import copy_inputs, copy_momentumized, copy_original
from mfx.text import count, listed
from mfx_passes import MfxError

_NAMES = ("plain", "checkpoint", "momentum")
Way = Union[str, nn.Module, Callable[..., Any], Mapping[str, Any]]  # noqa: UP007 - evaluated by Python 3.10
Against = Union[str, Sequence[str], Mapping[str, Way]]  # noqa: UP007


@dataclass(frozen=True)
class Variant:
    """One way to train a model.

    Attributes:
        name: name in the user's ``against``.
        run: function that computes the model's output.
        net: the module that is run; None if ``run`` is not a module.
        note: describes what was run; to be called after the first run.
        wrapped: paths of the modules under ``torch.utils.checkpoint``, after the first run; None for other variants.
    """

    name: str
    run: Callable[..., Any]
    net: nn.Module | None
    note: Callable[[], str] = str
    wrapped: Collection[str] | None = None


def variants_of(
    model: nn.Module, args: Any, kwargs: Any, against: Against, options: Mapping[str, Any] | None
) -> list[Variant]:
    """Return the variants asked for.

    Raises:
        MfxError: there is no variant of such a name, or the model cannot be copied or captured.
    """
    ways = _ways(against)
    if isinstance(model, fx.GraphModule) and any(isinstance(module, Momentum) for module in model.modules()):
        raise MfxError(
            "this GraphModule was momentumized, and what it was before is not known; profile the model it was made of."
        )

    wanted = "momentum" in [way for way in ways.values() if isinstance(way, str)]
    rewritten = cache(partial(_rewritten, model, options))  # capturing may take seconds

    def variant(name: str, way: Way) -> Variant:
        if way == "plain":
            net = copy_original(model)
            return Variant(name, net, net)
        if way == "checkpoint":
            views = _views_after_a_run(rewritten(), args, kwargs, warn=wanted)
            return _checkpointed(name, copy_original(model), views)
        if way == "momentum" or isinstance(way, Mapping):
            net = rewritten() if isinstance(way, str) else _rewritten(model, way)
            return Variant(name, net, net, lambda: _described(net))
        assert callable(way)
        return Variant(name, way, way if isinstance(way, nn.Module) else None)

    return [variant(name, way) for name, way in ways.items()]


def _ways(against: Against) -> dict[str, Way]:
    names = (against,) if isinstance(against, str) else against
    if not isinstance(names, Mapping | Sequence) or not names:
        raise MfxError(f"against={against!r}: name one variant or more of {', '.join(_NAMES)}.")
    ways: dict[str, Way] = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    for name, way in ways.items():
        known = way in _NAMES if isinstance(way, str) else isinstance(way, Mapping) or callable(way)
        if not known or not isinstance(name, str):
            raise MfxError(
                f"against: {way!r} is not a variant. Those with a name are {', '.join(_NAMES)}; a mapping from names "
                "to modules, functions, or options of mfx.momentumize gives variants of your own."
            )
    return ways


def _rewritten(model: nn.Module, options: Mapping[str, Any] | None) -> nn.Module:
    """Momentumize the model; return a momentumized net as it is, unless there are options."""
    already = copy_momentumized(model) if options is None else None
    if already is not None:
        return already
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mfx: .* has no chain of residual adds")  # the note says so
        return momentumize(copy_original(model), **(options or {}))


def _views_after_a_run(rewritten: nn.Module, args: Any, kwargs: Any, *, warn: bool) -> Sequence[View]:
    """Run a net, which may capture it only now, and return the views of the graphs that ran."""
    given, named = copy_inputs(args, kwargs)
    with warnings.catch_warnings():
        if not warn:
            warnings.filterwarnings("ignore", message="mfx: ")
        rewritten(*given, **named)
    return last_views(rewritten)


def _checkpointed(name: str, net: nn.Module, views: Iterable[View]) -> Variant:
    checkpointed = Checkpointed(net, blocks_of(net, views))

    def note() -> str:
        called = list(checkpointed.called)
        if not called:
            return "no block that could be wrapped was found, so this is the model as it is"
        return f"torch.utils.checkpoint around {count(len(called), 'module')}: {listed(called)}"

    return Variant(name, net, net, note, checkpointed.called)


def _described(net: nn.Module) -> str:
    calls = [call for view in last_views(net) for call in view.calls.values()]
    if not calls:
        return "no chain of residual adds was found, so this is the model as it is"
    steps = sum(len(call.graphs.steps) for call in calls)
    gammas = ", ".join(sorted({f"{call.gamma:g}" for call in calls}))
    arithmetics = ", ".join(sorted({call.settings.arithmetic.name for call in calls}))
    return f"{count(len(calls), 'chain')} of {count(steps, 'step')}; gamma {gammas}, {arithmetics} arithmetic"
