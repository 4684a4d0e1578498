"""γ over a training of transformers.Trainer, against the recurrence in a plain loop."""

import json

import pytest
import torch
import transformers
from torch import nn

import mfx
from mfx.integrations.transformers import MomentumCallback
from mfx.schedule import linear
from tests.mfx.models import WIDTH, Stack, stack_recurrence

pytest.importorskip("accelerate")

# The trainer warns about its own surroundings: pinned memory without a GPU, deprecations of its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = {"rtol": 2e-8, "atol": 2e-8}  # n·2⁻⁴⁰·T^1.5 with n < 1024, T = 6 is 1.4e-8
GAMMAS = [0.0, 230 / 1024, 461 / 1024, 691 / 1024, 0.9, 0.9]  # linear(4): 0.225, 0.45, 0.675 in 1024ths


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x, self.labels = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (WIDTH, 3))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.labels[index]}


class Task(nn.Module):
    """A net and its loss. It remembers each batch of training and γ of its forward pass."""

    def __init__(self, model):
        super().__init__()
        self.net = model
        self.seen = []

    def forward(self, x, labels):
        if self.training:
            self.seen.append((x, labels, gamma_of(self.net)))
        return {"loss": loss_of(self.net(x), labels)}


class Reporter(transformers.TrainerCallback):
    """Receives what TensorBoard and others would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append({"step": state.global_step, **logs})


def gamma_of(net):
    return mfx.explain(net).chains[0].gamma


def loss_of(output, labels):
    return (output - labels).square().mean()


def make():
    torch.manual_seed(0)
    return Stack(depth=6).double()


def trainer_for(task, path, *callbacks, **options):
    options = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "lr_scheduler_type": "constant", **options}
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        optim="sgd",
        learning_rate=0.01,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    return transformers.Trainer(
        model=task, args=arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=list(callbacks)
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_an_optimizer_step(accumulate, tmp_path):
    task, reference, reporter = Task(mfx.momentumize(make(), gamma=0.5)), make(), Reporter()
    callbacks = reporter, MomentumCallback(linear(steps=4))
    trainer_for(task, tmp_path, *callbacks, gradient_accumulation_steps=accumulate).train()
    assert [gamma for *_, gamma in task.seen] == [gamma for gamma in GAMMAS for _ in range(accumulate)]
    assert gamma_of(task.net) == 0.9
    optimizer = torch.optim.SGD(reference.parameters(), 0.01)
    for index, (x, labels, _) in enumerate(task.seen, 1):
        gamma = GAMMAS[(index - 1) // accumulate]
        (loss_of(stack_recurrence(reference, x, gamma), labels) / accumulate).backward()
        if index % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(dict(task.net.state_dict()), dict(reference.state_dict()), **TOLERANCE)
    losses = [logs for logs in reporter.logs if "loss" in logs]
    assert [logs["gamma"] for logs in losses] == GAMMAS, "reporters run first, unless the callback comes before them"


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_goes_on_exactly(restore, tmp_path):
    def trainer(*callbacks):
        options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
        return trainer_for(Task(mfx.momentumize(make(), gamma=0.5)), tmp_path, *callbacks, **options)

    whole = trainer(MomentumCallback(linear(steps=4)))
    whole.train()
    history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [logs["gamma"] for logs in history] == GAMMAS[:3]
    resumed = trainer(MomentumCallback(linear(steps=4)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [gamma for *_, gamma in resumed.model.seen] == GAMMAS[3:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    constant = trainer(MomentumCallback())  # without a schedule: the γ that the checkpoint was saved at
    constant.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [gamma for *_, gamma in constant.model.seen] == [GAMMAS[3]] * 3


def test_the_best_model_gets_its_gamma(tmp_path):
    task = Task(mfx.momentumize(make()))
    schedule = [0.0, 0.25, 0.5].__getitem__
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_for(task, tmp_path, MomentumCallback(schedule), **options, **best)
    trainer.train()
    evaluated = {logs["step"]: logs["eval_loss"] for logs in trainer.state.log_history if "eval_loss" in logs}
    step = max(evaluated, key=evaluated.get)
    assert gamma_of(task.net) == schedule(step)
    assert trainer.evaluate()["eval_loss"] == evaluated[step]


def test_the_peak_is_that_of_the_step_that_is_logged(tmp_path):
    net, reporter = mfx.momentumize(make()), Reporter()
    trainer_for(Task(net), tmp_path, MomentumCallback(), reporter, logging_steps=3).train()
    losses = [logs for logs in reporter.logs if "loss" in logs]
    assert [logs["step"] for logs in losses] == [3, 6]
    rows = Rows()
    with mfx.ActivationMeter(net.parameters()) as meter:
        loss_of(net(rows.x[:2]), rows.labels[:2]).backward()
    for logs in losses:  # some more: the trainer divides the loss and adds it up
        assert meter.peak <= logs["activation_peak_mib"] * 2**20 <= meter.peak + 1024
        assert logs["gamma"] == 0.9


def test_chains_with_different_gammas_are_logged_one_by_one(tmp_path):
    task, reporter = nn.ModuleDict({"a": mfx.momentumize(make()), "b": mfx.momentumize(make())}), Reporter()
    mfx.set_gamma(task["b"], 0.5)

    class Both(Task):
        def forward(self, x, labels):
            return {"loss": loss_of(self.net["a"](x) + self.net["b"](x), labels)}

    both = Both(task)
    trainer_for(both, tmp_path, reporter, MomentumCallback(), max_steps=1, save_strategy="steps").train()
    assert {key: value for key, value in reporter.logs[0].items() if key.startswith("gamma")} == {
        "gamma/net.a.blocks": 0.9,
        "gamma/net.b.blocks": 0.5,
    }
    other = Both(nn.ModuleDict({"a": mfx.momentumize(make(), gamma=0.1), "b": mfx.momentumize(make(), gamma=0.1)}))
    trainer_for(other, tmp_path, MomentumCallback(), max_steps=1).train(str(tmp_path / "checkpoint-1"))
    assert [gamma_of(net) for net in other.net.values()] == [0.9, 0.5]


def test_an_error_in_a_step_leaves_no_meter_behind(tmp_path):
    class Fails(Task):
        def forward(self, x, labels):
            if len(self.seen) == 1:
                raise ValueError("no")
            return super().forward(x, labels)

    task = Fails(mfx.momentumize(make()))
    trainer = trainer_for(task, tmp_path, MomentumCallback(), max_steps=2)
    with pytest.raises(ValueError, match="no"):
        trainer.train()
    task.seen.clear()
    trainer.args.max_steps = 1
    trainer.train()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()


@pytest.mark.parametrize(
    "make_callback, message",
    [
        (lambda: MomentumCallback(0.5), r"schedule=0\.5: a function from the number of a step"),
        (lambda: trainer_for(Task(make()), "unused", MomentumCallback()).train(), "contains no momentumized net"),
    ],
)
def test_errors(make_callback, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mfx.MfxError, match=message):
        make_callback()
