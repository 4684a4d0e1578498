"""Models drawn at random: as small data, which a file can hold, and as the module that this describes.

A model is ``{"seed", "kind", "chains", "options"}``; a chain is ``{"steps", "tail"}``; a step is a list of names of
layers, or of one chain, whose output is the branch's.
"""

import torch
from torch import nn

from tests.promises.machine.layers import LAYERS, OWN, RANDOM, SLOW, STATEFUL, TORCH

WIDTH = 4
TAILS = {"none": nn.Identity, "relu": nn.ReLU, "ln": lambda: nn.LayerNorm(WIDTH)}


class Chain(nn.Module):
    """x + f(x), over and over."""

    def __init__(self, spec):
        super().__init__()
        self.strength = 1.0
        self.branches = nn.ModuleList(branch_of(step) for step in spec["steps"])
        self.tails = nn.ModuleList(TAILS[spec["tail"]]() for _ in spec["steps"])

    def forward(self, x, mask=None, scale=1.0):
        for branch, tail in zip(self.branches, self.tails, strict=True):
            f = branch(x) * self.strength
            x = tail(x + (f * scale if mask is None else f * mask))
        return x


def branch_of(step):
    """Return the branch that a step describes."""
    if isinstance(step, dict):
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), Chain(step), nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(*(LAYERS[name](WIDTH) for name in step))


class Model(nn.Module):
    """A stem, chains of residual adds, and a head; a mask and a factor are optional inputs."""

    def __init__(self, spec):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.chains = nn.ModuleList(Chain(chain) for chain in spec["chains"])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None, scale=1.0):
        return self.head(self.states(x, mask, scale)[-1])

    def states(self, x, mask, scale):
        """Return what comes out of the chains."""
        x, states = self.stem(x), []
        for chain in self.chains:
            x = chain(x, mask, scale)
            states.append(x)
        return states


class WithStates(Model):
    """Returns what comes out of its chains, too."""

    def forward(self, x, mask=None, scale=1.0):
        states = self.states(x, mask, scale)
        return {"y": self.head(states[-1]), "states": states}


class Detector(Model):
    """Looks at values after its chains, but not in training."""

    def forward(self, x, mask=None, scale=1.0):
        y = super().forward(x, mask, scale)
        if self.training:
            return y
        return y[y > 0.5] if (y > 0.5).any() else y.new_zeros(0)


class Optional(Model):
    """All of its inputs are optional."""

    def forward(self, x=None, mask=None, scale=1.0, other=None):
        first = None if x is None else self.head(self.states(x, mask, scale)[-1])
        return first, None if other is None else self.chains[0](other)


KINDS = {"model": Model, "states": WithStates, "detector": Detector, "optional": Optional}


def build(spec):
    """Return the module that a drawn model describes, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(spec["seed"])
        return KINDS[spec["kind"]](spec)


def draw(rng, *, symbolic=True):
    """Draw a model.

    Args:
        rng: a random.Random.
        symbolic: draw few layers that only TorchDynamo can capture, and let nothing else ask for it.
    """
    palette = rng.sample(sorted(TORCH), rng.choice([2, 3]))  # a model has a few kinds of layers, again and again
    own = [name for name in sorted(OWN) if name not in SLOW or not symbolic or rng.random() < 0.1]
    palette += rng.sample(own, rng.choice([0, 0, 1, 1, 2]))
    options = {
        "gamma": rng.choice([0.9, 0.5]),
        "recompute": rng.choice([None, None, "all"]),
        "capture": "auto" if symbolic else rng.choice(["auto", "dynamo"]),
    }
    kind = rng.choice(["model", "model", "states", "optional"])
    if rng.random() < (0.05 if symbolic else 0.2):
        kind = "detector"  # for which TorchDynamo is asked, too
    count = rng.choice([1, 1, 2]) if kind != "detector" else 1  # where it is no one graph, a chain ends with its module
    return {
        "seed": rng.randrange(1000),
        "kind": kind,
        "chains": [_chain(rng, palette, depth=0) for _ in range(count)],
        "options": options,
    }


def _chain(rng, palette, depth):
    count = rng.choice([2, 2, 3, 4] if depth else [2, 2, 3, 3, 4, 4, 13])
    steps = [["linear", *rng.sample(palette, rng.choice([1, 1, 2]))] for _ in range(count)]
    if depth < 2 and count < 13 and rng.random() < 0.4:
        steps[rng.randrange(count)] = _chain(rng, palette, depth + 1)
    return {"steps": steps, "tail": rng.choice(["none", "none", "relu", "ln"])}


def layers_of(spec):
    """Return the names of all layers of a drawn model, or of a chain."""
    if isinstance(spec, list):
        return frozenset(spec)
    parts = spec["chains"] if "chains" in spec else spec["steps"]
    return frozenset().union(*map(layers_of, parts))


def is_stateful(spec):
    """True if a result of the model depends on the calls before."""
    return bool(layers_of(spec) & STATEFUL)


def is_pure(spec):
    """True if the model holds no state that calls change, and draws no random numbers."""
    return not layers_of(spec) & (STATEFUL | RANDOM | {"bn"})
