"""State of the model's own that branches change: after a training step it is what plain training leaves."""

import argparse
import array
import collections
import copy
import dataclasses
import functools
import io
import itertools
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import mfx
from tests.oracles import assert_close_grads, grads, momentum_reference
from tests.sampling import grid


class Slots:
    __slots__ = ("count", "tensor")

    def __init__(self):
        self.count, self.tensor = 0, torch.zeros(())


class PrivateSlots:
    __slots__ = ("__count", "__total__")

    def __init__(self):
        self.__count, self.__total__ = 0, 0.0

    def tick(self):
        self.__count += 1
        self.__total__ += self.__count
        return self.__total__


@dataclasses.dataclass(slots=True)
class SlotsOfDataclass:
    count: int = 0


@dataclasses.dataclass(frozen=True)
class Frozen:
    count: int = 0


@dataclasses.dataclass
class Held:
    count: int = 0

    def tick(self):
        self.count += 1
        return self.count


class Listed(list):
    count = 0


Made = dataclasses.make_dataclass("Made", [("count", int, 0)])  # its module is said to be that of `types`
MadeSlots = dataclasses.make_dataclass("MadeSlots", [("count", int, 0)], slots=True)
NewClass = types.new_class("NewClass", (), {}, lambda namespace: namespace.update(count=0))
ByType = type("ByType", (), {"count": 0, "__module__": "builtins"})
Pair = collections.namedtuple("Pair", "tensor counts")


def _ticked(holder):
    holder.count += 1
    return holder.count


def _added(container, key):
    container[key] += 1
    return container[key]


def _appended(container):
    container.append(1)
    return len(container)


def _written(file, text):
    file.write(text)
    return file.tell()


def _in_tensor(module):
    module.o.tensor.add_(1)
    return module.o.tensor.clone()


def _base(module):
    module.a.add_(1)
    return module.b.sum()


def _view(module):
    module.b.add_(1)
    return module.a.sum()


def _replace_frozen(module):
    module.o = dataclasses.replace(module.o, count=module.o.count + 1)
    return module.o.count


def _replace_tensor(module):
    module.o.tensor = module.o.tensor + 1
    return module.o.tensor


def _pair(module):
    module.o.tensor.add_(1)
    module.o.counts[0] += 1
    return module.o.tensor + module.o.counts[0]


def _on_tensor(module):
    module.o.count += 1
    return module.o.count


def _counting(value):
    value.count = 0
    return value


def _counted():
    return _counting(torch.zeros(2))


def _with_views(split):
    base = torch.zeros(4)
    return {"a": base, "b": split(base)}


def _weakly():
    held = Held()
    return {"held": held, "o": weakref.ref(held)}


def _keyed():
    held = Held.__new__(type("Key", (), {}))
    return {"held": held, "o": weakref.WeakKeyDictionary({held: 0})}


STATES = {  # the attributes of a layer, and what a call does with them: it returns a number
    "number": (lambda: {"count": 0}, _ticked),
    "itertools.count": (lambda: {"o": itertools.count(1)}, lambda m: next(m.o)),
    "a file of bytes": (lambda: {"o": io.BytesIO()}, lambda m: _written(m.o, b"x")),
    "a file of text": (lambda: {"o": io.StringIO()}, lambda m: _written(m.o, "x")),
    "slots": (lambda: {"o": Slots()}, lambda m: _ticked(m.o)),
    "a tensor in slots, in place": (lambda: {"o": Slots()}, _in_tensor),
    "a tensor in slots, replaced": (lambda: {"o": Slots()}, _replace_tensor),
    "a dataclass with slots": (lambda: {"o": SlotsOfDataclass()}, lambda m: _ticked(m.o)),
    "a dataclass made by a call": (lambda: {"o": Made()}, lambda m: _ticked(m.o)),
    "a dataclass with slots made by a call": (lambda: {"o": MadeSlots()}, lambda m: _ticked(m.o)),
    "a class made by a call": (lambda: {"o": NewClass()}, lambda m: _ticked(m.o)),
    "a class made by type, of no module": (lambda: {"o": ByType()}, lambda m: _ticked(m.o)),
    "private slots": (lambda: {"o": PrivateSlots()}, lambda m: m.o.tick()),
    "options of a command line": (lambda: {"o": argparse.Namespace(count=0)}, lambda m: _ticked(m.o)),
    "a frozen dataclass": (lambda: {"o": Frozen()}, _replace_frozen),
    "an object in an object": (lambda: {"o": types.SimpleNamespace(p=Held())}, lambda m: _ticked(m.o.p)),
    "an object in a list": (lambda: {"o": [Held()]}, lambda m: _ticked(m.o[0])),
    "an object in a dictionary": (lambda: {"o": {"a": Held()}}, lambda m: _ticked(m.o["a"])),
    "a tensor, a view is read": (lambda: _with_views(lambda t: t[:2]), _base),
    "a view, the tensor is read": (lambda: _with_views(lambda t: t[:2]), _view),
    "a tensor, an alias is read": (lambda: _with_views(torch.Tensor.detach), _base),
    "a tensor, views in a list": (
        lambda: _with_views(lambda t: list(t.unbind())),
        lambda m: (m.a.add_(1), m.b[2].clone())[1],
    ),
    "Counter": (lambda: {"o": collections.Counter()}, lambda m: _added(m.o, "a")),
    "defaultdict": (lambda: {"o": collections.defaultdict(list)}, lambda m: _appended(m.o["a"])),
    "ChainMap": (lambda: {"o": collections.ChainMap({"a": 0})}, lambda m: _added(m.o, "a")),
    "UserDict": (lambda: {"o": collections.UserDict(a=0)}, lambda m: _added(m.o, "a")),
    "UserList": (lambda: {"o": collections.UserList()}, lambda m: _appended(m.o)),
    "array": (lambda: {"o": array.array("d", [0.0])}, lambda m: _added(m.o, 0)),
    "an attribute of a list": (lambda: {"o": Listed()}, lambda m: _ticked(m.o)),
    "an attribute of a tensor": (lambda: {"o": _counted()}, _on_tensor),
    "a namedtuple": (lambda: {"o": Pair(torch.zeros(()), [0])}, _pair),
    "a weak reference": (_weakly, lambda m: _ticked(m.o())),
    "weak keys": (_keyed, lambda m: _added(m.o, m.held)),
    "an attribute of a partial": (lambda: {"o": _counting(functools.partial(abs))}, lambda m: _ticked(m.o)),
    "a bound method": (lambda: {"o": Held().tick}, lambda m: m.o()),
    "an exception": (lambda: {"o": ValueError()}, lambda m: _on_exception(m.o)),
}
REFUSED = {  # no copy can be made
    "a generator": (lambda: {"o": (float(i) for i in range(1, 99))}, lambda m: next(m.o)),
    "arrays that share memory": (
        lambda: (lambda a: {"a": a, "b": a[:2]})(np.zeros(4)),
        lambda m: (m.a.__iadd__(1), float(m.b[0]))[1],
    ),
    "an argument of a partial": (lambda: {"o": functools.partial(_appended, [])}, lambda m: m.o()),
}


def _on_exception(error):
    error.count = getattr(error, "count", 0) + 1
    return error.count


class Layer(nn.Module):
    """Multiplies by a number that depends on the calls so far."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return x * torch.as_tensor(self.step(self), dtype=x.dtype) / 20


class Block(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), Layer(step), nn.Linear(4, 4)

    def branch(self, x):
        return self.last(torch.sin(self.layer(torch.tanh(self.first(x)))))

    def forward(self, x):
        return x + self.branch(x)


def net_of(kind, blocks, **options):
    """Return a net whose layers have fresh attributes, which a deep copy could not make; without options the model."""
    make, step = kind
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(step) for _ in range(blocks)))
    for block in net:
        block.layer.__dict__.update(dict.fromkeys(make()) if kind in REFUSED.values() else make())
    net = mfx.momentumize(net, **options) if options else net
    for block in net:
        block.layer.__dict__.update(make())
    return net


def numbers_of(net):
    """Return what the next calls of the layers would multiply by."""
    return [float(copy_.step(copy_)) for copy_ in (block.layer for block in net)]


def trained(net):
    """Make steps, twice two calls before their backward passes, in both orders; return all that is to be seen."""
    torch.manual_seed(1)
    found = []
    for order in ((0,), (0,), (0, 1), (1, 0)):
        xs = [torch.randn(2, 4).requires_grad_() for _ in order]
        ys = [net(x) for x in xs]
        for which in order:
            ys[which].sum().backward()
        found += [*ys, *(x.grad for x in xs)]
    return [value.detach() for value in found], grads(net), numbers_of(net)


def assert_same(found, expected):
    for a, b in zip(found[0], expected[0], strict=True):
        assert torch.equal(a, b)
    for name, gradient in expected[1].items():
        assert torch.equal(found[1][name], gradient), name
    assert found[2] == expected[2]


@grid(8, kind=STATES)
def test_at_gamma_zero_it_is_as_in_the_model(kind):
    net = net_of(kind, 3, gamma=0.0)
    assert_same(trained(net), trained(net_of(kind, 3)))
    assert any("momentum" in graph.code for graph in mfx.graphs(net).values())


def test_an_attribute_of_a_class_that_a_layer_holds():
    """A class is nobody's own, so the graphs leave out what changes it, however it is reached."""
    kind = lambda: {"o": type("Counts", (), {"count": 0})}, lambda m: _ticked(m.o)
    assert_same(trained(net_of(kind, 3, gamma=0.0)), trained(net_of(kind, 3)))


class Keeping:
    """Its method keeps its results."""

    def __init__(self, of):
        self.of, self.calls = of, 0

    @functools.lru_cache(maxsize=99)  # noqa: B019
    def counted(self):
        self.calls += 1
        return float(self.calls)

    @functools.cache  # noqa: B019
    def pure(self):
        return 1.0 + self.of


def _kept_and_counted(layer):
    layer.count += 1
    return layer.o.pure() + layer.count


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.9}, {"gamma": 0.9, "arithmetic": "float"}])
def test_a_method_that_keeps_its_results_and_changes_attributes(options):
    """A second run would find the result and not change them: an error at that call alone."""
    net = net_of((lambda: {"o": Keeping(0)}, lambda m: m.o.counted() + m.o.calls), DEPTH, **options)
    with pytest.raises(mfx.MfxError, match=r"Keeping\.counted for a first time.* memory_budget=1\.0"):
        net(torch.randn(2, 4)).sum().backward()
    trained(net)
    assert_same(
        *(trained(net_of((lambda: {"o": Keeping(1), "count": 0}, _kept_and_counted), 3, **o)) for o in ({}, G0))
    )


G0 = {"gamma": 0.0}
STORAGES = [{"memory_budget": 0.0}, {"memory_budget": 0.5}, {"recompute": "all"}]
DEPTH = 13  # exact arithmetic keeps the inputs of shorter chains, instead of a tape


@grid(4, kind=STATES, storage=STORAGES)
def test_at_gamma_above_zero_it_is_as_if_all_were_kept(kind, storage):
    net = net_of(kind, DEPTH, gamma=0.9, **storage)
    assert_same(trained(net), trained(net_of(kind, DEPTH, gamma=0.9, memory_budget=1.0)))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@grid(2, kind={name: STATES[name] for name in ("number", "slots", "a tensor, a view is read", "Counter")})
def test_at_gamma_above_zero_it_is_the_recurrence(kind, storage, arithmetic):
    net, model = net_of(kind, DEPTH, gamma=0.9, arithmetic=arithmetic, **storage), net_of(kind, DEPTH).double()
    x = torch.randn(2, 4)
    for _ in range(3):
        net(x).sum().backward()
        momentum_reference([block.branch for block in model], x.double(), 0.9).output.sum().backward()
    # Each gradient is a sum over 13 steps of float32 products, with states rebuilt to 6e-6 in float arithmetic.
    assert_close_grads(grads(net), grads(model), 30 * 6e-6)
    assert numbers_of(net) == pytest.approx(numbers_of(model))


@pytest.mark.filterwarnings("ignore:mfx")
@pytest.mark.parametrize("kind", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_what_cannot_be_put_back_is_never_silent(kind, gamma):
    def run(net):
        torch.manual_seed(1)
        y = net(torch.randn(2, 4))
        y.sum().backward()
        return y.detach(), net[0].first.weight.grad

    expected = run(net_of(kind, DEPTH, gamma=gamma, memory_budget=1.0) if gamma else net_of(kind, DEPTH))
    try:
        found = run(net_of(kind, DEPTH, gamma=gamma))
    except mfx.MfxError as error:
        said = str(error)
    else:  # the module was left as it is
        said = "memory_budget=1.0" if all(map(torch.equal, found, expected)) else ""
    assert "memory_budget=1.0" in said


@pytest.mark.filterwarnings("ignore:mfx")
@pytest.mark.parametrize("wrap", [lambda m: [m], lambda m: (m,), lambda m: types.SimpleNamespace(m=m)])
def test_modules_that_are_not_registered(wrap):
    def step(layer):
        norm = layer.o.m if hasattr(layer.o, "m") else layer.o[0]
        norm.running_mean.add_(1)
        return norm.running_mean.sum()

    kind = lambda: {"o": wrap(nn.BatchNorm1d(4))}, step
    assert_same(trained(net_of(kind, 3, gamma=0.0)), trained(net_of(kind, 3)))


class Counting(nn.Module):
    """A residual block that notes something of its own beside the statistics of its normalization."""

    def __init__(self, note):
        super().__init__()
        self.mix, self.norm, self.drop, self.note, self.seen = (
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.5),
            note,
            0,
        )

    def forward(self, x):
        self.note(self, x)
        return x + self.drop(self.norm(self.mix(x)))


def counts(block, x):
    block.seen += 1


def notes_a_shape(block, x):
    block.seen = tuple(x.shape)


def notes_a_flag(block, x):
    block.seen = not block.seen


def replaces_a_buffer(block, x):
    block.norm.num_batches_tracked = block.norm.num_batches_tracked + 1


NOTES = {note.__name__: note for note in (counts, notes_a_shape, notes_a_flag, replaces_a_buffer)}


@grid(4, capture=["auto", "dynamo"], note=NOTES, gamma=[0.0, 0.5])
def test_statistics_of_a_module_that_sets_attributes_change_once(capture, note, gamma):
    """TorchDynamo then reads the module's tables by another road, by which they have to be known, too."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Counting(note) for _ in range(3))), torch.randn(5, 4)
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma, capture=capture)
    kept = mfx.momentumize(copy.deepcopy(model), gamma=gamma, capture=capture, memory_budget=1.0)
    nets = (net, kept) if gamma else (net, model)
    for seed in range(3):
        left = []
        for each in nets:
            torch.manual_seed(seed)
            each.zero_grad()
            each(x).square().sum().backward()
            tensors = [*(b.clone() for b in each.buffers()), *(p.grad for p in each.parameters())]
            left.append((tensors, [block.seen for block in each]))
        assert all(map(torch.equal, left[0][0], left[1][0]))
        assert left[0][1] == left[1][1]
    assert len(mfx.explain(net, x).chains) == 1
