"""Layers of drawn models: those of torch, and those that hold state of their own or draw random numbers."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

import mfx


def averaged(x):
    """Return the mean row of a batch."""
    return x.detach().flatten(0, -2).mean(0)


class Counter(nn.Module):
    """A factor that falls with the number of calls, as in a warm-up."""

    def __init__(self, width):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (0.5 + 0.5 / self.calls)


class Potential(nn.Module):
    """A tensor that is no buffer and is replaced at every call, as in a spiking neuron."""

    def __init__(self, width):
        super().__init__()
        self.memory = torch.zeros(width)

    def forward(self, x):
        potential = 0.5 * self.memory + x
        self.memory = averaged(potential)
        return torch.tanh(potential)


class InPlace(nn.Module):
    """A tensor that is no buffer and is changed in place."""

    def __init__(self, width):
        super().__init__()
        self.trace = torch.ones(width)

    def forward(self, x):
        self.trace.mul_(0.5).add_(averaged(x).abs())
        return x / (1 + self.trace)


class Lazy(nn.Module):
    """None, until the first call makes it a tensor."""

    def __init__(self, width):
        super().__init__()
        self.first = None

    def forward(self, x):
        if self.first is None:
            self.first = averaged(x)
        return x - self.first


class History(nn.Module):
    """A list of what the last calls saw."""

    def __init__(self, width):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(averaged(x))
        del self.seen[:-3]
        return x + self.seen[0]


class Cache(nn.Module):
    """A table by the size of the batch, filled at its first call."""

    def __init__(self, width):
        super().__init__()
        self.table = {}

    def forward(self, x):
        size = x.shape[0]
        if size not in self.table:
            self.table[size] = averaged(x)
        return x * torch.sigmoid(self.table[size])


class Box:
    """An object of the user's."""

    def __init__(self):
        self.calls = 0


class Boxed(nn.Module):
    """A number in an object that the module holds."""

    def __init__(self, width):
        super().__init__()
        self.box = Box()

    def forward(self, x):
        self.box.calls += 1
        return x * (1 - 0.5**self.box.calls)


class Noted(nn.Module):
    """A hook of the module's own, which notes what a layer computed."""

    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)
        self.noted = None
        self.fc.register_forward_hook(self.note)

    def note(self, module, args, output):
        if not mfx.recomputing():
            self.noted = averaged(output)

    def forward(self, x):
        return torch.tanh(self.fc(x))


class Moving(nn.Module):
    """A buffer that is changed in place, and one that is replaced."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("last", torch.zeros(width))

    def forward(self, x):
        if self.training:
            now = averaged(x).to(self.mean.dtype)
            self.mean.lerp_(now, 0.1)
            self.last = now
        return x - self.mean


class TorchNoise(nn.Module):
    """A factor drawn by torch."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return x * torch.rand_like(x)


class PythonNoise(nn.Module):
    """A factor drawn by Python."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return x * random.uniform(0.5, 1.0)


class NumpyNoise(nn.Module):
    """A factor drawn by numpy."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return x * float(np.random.uniform(0.5, 1.0))  # noqa: NPY002


class Scaled(nn.Module):
    """A factor and a switch that are plain attributes."""

    def __init__(self, width):
        super().__init__()
        self.factor, self.smooth = 1.0, True

    def forward(self, x):
        return (torch.tanh(x) if self.smooth else torch.relu(x)) * self.factor


class InPlaceRelu(nn.Module):
    """An activation that overwrites a sum."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return torch.relu_(x + 0.1)


class Checkpointed(nn.Module):
    """A part that runs under torch's own checkpoint, or as it does without one: the reference."""

    def __init__(self, width):
        super().__init__()
        self.fc, self.is_called = nn.Linear(width, width), False

    def forward(self, x):
        return self.fc(x) if self.is_called else checkpoint(self.fc, x, use_reentrant=False)


class WithoutGradient(nn.Module):
    """A part that is computed without gradients."""

    def __init__(self, width):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.fc(x))
        return x * gate


TORCH = {
    "linear": lambda width: nn.Linear(width, width),
    "bn": nn.BatchNorm1d,
    "ln": nn.LayerNorm,
    "tanh": lambda width: nn.Tanh(),
    "relu": lambda width: nn.ReLU(),
    "dropout": lambda width: nn.Dropout(0.3),
    "weight_norm": lambda width: parametrizations.weight_norm(nn.Linear(width, width)),
    "spectral_norm": lambda width: parametrizations.spectral_norm(nn.Linear(width, width)),
    "spectral_hook": lambda width: spectral_norm(nn.Linear(width, width)),
}
OWN = {
    "counter": Counter,
    "potential": Potential,
    "in_place": InPlace,
    "lazy": Lazy,
    "history": History,
    "cache": Cache,
    "boxed": Boxed,
    "noted": Noted,
    "moving": Moving,
    "torch_noise": TorchNoise,
    "python_noise": PythonNoise,
    "numpy_noise": NumpyNoise,
    "scaled": Scaled,
    "in_place_relu": InPlaceRelu,
    "checkpointed": Checkpointed,
    "without_gradient": WithoutGradient,
}
LAYERS = {**TORCH, **OWN}
STATEFUL = frozenset(
    {
        "counter",
        "potential",
        "in_place",
        "lazy",
        "history",
        "cache",
        "boxed",
        "noted",
        "moving",
        "spectral_norm",
        "spectral_hook",
    }
)
"""Layers whose result depends on earlier calls, or that note something."""
RANDOM = frozenset({"dropout", "torch_noise", "python_noise", "numpy_noise"})
SLOW = frozenset(
    {"torch_noise", "python_noise", "numpy_noise", "without_gradient", "checkpointed", "noted", "cache", "moving"}
)
"""Layers that no symbolic trace follows, so that TorchDynamo is asked."""
