"""γ and the peak of activations in the Trainer of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mfx.compat import put_load_hook_first
from mfx.integrations.trained_nets import Annealing, TrainedNets
from mfx.net.state_dict import adopt_gammas
from mfx.schedule import Schedule

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    is_installed, Callback = False, object
else:
    is_installed = True


class MomentumCallback(Annealing, Callback):  # type: ignore[misc]
    """Anneals γ over a training of ``lightning.Trainer``, and saves, restores and logs it.

    A step is an optimizer step (``trainer.global_step``), however many batches it accumulates. γ is part of the
    trainer's checkpoints: ``trainer.fit(..., ckpt_path=...)`` restores it and goes on with the schedule, and validation
    and tests with a ``ckpt_path`` run at the γ that its weights were saved with.

    Two values go to the trainer's logger: ``gamma``, that of the step that is logged (one for each chain,
    ``gamma/CHAIN``, where they differ), and ``activation_peak_mib``, the peak of activations in MiB, as
    `mfx.ActivationMeter` measures it. Measured is every step that is logged (``log_every_n_steps``); on a CPU measuring
    takes time, and on a CUDA device it resets the statistics of peaks.

    Args:
        schedule: γ for optimizer step 0, 1, 2 …, as `mfx.GammaScheduler` takes it, such as
            ``mfx.schedule.linear(steps=1000)``; None to leave γ as the net has it.

    Raises:
        MfxError: lightning is not installed, or the schedule is not a function. In training: the module contains no
            momentumized net, or the schedule gives an invalid γ.

    Example:
        ``lightning.Trainer(callbacks=[MomentumCallback(mfx.schedule.linear(steps=1000))])``
    """

    def __init__(self, schedule: Schedule | None = None) -> None:
        super().__init__(schedule, "lightning", is_installed)
        self._saved: Mapping[str, Any] | None = None
        self._adopting: Any = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Have weights that the trainer loads bring their γ, which comes before the callbacks' own states."""
        self._adopting = put_load_hook_first(pl_module, adopt_gammas)

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Leave the module as it was."""
        self._adopting.remove()
        self._saved = None  # of a validation

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Set γ for the first step, or for the one that a checkpoint goes on with."""
        step = trainer.global_step if self._saved is None else self._saved["step"]
        self._nets = TrainedNets(pl_module, self._schedule, step, self._saved)
        self._saved = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Go to the step of a checkpoint that was saved without this callback."""
        if self._nets is not None and self._nets.step != trainer.global_step:
            self._nets = TrainedNets(pl_module, self._schedule, trainer.global_step)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Measure a step that will be logged."""
        if self._nets is not None and trainer._logger_connector.should_update_logs:  # as Lightning's own callbacks ask
            self._nets.start_meter()

    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Stop measuring."""
        self._stop()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log γ and the peak of activations, and set γ for the next step, once the optimizer has made one."""
        if self._nets is not None and trainer.global_step > self._nets.step:
            pl_module.log_dict(self._nets.to_log(), on_step=True, on_epoch=False)
            self._nets.go_to(trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Stop measuring."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return the step and γ, for the trainer's checkpoint."""
        return {} if self._nets is None else self._nets.state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's step and γ when the training starts.

        Args:
            state_dict: from `state_dict`.
        """
        self._saved = state_dict
