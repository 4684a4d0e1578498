"""Pieces of the stream put together again: the stream itself if all are there, in order; else another value."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mfx_passes.ops.joins import joined
from tests.oracles import momentum_reference
from tests.passes.harness import rewrite_model, traced

L, D = 6, 4
Together = Callable[[Tensor], Tensor]


class Steps(nn.Module):
    """Four steps x + f(x), with something in between."""

    def __init__(self, between: Together) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            x = self.between(x + f(x))
        return x


def nested(x: Tensor) -> Tensor:
    a, b = x.split([2, 4], 1)
    c, d = b.chunk(2, 1)
    return torch.cat([a, c, d], 1)


def nested_twice(x: Tensor) -> Tensor:
    a, b = x[:, :3], x[:, 3:]
    return torch.cat([a[:, :1], a[:, 1:], b[:, :2], b[:, 2:]], 1)


def nested_joins(x: Tensor) -> Tensor:
    a, b, c = x.tensor_split([2, 4], 1)
    return torch.cat([torch.cat([a, b], 1), c], 1)


def by_sizes(x: Tensor) -> Tensor:
    n = x.shape[1] // 2
    return torch.cat([x[:, :n], x[:, n:]], 1)


def by_narrow(x: Tensor) -> Tensor:
    n = x.size(1) - 2
    return torch.cat([x.narrow(1, 0, n), x.narrow(1, n, x.size(1) - n)], dim=1)


def of_three(x: Tensor) -> Tensor:
    n, m = x[:, :2].shape[1], x[:, :1].shape[1]
    return torch.cat([x[:, :n], x[:, n : n + m], x[:, n + m :]], 1)


def halves_of(x: Tensor) -> Tensor:
    a, b = x.unflatten(1, (2, 3)).unbind(1)
    return torch.stack([a, b], 1).flatten(1, 2)


WHOLE: dict[str, Together] = {
    "slices": lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
    "slices from the end": lambda x: torch.cat([x[:, :-2], x[:, -2:]], dim=1),
    "slices with 0 and keywords": lambda x: torch.cat(tensors=(x[:, 0:2], x[:, 2:4], x[:, 4:]), dim=1),
    "slices of the first dimension": lambda x: torch.cat([x[:1], x[1:]]),
    "ellipsis": lambda x: torch.cat([x[..., :2], x[..., 2:]], -1),
    "ellipsis in front": lambda x: torch.cat([x[..., :2, :], x[..., 2:, :]], -2),
    "ellipsis behind": lambda x: torch.cat([x[:, :2, ...], x[:, 2:, ...]], 1),
    "sizes": by_sizes,
    "three slices by sizes": of_three,
    "split": lambda x: put_together(x.split(3, 1), 2, 1),
    "split with sizes": lambda x: put_together(x.split([1, 2, 3], dim=1), 3, 1),
    "split with computed sizes": lambda x: put_together(x.split([x.shape[1] - 2, 2], dim=1), 2, 1),
    "torch.split": lambda x: put_together(torch.split(x, 2, dim=1), 3, 1),
    "a split as it is": lambda x: torch.cat(x.split(4, 1), 1),
    "chunk": lambda x: put_together(x.chunk(2, dim=-1), 2, -1),
    "tensor_split": lambda x: put_together(torch.tensor_split(x, 3, dim=1), 3, 1),
    "hsplit and hstack": lambda x: torch.hstack(torch.hsplit(x, 2)),
    "vsplit and vstack": lambda x: torch.vstack(torch.vsplit(x, [1])),
    "dsplit and dstack": lambda x: torch.dstack(torch.dsplit(x, 2)),
    "concatenate": lambda x: torch.concatenate([x[:, :2], x[:, 2:]], axis=1),
    "narrow": by_narrow,
    "narrow from the end": lambda x: torch.cat([x.narrow(1, 0, 4), torch.narrow(x, 1, 4, 2)], 1),
    "unbind": lambda x: torch.stack(x.unbind(1), 1),
    "unbind, one by one": lambda x: rows(x.unbind(1)),
    "select": lambda x: torch.stack([x.select(1, i) for i in range(L)], 1),
    "numbers": lambda x: torch.stack([x[:, i] for i in range(L)], dim=1),
    "numbers behind an ellipsis": lambda x: torch.stack([x[..., i] for i in range(D)], dim=-1),
    "nested": nested,
    "nested twice": nested_twice,
    "nested joins": nested_joins,
    "copies of pieces": lambda x: torch.cat([x[:, :2].contiguous(), x[:, 2:].clone()], 1),
    "unflatten and flatten": halves_of,
    "unflatten and flatten alone": lambda x: x.unflatten(1, (2, 3)).flatten(1, 2),
}


def put_together(parts: tuple[Tensor, ...], count: int, dim: int) -> Tensor:
    return torch.cat([parts[i] for i in range(count)], dim)


def rows(parts: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([parts[i] for i in range(L)], 1)


PARTLY: dict[str, Together] = {
    "another order": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "another order of chunks": lambda x: _swapped(*x.chunk(2, 1)),
    "twice the same": lambda x: torch.cat([x[:, :3], x[:, :3]], 1),
    "overlapping": lambda x: torch.cat([x[:, :4], x[:, 2:4]], 1),
    "a gap, made up for": lambda x: torch.cat([x[:, :2], x[:, 2:4], x[:, :2]], 1),
    "another dimension": lambda x: torch.cat([x[:, :2, :], x[:, :4]], 1),
    "other steps": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "backwards and forwards": lambda x: torch.cat([x[:, :3], x[:, 3:1], x[:, 1:2], x[:, :2]], 1),
    "indices out of order": lambda x: put_together(torch.tensor_split(x, [4, 2], 1), 3, 1)[:, :L],
    "rows in another order": lambda x: torch.stack([x[:, i] for i in (1, 0, 2, 3, 4, 5)], 1),
    "pieces of two values": lambda x: torch.cat([x[:, :2], (2 * x)[:, 2:]], 1),
    "one piece changed": lambda x: torch.cat([x[:, :2], x[:, 2:].relu()], 1),
    "stacked along another dimension": lambda x: torch.stack([x[:, i] for i in range(L)], 2).flatten(1).view(-1, L, D),
}


def _swapped(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([b, a], 1)


def example() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, L, D, dtype=torch.float64)


def net(between: Together) -> Steps:
    torch.manual_seed(0)
    return Steps(between).double()


def lengths(model: nn.Module, *inputs: Tensor) -> list[int]:
    return [len(chain.steps) for chain in rewrite_model(model, *inputs).chains]


@pytest.mark.parametrize("shapes", [False, True], ids=["without shapes", "with shapes"])
@pytest.mark.parametrize("between", WHOLE.values(), ids=WHOLE)
def test_the_whole_value_is_one_state(between: Together, shapes: bool) -> None:
    model, x = net(between), example()
    assert torch.equal(between(x), x)
    result = rewrite_model(model, *([x] if shapes else []))
    (chain,) = result.chains
    assert len(chain.steps) == 4
    reshapes = "unflatten" in inspect.getsource(between)  # for the next step, too, which puts the state back
    assert reshapes or {step.kind for step in chain.steps} == {"residual"}
    assert torch.equal(result.run(x, gamma=0), model(x))
    torch.testing.assert_close(result.run(x, gamma=0.9), momentum_reference(list(model.fs), x, 0.9).output)


@pytest.mark.parametrize("shapes", [False, True], ids=["without shapes", "with shapes"])
@pytest.mark.parametrize("between", PARTLY.values(), ids=PARTLY)
def test_another_value_ends_the_chain(between: Together, shapes: bool) -> None:
    model, x = net(between), example()
    assert not torch.equal(between(x), x)
    result = rewrite_model(model, *([x] if shapes else []))
    assert not result.chains
    assert torch.equal(result.run(x, gamma=0), model(x))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: put_together(x.split(2, 1), 2, 1),
        lambda x: torch.stack([x[:, 0], x[:, 1]], 1),
        lambda x: torch.cat([x[:, :2], x[:, 2:4]], 1),
        lambda x: torch.cat([x.narrow(1, 0, 2), x.narrow(1, 2, 2)], 1),
        lambda x: torch.vstack([x[:1], x[1:2]]),
    ],
    ids=["split", "stack", "slices", "narrow", "vstack"],
)
def test_pieces_that_are_not_all_end_the_chain_once_shapes_are_known(between: Together) -> None:
    class Shrinking(Steps):
        def forward(self, x: Tensor) -> Tensor:
            for i, f in enumerate(self.fs):
                x = x + f(x)
                x = between(x) if i == 1 else x
            return x

    torch.manual_seed(0)
    model, x = Shrinking(between).double(), torch.randn(3, L, D, dtype=torch.float64)
    result = rewrite_model(model, x)
    assert [len(chain.steps) for chain in result.chains] == [2]
    assert "changes the stream from" in " ".join(result.reasons.values())
    assert torch.equal(result.run(x, gamma=0), model(x))


class Watched(Steps):
    """Others look at a piece of every state."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.head = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = []
        for f in self.fs:
            x = x + f(x)
            a, b = x[:, :2], x[:, 2:]
            seen.append(self.head(a))
            x = torch.cat([a, b], 1)
        return x, seen


def test_others_may_look_at_a_piece() -> None:
    torch.manual_seed(0)
    model, x = Watched().double(), example()
    result = rewrite_model(model, x)
    assert [len(chain.steps) for chain in result.chains] == [4]
    reference = momentum_reference(list(model.fs), x, 0.9)
    for gamma, states in ((0, None), (0.9, reference.taps[1:])):
        out, seen = result.run(x, gamma=gamma)
        expected, heads = model(x) if states is None else (states[-1], [model.head(state[:, :2]) for state in states])
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(seen, heads)


class Single(nn.Module):
    """Blocks on two streams that are put together in each, as the single-stream blocks of Flux."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        for f in self.fs:
            n = text.shape[1]
            x = torch.cat([text, image], dim=1)
            x = x + f(x) * (1 + text.mean(1, keepdim=True))
            text, image = x[:, :n], x[:, n:]
        return text, image


def test_single_stream_blocks_are_one_chain() -> None:
    torch.manual_seed(0)
    model, (text, image) = Single().double(), (example()[:, :2], example()[:, 2:])
    result = rewrite_model(model, text, image)
    (chain,) = result.chains
    assert [step.path for step in chain.steps] == ["fs.0", "fs.1", "fs.2", "fs.3"] or len(chain.steps) == 4
    for out, expected in zip(result.run(text, image, gamma=0), model(text, image), strict=True):
        assert torch.equal(out, expected)


def cuts(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, count), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    starts=cuts(L),
    stops=cuts(L),
    pieces=st.permutations(range(4)),
    keep=st.integers(1, 4),
    method=st.sampled_from(["slice", "narrow", "nested"]),
)
def test_a_join_is_the_value_or_is_not_taken_for_it(
    starts: list[int], stops: list[int], pieces: Iterable[int], keep: int, method: str
) -> None:
    """Random pieces, sorted or not, all or some: what is taken for the whole is as long as it only if it equals it."""
    bounds = list(zip([0, *starts], [*stops, L], strict=False))
    chosen = [bounds[i % len(bounds)] for i in list(pieces)[:keep]] if keep < 4 else bounds

    def between(x: Tensor) -> Tensor:
        if method == "narrow":
            parts = [x.narrow(1, a, max(b - a, 0)) for a, b in chosen]
        elif method == "nested":
            parts = [half for a, b in chosen for half in (x[:, a:b][:, :1], x[:, a:b][:, 1:])]
        else:
            parts = [x[:, a:b] for a, b in chosen]
        return torch.cat(parts, 1)

    class Joins(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return between(x)

    case = traced(Joins())
    (join,) = [node for node in case.graph.nodes if node.target is torch.cat]
    x = example()
    value = between(x)
    if joined(join) is not None and value.shape == x.shape:
        assert torch.equal(value, x)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=2, max_size=4), dim=st.sampled_from([0, 1, -1, -2]))
def test_every_split_put_together_is_the_value(sizes: list[int], dim: int) -> None:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    before = [slice(None)] * dim if dim >= 0 else [...]
    behind = [slice(None)] * (-dim - 1) if dim < 0 else []
    ways: list[Together] = [
        lambda x: torch.cat(x.split(sizes, dim), dim),
        lambda x: torch.cat(torch.tensor_split(x, ends[:-1], dim), dim),
        lambda x: torch.cat(
            [x[(*before, slice(a, b), *behind)] for a, b in zip([0, *ends[:-1]], [*ends[:-1], None], strict=True)], dim
        ),
        lambda x: torch.cat([x.narrow(dim, b - n, n) for n, b in zip(sizes, ends, strict=True)], dim),
    ]
    for way in ways:

        class Joins(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return way(x)  # noqa: B023

        case = traced(Joins())
        (join,) = [node for node in case.graph.nodes if node.target is torch.cat]
        assert joined(join) is case.node("x")
