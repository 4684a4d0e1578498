"""Objects that a forward makes and returns, with tensors in them: each call makes its own."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mfx

WIDTH = 4


class Layer:
    """Has no arguments, and a class attribute beside its own."""

    kind = "layer"

    def __init__(self):
        self.keys, self.count = None, 0

    def update(self, x):
        self.keys = x if self.keys is None else torch.cat([self.keys, x])
        self.count += 1
        return self.keys

    def __len__(self):
        return self.count


class Cache:
    def __init__(self, depth):
        self.layers = [Layer() for _ in range(depth)]
        self.by_name = {"first": self.layers[0]}
        self.first = self.layers[0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, layer):
        return x + self.fc(layer.update(x)[: x.shape[0]]).tanh()


class Model(nn.Module):
    """Takes a decision on a mask, which TorchDynamo cannot follow, and returns a cache."""

    def __init__(self, make=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.make = make or (lambda model: Cache(4))

    def forward(self, x, mask):
        x = x * 2 if mask.all() else x * mask
        cache = self.make(self)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block(x, layer)
        return {"x": x, "cache": cache}


def inputs(seed=0):
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    return x, torch.ones(WIDTH) if seed % 2 else torch.tensor([1.0, 0.0, 1.0, 1.0])


def of_call(net, seed):
    x, mask = inputs(seed)
    found = net(x, mask)
    cache = found["cache"]
    (found["x"].sum() + sum(layer.keys.square().sum() for layer in cache.layers)).backward()
    grads = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return [found["x"], *(layer.keys for layer in cache.layers), x.grad, *grads], cache


@pytest.mark.parametrize("capture", ["auto", "symbolic"])
def test_objects_are_those_of_the_model(capture):
    model = Model()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture=capture)
    caches = []
    for seed in range(4):
        (found, cache), (expected, plain) = of_call(net, seed), of_call(model, seed)
        assert all(map(torch.equal, found, expected))
        assert type(cache) is Cache
        assert vars(cache).keys() == vars(plain).keys()
        assert cache.by_name["first"] is cache.first is cache.layers[0]
        assert [(len(layer), layer.kind) for layer in cache.layers] == [(1, "layer")] * 4
        caches.append(cache)
        cache.layers.pop()
        cache.first.count = 7
    assert len({id(cache.layers) for cache in caches}) == 4
    assert [len(chain.steps) for chain in mfx.explain(net, *inputs()).chains] == [4]


def test_a_step_is_recomputed_with_what_it_returns_in_an_object():
    model = Model()
    nets = [mfx.momentumize(copy.deepcopy(model), gamma=0.9, memory_budget=budget) for budget in (0.0, 1.0)]
    for seed in range(2):
        (found, _), (expected, _) = (of_call(net, seed) for net in nets)
        assert all(map(torch.equal, found, expected))


def test_a_copy_from_a_file_makes_such_objects():
    net = mfx.momentumize(Model(make_cache), gamma=0.0)
    of_call(net, 0)
    (found, cache), (expected, _) = of_call(pickle.loads(pickle.dumps(net)), 1), of_call(net, 1)
    assert all(map(torch.equal, found, expected))
    assert type(cache) is Cache


def make_cache(model):
    return Cache(4)


def kept(model):
    model.cache = Cache(4)
    return model.cache


def with_one_that_is_kept(model):
    cache = Cache(4)
    cache.owner = OWNER
    return cache


def in_a_circle(model):
    cache = Cache(4)
    cache.first.cache = cache
    return cache


OWNER = Layer()


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")
@pytest.mark.parametrize("make", [kept, with_one_that_is_kept, in_a_circle])
def test_what_lives_on_is_the_models_own(make):
    model = Model(make)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for seed in range(3):
        (found, cache), (expected, plain) = of_call(net, seed), of_call(model, seed)
        assert all(map(torch.equal, found, expected))
        assert getattr(cache, "owner", None) is getattr(plain, "owner", None)
        assert not hasattr(cache.first, "cache") or cache.first.cache is cache
        assert make is not kept or net.cache is cache
