"""Other people's training loops, with no special code: the weights of ordinary backpropagation in a plain loop."""

import copy

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.mfx.models import WIDTH, Stack

# The trainers warn about their own surroundings: few workers, no logger, deprecations of their dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

GENERATOR = torch.Generator().manual_seed(0)
DATA = torch.utils.data.TensorDataset(
    torch.randn(16, WIDTH, generator=GENERATOR), torch.randn(16, 3, generator=GENERATOR)
)


def batches() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(DATA, batch_size=4)


def nets() -> tuple[Stack, Stack]:
    """One that keeps nothing between forward and backward, and one that keeps everything."""
    torch.manual_seed(0)
    model = Stack(depth=6)
    return mfx.momentumize(copy.deepcopy(model)), mfx.momentumize(copy.deepcopy(model), memory_budget=1.0)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().mean()


def train_plainly(net: nn.Module, epochs: int, accumulate: int = 1) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    for _ in range(epochs):
        for index, (x, y) in enumerate(batches(), 1):
            (loss_of(net, x, y) / accumulate).backward()
            if index % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()


def assert_same_weights(found: nn.Module, expected: nn.Module) -> None:
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    found, expected = nets()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net, optimizer, data = accelerator.prepare(found, torch.optim.SGD(found.parameters(), 0.01), batches())
    for _ in range(2):
        for x, y in data:
            with accelerator.accumulate(net):
                accelerator.backward(loss_of(net, x, y))
                optimizer.step()
                optimizer.zero_grad()
    train_plainly(expected, epochs=2, accumulate=2)
    assert_same_weights(accelerator.unwrap_model(net), expected)


def test_lightning():
    lightning = pytest.importorskip("lightning")
    found, expected = nets()

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = found

        def training_step(self, batch, index):
            return loss_of(self.net, *batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(accelerator="cpu", devices=1, max_epochs=2, **quiet).fit(Task(), batches())
    train_plainly(expected, epochs=2)
    assert_same_weights(found, expected)
