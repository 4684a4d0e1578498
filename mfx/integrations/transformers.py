"""γ and the peak of activations in the Trainer of Hugging Face transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mfx.integrations.trained_nets import Annealing, TrainedNets
from mfx.schedule import Schedule

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler, TrainerState
except ImportError:
    is_installed, TrainerCallback = False, object
else:
    is_installed = True

_KEY = "mfx.gamma"
_STATE_FILE = "trainer_state.json"


class MomentumCallback(Annealing, TrainerCallback):  # type: ignore[misc]
    """Anneals γ over a training of ``transformers.Trainer``, and saves, restores and logs it.

    A step is an optimizer step, however many batches it accumulates. γ is saved in a checkpoint's
    ``trainer_state.json``. ``trainer.train(resume_from_checkpoint=...)`` restores it and goes on with the schedule; so
    does the best model that ``load_best_model_at_end=True`` loads get the γ it was saved with.

    The logs of the training loss have two more values: ``gamma``, that of the step that is logged (one for each chain,
    ``gamma/CHAIN``, where they differ), and ``activation_peak_mib``, the peak of activations in MiB, as
    `mfx.ActivationMeter` measures it. Measured is the step that is logged, or the first of each epoch where logs are
    written once an epoch; on a CPU measuring takes time, and on a CUDA device it resets the statistics of peaks.

    Args:
        schedule: γ for optimizer step 0, 1, 2 …, as `mfx.GammaScheduler` takes it, such as
            ``mfx.schedule.linear(steps=1000)``; None to leave γ as the net has it.

    Raises:
        MfxError: transformers is not installed, or the schedule is not a function. In training: the model contains no
            momentumized net, or the schedule gives an invalid γ.

    Example:
        ``Trainer(model=mfx.momentumize(model), args=args, callbacks=[MomentumCallback()])``
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__(schedule, "transformers", is_installed)
        self._to_log: dict[str, float] = {}
        self._is_first_of_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set γ for the first step, or for the one that a checkpoint goes on with."""
        _put_in_front(self, sys._getframe(1).f_locals.get("self"))
        self._stop()  # of a training that an error ended
        self._nets = TrainedNets(model, self._schedule, state.global_step, state.stateful_callbacks.get(_KEY))
        self._to_log = {}
        state.stateful_callbacks[_KEY] = self._nets.state()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the first step measured if logs are written once an epoch."""
        self._is_first_of_epoch = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure a step that will be logged."""
        if self._nets is not None and _is_logged(args, state, self._is_first_of_epoch):
            self._nets.start_meter()
        self._is_first_of_epoch = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop measuring."""
        self._stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set γ for the next step."""
        if self._nets is not None:
            self._to_log |= self._nets.to_log()
            self._nets.go_to(state.global_step)
            state.stateful_callbacks[_KEY] = self._nets.state()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add γ and the peak of activations to the logs of the training loss."""
        if logs is not None and "loss" in logs:
            logs.update(self._to_log)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._to_log)  # a copy of the logs
            self._to_log = {}

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Set γ of the best model, if its weights have been loaded."""
        self._stop()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            file = Path(state.best_model_checkpoint) / _STATE_FILE
            saved = TrainerState.load_from_json(str(file)).stateful_callbacks.get(_KEY) if file.is_file() else None
            if saved is not None:
                TrainedNets(model, None, saved["step"], saved)


def _is_logged(args: Any, state: Any, is_first_of_epoch: bool) -> bool:
    strategy, step = str(getattr(args.logging_strategy, "value", args.logging_strategy)), state.global_step + 1
    if strategy == "epoch":
        return is_first_of_epoch
    return strategy == "steps" and (step % state.logging_steps == 0 or (step == 1 and args.logging_first_step))


def _put_in_front(callback: MomentumCallback, handler: Any) -> None:
    """Move a callback before those that report, so that what it adds to the logs is in their reports, too.

    Callbacks are given neither the trainer nor the handler that calls them one after the other. The handler is the
    caller; where it is not (some other loop), only later callbacks see the values.
    """
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
