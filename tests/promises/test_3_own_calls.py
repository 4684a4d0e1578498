"""At γ = 0 a net is the model where classes of modules have a ``__call__`` of their own, which runs once a call."""

import copy

import pytest
import torch
from torch import nn

import mfx
from tests.promises.models import differences, trained
from tests.sampling import grid

WIDTH = 8


class PassesOn:
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


class Before:
    def __call__(self, x):
        return super().__call__(x * 2)


class After:
    def __call__(self, x):
        return super().__call__(x) * 3


class Around(Before, After):
    """The one of a class derived from two that have their own; it has none itself."""


class InPlace:
    def __call__(self, x):
        return super().__call__(x.clone().mul_(2)).mul(3).add_(1)


class ByName:
    def __call__(self, x, scale=1.0):
        return super().__call__(input=x) + scale


class Twice:
    def __call__(self, x):
        return super().__call__(x) + super().__call__(x.tanh())


class InTraining:
    def __call__(self, x):
        return super().__call__(x) if self.training else x.sin()


class WithoutHooks:
    def __call__(self, x):
        return self.forward(x.cos()) * 2


class Unfollowed:
    """Does what a symbolic trace cannot follow."""

    def __call__(self, x):
        return super().__call__(x) * (2.0 if isinstance(x.data_ptr(), int) else 1.0)


class _Times:
    """No function: what a class has as its ``__call__`` need not be bound to a module."""

    def __get__(self, module, cls):
        return lambda x: nn.Module.__call__(module, x) * 3


class OfADescriptor:
    __call__ = _Times()


OWN = (PassesOn, Before, After, Around, InPlace, ByName, Twice, InTraining, WithoutHooks, Unfollowed, OfADescriptor)
BY_NAME = {own.__name__: own for own in OWN}
ALWAYS = {name: own for name, own in BY_NAME.items() if own is not InTraining}  # else γ > 0 is refused: other chains
WHOLE = {name: own for name, own in BY_NAME.items() if own is not InPlace}  # which stays flat, and is warned of


class Layers(nn.Module):
    """Layers in sequence, as a class that is not of torch."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, input):  # noqa: A002
        return torch.tanh(nn.functional.dropout(self.norm(self.fc(input)), 0.2, self.training))


class Sum(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, input):  # noqa: A002
        return input + self.f(input)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.skip, self.f = nn.Linear(WIDTH, WIDTH), Layers()

    def forward(self, input):  # noqa: A002
        return torch.relu(self.skip(input) + self.f(input))


def with_own(own, cls, *args):
    return type(own.__name__ + cls.__name__, (own, cls), {})(*args)


def around(*middle, first=None):
    """Blocks on both sides of what is tested, so that there are chains in any case."""
    return nn.Sequential(first or nn.Linear(WIDTH, WIDTH), *blocks(), *middle, *blocks(), nn.Linear(WIDTH, 3))


def blocks():
    return [Sum(Layers()), Sum(Layers())]


PLACES = {
    "stem": lambda own: around(first=with_own(own, Layers)),
    "branch": lambda own: around(*(Sum(with_own(own, Layers)) for _ in range(3))),
    "layer of torch's as a branch": lambda own: around(
        *(Sum(with_own(own, nn.Linear, WIDTH, WIDTH)) for _ in range(3))
    ),
    "block of a chain": lambda own: around(*(with_own(own, Sum, Layers()) for _ in range(3))),
    "projected block": lambda own: around(with_own(own, Projected)),
    "nested chain": lambda own: around(
        *(Sum(nn.Sequential(nn.Tanh(), *(Sum(with_own(own, Layers)) for _ in range(2)))) for _ in range(3))
    ),
    "around a nested chain": lambda own: around(*(Sum(with_own(own, Sum, around()[1])) for _ in range(3))),
    "around a chain": lambda own: around(with_own(own, Sum, nn.Sequential(*blocks()))),
}
OPTIONS = {
    "defaults": {},
    "all kept": {"memory_budget": 1.0},
    "all recomputed": {"recompute": "all", "memory_budget": 0.0},
    "float": {"arithmetic": "float"},
}


def model_of(own, place):
    torch.manual_seed(0)
    return PLACES[place](own)


def trained_net(model, **options):
    return trained(mfx.momentumize(copy.deepcopy(model), **options), (6, WIDTH))


@grid(24, own=BY_NAME, place=list(PLACES), options=OPTIONS)
def test_it_runs_once_a_call(own, place, options):
    model = model_of(own, place)
    assert differences(trained_net(model, gamma=0.0, **options), trained(model, (6, WIDTH))) == []


@grid(12, own=ALWAYS, place=list(PLACES))
def test_a_recomputation_runs_it_as_the_forward_did(own, place):
    model = model_of(own, place)
    options = {"gamma": 0.75, "recompute": "all"}
    kept = trained_net(model, memory_budget=1.0, **options)
    assert differences(trained_net(model, memory_budget=0.0, **options), kept) == []


@grid(12, own=WHOLE, place=["stem", "branch", "projected block", "nested chain"])
def test_hooks_run_as_often_as_in_the_model_and_on_the_same_values(own, place):
    model = model_of(own, place).eval()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    seen = []
    for each in (model, net):
        noted = []
        for module in each.modules():
            if isinstance(module, own):
                module.register_forward_hook(lambda module, args, output, noted=noted: noted.append(output.clone()))
        with torch.no_grad():
            each(torch.ones(6, WIDTH))
        seen.append(noted)
    assert len(seen[0]) == len(seen[1])
    assert all(map(torch.equal, *seen))


@pytest.mark.parametrize("place", ["branch", "block of a chain", "nested chain"])
def test_one_that_only_passes_on_costs_no_step(place):
    class Nothing:
        """No ``__call__``."""

    x = torch.ones(6, WIDTH)
    counts = []
    for own in (PassesOn, Nothing):
        net = mfx.momentumize(model_of(own, place), gamma=0.0)
        net(x)
        counts.append([(chain.name, len(chain.steps)) for chain in mfx.explain(net).chains])
    assert counts[0] == counts[1]


def test_the_comparison_sees_one_that_runs_twice():
    model = model_of(PassesOn, "branch")
    other = copy.deepcopy(model)
    other[3].f.__class__ = type(model_of(After, "branch")[3].f)
    assert "output 0" in differences(trained(other, (6, WIDTH)), trained(model, (6, WIDTH)))
