"""Arrays and other buffers of numbers, and large containers, that a branch changes in place."""

import copy
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mfx
from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, make_root, make_steps, run

DEPTH = 6
HOW = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


def subclass():
    class Named(np.ndarray):
        pass

    return np.ones(WIDTH).view(Named)


def add(b, value):
    b.numbers += value


def add_to_entry(b, value):
    b.numbers[0] += value


def add_to_field(b, value):
    b.numbers["a"] += value


def grow(b, value):
    b.numbers.append(int(value))


HELD = {
    "array": (lambda: np.ones(WIDTH), add),
    "one entry": (lambda: np.ones(WIDTH), add_to_entry),
    "integers": (lambda: np.arange(3), add_to_entry),
    "not contiguous": (lambda: np.ones((3, 4)).T[::2], add),
    "no dimension": (lambda: np.array(2.0), add),
    "subclass": (subclass, add),
    "objects": (lambda: np.array([1.0, 2.0], dtype=object), add_to_entry),
    "record array": (lambda: np.zeros(2, [("a", "f8"), ("b", "i4")]), add_to_field),
    "record": (lambda: np.zeros(2, [("a", "f8"), ("b", "i4")])[1], add_to_field),
    "bytes": (lambda: bytearray(b"\1\2\3"), add_to_entry),
    "bytes that grow": (lambda: bytearray(b"\1"), grow),
    "array of Python": (lambda: array("d", [1.0, 2.0]), add_to_entry),
    "array that grows": (lambda: array("i", [1]), grow),
}


def value_of(numbers):
    if isinstance(numbers, bytearray | array):
        return float(sum(numbers) + len(numbers))
    return float(numbers["a"].sum()) if numbers.dtype.names else float(numbers.sum())


PLACES = {
    "attribute": (lambda b, n: setattr(b, "numbers", n), lambda b: b.numbers),
    "list": (lambda b, n: setattr(b, "kept", [n]), lambda b: b.kept[0]),
    "object": (lambda b, n: setattr(b, "kept", SimpleNamespace(n={"n": n})), lambda b: b.kept.n["n"]),
}


class Changing(nn.Module):
    """x ↦ fc(x)·(1 + s/10), where s is the sum of numbers that it changes first."""

    def __init__(self, held, place="attribute"):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        build, self.change = HELD[held]
        self.place = place
        PLACES[place][0](self, build())

    def forward(self, x):
        numbers = PLACES[self.place][1](self)
        holder = SimpleNamespace(numbers=numbers)
        self.change(holder, 1)
        if self.place != "attribute" or holder.numbers is not numbers:  # += on a number of numpy makes a new one
            PLACES[self.place][0](self, holder.numbers)
        return torch.tanh(self.fc(x)) * (1 + value_of(PLACES[self.place][1](self)) / 10)


def train(root, how, budget, calls=2):
    cache, x = {}, torch.linspace(-1, 1, 5 * WIDTH, dtype=torch.float64).view(5, WIDTH).requires_grad_()
    for _ in range(calls):
        first = run(root, make_steps(root), x, memory_budget=budget, arithmetic=how[0], gamma=how[1], cache=cache).x
        second = run(
            root, make_steps(root), 2 * x, memory_budget=budget, arithmetic=how[0], gamma=how[1], cache=cache
        ).x
        first.sum().backward()
        second.sum().backward()
    numbers = [value_of(PLACES[b.place][1](b)) for b in root.blocks]
    return numbers, [x.grad, *(p.grad for p in root.parameters())]


def compare(roots, how):
    (numbers, ours), (expected, kept) = (
        train(root, how, budget) for root, budget in zip(roots, (0.0, 1.0), strict=True)
    )
    assert numbers == expected
    scale = max(g.abs().max() for g in kept)
    for a, b in zip(ours, kept, strict=True):  # in float64 arithmetic "float" rebuilds states to 1e-10
        assert torch.equal(a, b) if how != ("float", 0.9) else (a - b).abs().max() <= 1e-8 * scale


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("held", HELD)
def test_the_recomputation_starts_from_what_the_forward_found(held, how):
    compare([make_root(DEPTH, lambda: Changing(held)).double() for _ in range(2)], how)


@pytest.mark.parametrize("place", ["list", "object"])
def test_they_may_lie_in_what_a_module_holds(place):
    compare([make_root(DEPTH, lambda: Changing("array", place)).double() for _ in range(2)], HOW[0])


def test_objects_are_the_same_after_it():
    root = make_root(DEPTH, lambda: Changing("array"))
    numbers = [b.numbers for b in root.blocks]
    loss = run(root, make_steps(root), torch.randn(5, WIDTH)).x.sum()
    for b in root.blocks:
        b.numbers[:] = 7  # a user writes in between
    loss.backward()
    assert all(b.numbers is n and (n == 7).all() for b, n in zip(root.blocks, numbers, strict=True))


class Large(nn.Module):
    """Changes what is not copied, from its second call on if it is ``late``."""

    def __init__(self, build, change, late=False):
        super().__init__()
        self.fc, self.numbers, self.change, self.late = nn.Linear(WIDTH, WIDTH), build(), change, late
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.late:
            self.change(self)
        return torch.tanh(self.fc(x))


NOT_COPIED = {
    "large array": (lambda: np.zeros(10_000), lambda b: add_to_entry(b, 1), "blocks.8.numbers"),
    "large array of objects": (lambda: np.array([0] * 10_000), lambda b: add_to_entry(b, 1), "blocks.8.numbers"),
    "large array of columns": (lambda: np.zeros((2, 10_000)).T, lambda b: b.numbers.__iadd__(1), "numbers"),
    "large bytes": (lambda: bytearray(100_000), lambda b: add_to_entry(b, 1), "blocks.8.numbers"),
    "large list": (lambda: [0] * 100, lambda b: add_to_entry(b, 1), "blocks.8.numbers"),
    "large list that grows": (lambda: [0] * 100, lambda b: b.numbers.append(0), "blocks.8.numbers"),
    "large dictionary": (lambda: dict.fromkeys(range(100), 0), lambda b: add_to_entry(b, 1), "blocks.8.numbers"),
    "large set": (lambda: set(range(100)), lambda b: b.numbers.add(len(b.numbers)), "blocks.8.numbers"),
    "view of bytes": (lambda: memoryview(bytearray(4)), lambda b: add_to_entry(b, 1), "blocks.8.numbers"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", NOT_COPIED)
def test_a_change_of_what_is_not_copied_is_an_error_in_every_call(kind, late):
    build, change, name = NOT_COPIED[kind]
    root, cache, x = make_root(9, lambda: Large(build, change, late)), {}, torch.randn(5, WIDTH)
    if late:
        run(root, make_steps(root), x, cache=cache).x.sum().backward()
    for _ in range(2):
        loss = run(root, make_steps(root), x, cache=cache).x.sum()
        with pytest.raises(MfxError, match=rf"blocks\.8: this step changed .*{name}.* in place.*memory_budget=1\.0"):
            loss.backward()


@pytest.mark.parametrize("kind", NOT_COPIED)
def test_changed_in_between_it_is_an_error_too(kind):
    build, change, _name = NOT_COPIED[kind]
    root = make_root(9, lambda: Large(build, change, late=1000))
    loss = run(root, make_steps(root), torch.randn(5, WIDTH)).x.sum()
    change(root.blocks[8])
    with pytest.raises(MfxError, match=r"blocks\.8\.numbers was changed between forward and backward"):
        loss.backward()


SHARED = {
    "another array": lambda b: setattr(b, "other", b.numbers[1:]),
    "another array with other numbers": lambda b: setattr(b, "other", b.numbers.reshape(2, 3)[:, 1:]),
    "a tensor": lambda b: setattr(b, "other", torch.from_numpy(b.numbers)),
    "a buffer": lambda b: b.register_buffer("other", torch.from_numpy(b.numbers)),
}


@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED)
def test_memory_that_is_shared_is_not_copied(share):
    root = make_root(9, lambda: Large(lambda: np.ones(WIDTH), lambda b: add(b, 1)))
    for b in root.blocks:
        share(b)
    loss = run(root, make_steps(root), torch.randn(5, WIDTH)).x.sum()
    with pytest.raises(MfxError, match=r"this step (changed|wrote into) blocks\.8\.(numbers|other)"):
        loss.backward()


class Model(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.blocks = nn.ModuleList(Changing(held) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.filterwarnings("ignore:.*(Dynamo|dynamo|one graph).*:UserWarning")
@pytest.mark.parametrize("held", ["array", "record", "bytes", "array of Python", "objects", "subclass"])
def test_a_net_changes_them_as_its_model_does(held):
    torch.manual_seed(0)
    model = Model(held)
    plain = copy.deepcopy(model)
    net = mfx.momentumize(model, gamma=0.0)
    for seed in range(3):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
        y, expected = net(x), plain(x)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(y, expected)
        assert [value_of(b.numbers) for b in net.blocks] == [value_of(b.numbers) for b in plain.blocks]
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
