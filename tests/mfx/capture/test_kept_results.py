"""Functions that keep their results, called in a forward: results and what is kept are as with the model."""

import functools

import pytest
import torch
from torch import nn

import mfx

WIDTH = 4
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # where a module is called as a whole


@functools.lru_cache
def table(length, width):
    return torch.linspace(0, 1, length * width).view(length, width)


@functools.cache
def of_tensor(x):
    return x * 2


@functools.lru_cache(maxsize=1)
def noted(name):
    return []


@functools.cache
def half(width):
    return width // 2


def by_tensor(self, x):
    return of_tensor(self.scale) * x.detach().mean()


def by_value(self, x):
    return of_tensor(x.detach()).mean()


def by_size(self, x):
    return table(x.shape[0], WIDTH)


def by_number(self, x):
    return table(3, WIDTH)


def into_a_list(self, x):
    noted("means").append(x.detach().mean())
    return sum(noted("means"))


def by_method(self, x):
    return self.method(3)


def by_static_method(self, x):
    return self.static(3)


def by_own(self, x):
    return self.own(3)


def plain(self, x):
    return x.detach().mean() * half(WIDTH)


FUNCTIONS = [table, of_tensor, noted, half]
USES = [by_tensor, by_value, by_size, by_number, into_a_list, by_method, by_static_method, by_own, plain]


class Branch(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.norm, self.fc, self.use = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), use
        self.register_buffer("scale", torch.ones(WIDTH))
        self.own = functools.lru_cache(torch.ones)

    @functools.lru_cache  # noqa: B019
    def method(self, n):
        return self.scale * n

    @staticmethod
    @functools.cache
    def static(n):
        return torch.ones(WIDTH) * n

    def forward(self, x):
        y = self.fc(self.norm(x)).tanh()
        return y if self.use is None else y + self.use(self, x).mean()


class Net(nn.Module):
    def __init__(self, use, by):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Branch(use if by == "branch" else None) for _ in range(3))
        self.before = Branch(use) if by == "net" else nn.Identity()

    def forward(self, x):
        x = self.before(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def caches(net):
    own = [m.own for m in net.modules() if isinstance(m, Branch)]
    return [f.cache_info().currsize for f in (*FUNCTIONS, Branch.method, Branch.static, *own)]


def forget():
    for f in (*FUNCTIONS, Branch.method, Branch.static):
        f.cache_clear()


def told(net, seeds=(0, 1, 0)):
    results = []
    for seed in seeds:
        y = net(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed)))
        y.sum().backward()
        results += [y.detach(), caches(net)]
    return results, [float(t) for t in noted("means")] + [float(of_tensor.cache_info().currsize)]


def warmed(use, by):
    """Return a model that has been called, so that something is kept."""
    forget()
    model = Net(use, by)
    if use is not by_method:  # what its class keeps for the model is not what it keeps for the net
        model(torch.ones(3, WIDTH))
    return model


def check(use, by, capture="auto"):
    expected = told(warmed(use, by))
    net = mfx.momentumize(warmed(use, by), gamma=0.0, capture=capture)
    if capture == "dynamo" and use not in (plain, by_own):
        with pytest.raises(mfx.MfxError, match="keeps its results"):
            told(net)
        return
    results = told(net)
    assert results[1] == expected[1]
    for a, b in zip(results[0], expected[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("use", [by_number, by_method, plain], ids=lambda use: use.__name__)
def test_they_are_as_with_the_model(use):
    check(use, "branch")


@pytest.mark.zoo
@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("by", ["net", "branch"])
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_every_use_of_them(use, by, capture):
    check(use, by, capture)


def test_the_reason_names_the_function():
    with pytest.raises(mfx.MfxError, match=r"calls table, which keeps its results \(functools\.lru_cache\)"):
        mfx.momentumize(Net(by_number, "branch"), capture="symbolic")
