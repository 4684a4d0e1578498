"""γ over a training of lightning.Trainer, against the recurrence in a plain loop."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import mfx
from mfx.integrations.lightning import MomentumCallback
from mfx.schedule import linear
from tests.mfx.models import WIDTH, Stack, stack_recurrence

# Lightning warns about its own surroundings: few workers, deprecations of its dependencies. mfx's warnings stay errors.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:mfx")]

TOLERANCE = {"rtol": 2e-8, "atol": 2e-8}  # n·2⁻⁴⁰·T^1.5 with n < 1024, T = 6 is 1.4e-8
GAMMAS = [0.0, 230 / 1024, 461 / 1024, 691 / 1024, 0.9, 0.9]  # linear(4): 0.225, 0.45, 0.675 in 1024ths
GENERATOR = torch.Generator().manual_seed(0)
DATA = [tuple(torch.randn(2, n, generator=GENERATOR, dtype=torch.float64) for n in (WIDTH, 3)) for _ in range(12)]


class Task(lightning.LightningModule):
    """A net and its loss. It remembers γ of each forward pass in training."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.gammas = []

    def training_step(self, batch, index):
        self.gammas.append(gamma_of(self.net))
        return loss_of(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.validated_at = gamma_of(self.net)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def gamma_of(net):
    return mfx.explain(net).chains[0].gamma


def loss_of(output, labels):
    return (output - labels).square().mean()


def make():
    torch.manual_seed(0)
    return Stack(depth=6).double()


def data(batches=12):
    return torch.utils.data.DataLoader(DATA[:batches], batch_size=None)


class Trainer(lightning.Trainer):
    def __init__(self, path, *callbacks, **options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False}
        options = {"max_steps": 6, "logger": False, "log_every_n_steps": 1, **quiet, **options}
        super().__init__(
            accelerator="cpu", devices=1, default_root_dir=path, callbacks=list(callbacks), max_epochs=-1, **options
        )


class Logger(CSVLogger):
    """Remembers what it is given."""

    def __init__(self, path):
        super().__init__(path)
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_an_optimizer_step(accumulate, tmp_path):
    task, reference, logger = Task(mfx.momentumize(make(), gamma=0.5)), make(), Logger(tmp_path)
    options = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False, "logger": logger}
    Trainer(tmp_path, MomentumCallback(linear(steps=4)), **options).fit(task, data())
    assert task.gammas == [gamma for gamma in GAMMAS for _ in range(accumulate)]
    assert gamma_of(task.net) == 0.9
    optimizer = torch.optim.SGD(reference.parameters(), 0.01)
    for index, (x, labels) in enumerate(DATA[: 6 * accumulate]):
        gamma = GAMMAS[index // accumulate]
        (loss_of(stack_recurrence(reference, x, gamma), labels) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(task.net.state_dict()), dict(reference.state_dict()), **TOLERANCE)
    rows = [row for row in logger.rows if "gamma" in row]
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["gamma"] for row in rows] == pytest.approx(GAMMAS, abs=1e-7)  # loggers get float32


@pytest.mark.parametrize("of_itself", [False, pytest.param(True, marks=pytest.mark.zoo)])
def test_resuming_goes_on_exactly(of_itself, tmp_path):
    """``of_itself``: the LightningModule is the net."""

    class Whole(Task):
        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            self.gammas.append(gamma_of(self))
            return loss_of(self(batch[0]), batch[1])

    def task():
        return mfx.momentumize(Whole(make()), gamma=0.5) if of_itself else Task(mfx.momentumize(make(), gamma=0.5))

    # Lightning goes through a DataLoader anew when it resumes, so the checkpoint is that of an epoch's end.
    save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole, resumed, constant = task(), task(), task()
    Trainer(tmp_path, save, MomentumCallback(linear(steps=4))).fit(whole, data(3))
    file = tmp_path / "step=3.ckpt"
    quiet = {"enable_checkpointing": False}
    Trainer(tmp_path, MomentumCallback(linear(steps=4)), **quiet).fit(resumed, data(3), ckpt_path=file)
    assert resumed.gammas == GAMMAS[3:]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    Trainer(tmp_path, MomentumCallback(), **quiet).fit(constant, data(3), ckpt_path=file)
    assert constant.gammas == [GAMMAS[3]] * 3, "without a schedule, the γ that was saved"


def test_a_checkpoint_without_the_callback_and_one_to_validate(tmp_path):
    saved = Trainer(tmp_path, enable_checkpointing=False, max_steps=3)
    saved.fit(Task(mfx.momentumize(make(), gamma=0.5)), data())
    saved.save_checkpoint(tmp_path / "plain.ckpt")
    task = Task(mfx.momentumize(make(), gamma=0.5))
    trainer = Trainer(tmp_path, MomentumCallback(linear(steps=4)), enable_checkpointing=False)
    trainer.fit(task, data(), ckpt_path=tmp_path / "plain.ckpt")
    assert task.gammas == GAMMAS[3:]
    trainer.save_checkpoint(tmp_path / "annealed.ckpt")
    other = Task(mfx.momentumize(make(), gamma=0.5))
    validation = Trainer(tmp_path, MomentumCallback(linear(steps=4)))
    validation.validate(other, data(), ckpt_path=tmp_path / "annealed.ckpt", verbose=False)
    assert other.validated_at == 0.9
    assert not other._load_state_dict_pre_hooks


def test_the_peak_is_that_of_the_step_that_is_logged(tmp_path):
    logger, net = Logger(tmp_path), mfx.momentumize(make())
    options = {"enable_checkpointing": False, "logger": logger, "log_every_n_steps": 3}
    Trainer(tmp_path, MomentumCallback(), accumulate_grad_batches=2, **options).fit(Task(net), data())
    rows = [row for row in logger.rows if "gamma" in row]
    assert [row["step"] for row in rows] == [2, 5]
    with mfx.ActivationMeter(net.parameters()) as meter:
        loss_of(net(DATA[0][0]), DATA[0][1]).backward()
    for row in rows:  # some more: Lightning divides the loss and adds it up
        assert meter.peak <= row["activation_peak_mib"] * 2**20 <= meter.peak + 1024


def test_an_error_in_a_step_leaves_no_meter_behind(tmp_path):
    class Fails(Callback):
        def on_before_zero_grad(self, *_):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Trainer(tmp_path, MomentumCallback(), Fails(), enable_checkpointing=False).fit(
            Task(mfx.momentumize(make())), data()
        )
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def test_errors(tmp_path):
    with pytest.raises(mfx.MfxError, match=r"schedule=0\.5: a function from the number of a step"):
        MomentumCallback(0.5)
    with pytest.raises(mfx.MfxError, match="contains no momentumized net"):
        Trainer(tmp_path, MomentumCallback(), enable_checkpointing=False).fit(Task(make()), data())
