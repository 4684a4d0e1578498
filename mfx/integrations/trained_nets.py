"""The momentumized nets in a model that a trainer trains: their γ by step, and the peak of activations of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mfx.meter import ActivationMeter
from mfx.net.forward import forward_of
from mfx.net.gammas import gammas_of, set_magnitude
from mfx.schedule import GammaScheduler, Schedule, check_schedule
from mfx_passes import MfxError
from mfx_passes.paths import is_inside, join

_MIB = 2**20


class Annealing:
    """The part that the callbacks of all trainers share: the schedule, and the nets while they are trained."""

    def __init__(self, schedule: Schedule | None, package: str, is_installed: bool) -> None:
        if not is_installed:
            raise MfxError(f"this MomentumCallback is for the Trainer of {package}: pip install {package}.")
        check_schedule(schedule, or_none=True)
        self._schedule = schedule
        self._nets: TrainedNets | None = None

    def _stop(self) -> None:
        """Stop measuring."""
        if self._nets is not None:
            self._nets.stop_meter()


class TrainedNets:
    """The momentumized nets in a model, at the γ of a training step.

    Args:
        model: a momentumized net, or a module that contains some.
        schedule: γ for optimizer step 0, 1, 2 …, as `mfx.GammaScheduler` takes it; None to leave γ as it is.
        step: number of optimizer steps done.
        saved: from `state`, of the nets to go on from; None for a new training.

    Raises:
        MfxError: there is no momentumized net, or there are not as many as were saved; or γ is invalid.

    Attributes:
        step: number of optimizer steps done.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule | None, step: int, saved: Mapping[str, Any] | None = None
    ) -> None:
        self._model = model
        self._nets = _nets_in(model)
        self._meter: ActivationMeter | None = None
        self._peak: int | None = None
        self.step = step
        if not self._nets:
            raise MfxError(
                f"MomentumCallback: {type(model).__name__} contains no momentumized net, so there is no gamma to "
                "anneal, save or log. Train mfx.momentumize(model)."
            )
        if saved is not None:
            self._restore(saved["gammas"])
        self._scheduler = None if schedule is None else GammaScheduler(model, schedule)
        if schedule is not None and self._scheduler is not None:
            is_saved = saved is not None and saved["step"] == step and saved["gamma"] is not None
            gamma = saved["gamma"] if saved is not None and is_saved else schedule(step)
            self._scheduler.load_state_dict({"last_step": step, "gamma": gamma})

    def go_to(self, step: int) -> None:
        """Set γ for the step that follows ``step`` optimizer steps.

        Raises:
            MfxError: the schedule gives an invalid γ.
        """
        while self._scheduler is not None and self._scheduler.last_step < step:
            self._scheduler.step()
        self.step = step

    def state(self) -> dict[str, Any]:
        """Return the step and γ as plain data."""
        gamma = None if self._scheduler is None else self._scheduler.get_last_gamma()
        return {"step": self.step, "gamma": gamma, "gammas": [_values(net) for net in self._nets.values()]}

    def start_meter(self) -> None:
        """Measure activations until `stop_meter`, on devices where they can be."""
        if self._meter is None:
            try:
                self._meter = ActivationMeter(self._model.parameters())
            except ValueError:  # neither CPU nor CUDA
                return
            self._meter.__enter__()

    def stop_meter(self) -> None:
        """Take the peak of what was measured, if anything was."""
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._peak, self._meter = self._meter.peak, None

    def to_log(self) -> dict[str, float]:
        """Return γ, and the peak of activations in MiB if it was measured since the last time.

        γ is one value under ``"gamma"`` where all chains have the same, else one for each chain.
        """
        gammas = {join(path, chain): gamma for path, net in self._nets.items() for chain, gamma in _values(net).items()}
        distinct = set(gammas.values())
        logged = {"gamma": distinct.pop()} if len(distinct) == 1 else {f"gamma/{k}": v for k, v in gammas.items()}
        if self._peak is not None:
            logged["activation_peak_mib"] = self._peak / _MIB
            self._peak = None
        return logged

    def _restore(self, gammas: list[dict[str, float]]) -> None:
        if len(gammas) != len(self._nets):
            raise MfxError(
                f"the checkpoint was saved with {len(gammas)} momentumized nets in the model, and this "
                f"{type(self._model).__name__} contains {len(self._nets)}. Make the model as the other one was made."
            )
        for net, saved in zip(self._nets.values(), gammas, strict=True):
            if saved:
                set_magnitude(net, saved)


def _values(net: nn.Module) -> dict[str, float]:
    return {chain: gamma.value for chain, gamma in gammas_of(net).items()}


def _nets_in(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost momentumized nets by path: γ set on one is set on all that it contains."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not any(is_inside(path, outer) for outer in found) and (forward_of(module) is not None or gammas_of(module)):
            found[path] = module
    return found
