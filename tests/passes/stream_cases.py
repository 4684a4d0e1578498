"""Models whose streams read each other, each with its momentum recurrence written by hand; see `cases`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.passes.cases import CASES, Case, D

__all__ = ["CASES"]

Branch = Callable[..., Sequence[Tensor]]


def recurrence(steps: Sequence[tuple[str, str, Branch]], gamma: float, **states: Tensor) -> list[Tensor]:
    """Steps are (streams read, streams updated, branch); the streams are known by one letter each."""
    velocities = {name: torch.zeros_like(x) for name, x in states.items()}
    for reads, writes, branch in steps:
        for name, f in zip(writes, branch(*(states[name] for name in reads)), strict=True):
            velocities[name] = gamma * velocities[name] + (1 - gamma) * f
            states[name] = states[name] + velocities[name]
    return list(states.values())


def one(function: Callable[..., Tensor]) -> Branch:
    return lambda *xs: (function(*xs),)


class Reader(nn.Module):
    """Reads one stream by the other: what attention does between them, of any two lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return (self.q(x) @ self.k(c).transpose(1, 2)).softmax(-1) @ c


class Streams(Case):
    """Two streams of different lengths."""

    inputs = ((2, 3, D), (2, 5, D))

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)
        self.readers = nn.ModuleList(Reader() for _ in range(4))


del CASES["Streams"]


class JointAttention(Streams):
    """A branch over both streams gives an increment of each; then each has a step of its own (as in MMDiT)."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for f, g in ((self.fs[0], self.fs[1]), (self.fs[2], self.fs[3])):
            y = f(torch.cat([x, c], 1))
            x = x + y[:, : x.shape[1]]
            x = x + g(x).tanh()
            c = c + y[:, x.shape[1] :]  # a size of a later state is no read of it
            c = c + g(c).sin()
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        steps = []
        for f, g in ((self.fs[0], self.fs[1]), (self.fs[2], self.fs[3])):
            steps += [("xc", "xc", lambda x, c, f=f: f(torch.cat([x, c], 1)).split([3, 5], 1))]
            steps += [("x", "x", one(lambda x, g=g: g(x).tanh()))]
            steps += [("c", "c", one(lambda c, g=g: g(c).sin()))]
        return recurrence(steps, gamma, x=x, c=c)


class SelfAndCross(Streams):
    """Each stream has a step of its own, then each reads the other, the second one the new first (as in LightGlue)."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for a, b, f, g in (*self.readers[:2], *self.fs[:2]), (*self.readers[2:], *self.fs[2:]):
            x = x + f(x)
            c = c + g(c)
            x = x + a(x, c)
            c = c + b(c, x)
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        steps = []
        for a, b, f, g in (*self.readers[:2], *self.fs[:2]), (*self.readers[2:], *self.fs[2:]):
            steps += [("x", "x", one(f)), ("c", "c", one(g)), ("xc", "x", one(a)), ("cx", "c", one(b))]
        return recurrence(steps, gamma, x=x, c=c)


class CoAttention(Streams):
    """Each reads the other as it was before: one step of both streams (as in ViLBERT)."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for a, b in (self.readers[:2], self.readers[2:]):
            x, c = x + a(x, c), c + b(c, x)
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        steps = [
            ("xc", "xc", lambda x, c, a=a, b=b: (a(x, c), b(c, x))) for a, b in (self.readers[:2], self.readers[2:])
        ]
        return recurrence(steps, gamma, x=x, c=c)


class Coupling(Streams):
    """Each half is moved by the other one, and a little by itself (as in reversible networks)."""

    inputs = ((2, 3, D), (2, 3, D))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for f, g in (self.fs[:2], self.fs[2:]):
            x = x + f(c).tanh() * x.sigmoid()
            c = c + g(x).tanh() * c.sigmoid()
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        steps = []
        for f, g in (self.fs[:2], self.fs[2:]):
            steps += [("xc", "x", one(lambda x, c, f=f: f(c).tanh() * x.sigmoid()))]
            steps += [("cx", "c", one(lambda c, x, g=g: g(x).tanh() * c.sigmoid()))]
        return recurrence(steps, gamma, x=x, c=c)


class Towers(Streams):
    """One tower reads the states of the other, which does not read it; both run in turns."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for f, a in zip(self.fs[:3], self.readers[:3], strict=True):
            c = c + f(c).tanh()
            x = x + a(x, c)
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        steps = []
        for f, a in zip(self.fs[:3], self.readers[:3], strict=True):
            steps += [("c", "c", one(lambda c, f=f: f(c).tanh())), ("xc", "x", one(a))]
        return recurrence(steps, gamma, x=x, c=c)


class ThreeStreams(Streams):
    """Three streams, one of which is updated more often, and a key of one that is computed before it is needed."""

    inputs = ((2, 3, D), (2, 5, D), (2, 2, D))

    def forward(self, x: Tensor, c: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for a, b in (self.readers[:2], self.readers[2:]):
            x = x + a(x, c)
            key = m.exp()
            x = x + b(x, m)
            c = c + a(c, x)
            x = x + a(x, key)
            m = m + b(m, c)
        return x, c, m

    def by_hand(self, gamma: float, x: Tensor, c: Tensor, m: Tensor) -> list[Tensor]:
        steps = []
        for a, b in (self.readers[:2], self.readers[2:]):
            steps += [("xc", "x", one(a)), ("xm", "x", one(b)), ("cx", "c", one(a))]
            steps += [("xm", "x", one(lambda x, m, a=a: a(x, m.exp()))), ("mc", "m", one(b))]
        return recurrence(steps, gamma, x=x, c=c, m=m)


class StaleRead(Streams):
    """A stream reads the other one's new state and one that is gone by then: the chain is cut there."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        a, b, f, g = *self.readers[:2], *self.fs[:2]
        x = x + a(x, c)
        c = c + b(c, x)
        old, x = x, x + f(x)
        c = c + b(c, x) * b(c, old)
        x = x + a(x, c)
        c = c + g(c)
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        a, b, f, g = *self.readers[:2], *self.fs[:2]
        first = [("xc", "x", one(a)), ("cx", "c", one(b)), ("x", "x", one(f))]
        old, c, x = self._three(first, gamma, x, c)
        second = [("cx", "c", one(lambda c, x: b(c, x) * b(c, old))), ("xc", "x", one(a)), ("c", "c", one(g))]
        return recurrence(second, gamma, x=x, c=c)

    def _three(self, steps: list[tuple[str, str, Branch]], gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        old, _ = recurrence(steps[:1], gamma, x=x, c=c)
        x, c = recurrence(steps, gamma, x=x, c=c)
        return [old, c, x]


class InnerChains(Streams):
    """A chain of one stream in the branch of a joint step."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, f, g = *self.readers[:2], *self.fs[:2]
        for _ in range(2):
            h = f(torch.cat([x, c], 1))
            h = h + g(h)
            h = h + g(h).tanh()
            h = h.sin()
            x, c = x + h[:, :3], c + h[:, 3:]
            x = x + a(x, c)
            c = c + b(c, x)
        return torch.cat([x, c], 1)

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> Tensor:
        a, b, f, g = *self.readers[:2], *self.fs[:2]

        def both(x: Tensor, c: Tensor) -> Sequence[Tensor]:
            start = f(torch.cat([x, c], 1))
            (h,) = recurrence([("h", "h", one(g)), ("h", "h", one(lambda h: g(h).tanh()))], gamma, h=start)
            return h.sin().split([3, 5], 1)

        steps = [("xc", "xc", both), ("xc", "x", one(a)), ("cx", "c", one(b))]
        return torch.cat(recurrence(steps * 2, gamma, x=x, c=c), 1)


class DoubleAndSingle(Streams):
    """Joint steps, then steps of both streams put together (as in Flux): two chains."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for a, b in (self.readers[:2], self.readers[2:]):
            x, c = x + a(x, c), c + b(c, x)
        y = torch.cat([c, x], 1)
        for f in self.fs:
            y = y + f(y).tanh()
        return y[:, c.shape[1] :]

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> Tensor:
        steps = [
            ("xc", "xc", lambda x, c, a=a, b=b: (a(x, c), b(c, x))) for a, b in (self.readers[:2], self.readers[2:])
        ]
        x, c = recurrence(steps, gamma, x=x, c=c)
        single = [("y", "y", one(lambda y, f=f: f(y).tanh())) for f in self.fs]
        return recurrence(single, gamma, y=torch.cat([c, x], 1))[0][:, c.shape[1] :]


class TappedStreams(Streams):
    """States of both streams are read outside while they move on."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        a, b, f, g = *self.readers[:2], *self.fs[:2]
        x = x + a(x, c)
        c = c + b(c, x)
        first = x.mean() + c.std()
        x = x + f(x)
        c = c + g(c)
        second = c.exp()
        x = x + a(x, c)
        return x, c, first, second

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        a, b, f, g = *self.readers[:2], *self.fs[:2]
        steps = [("xc", "x", one(a)), ("cx", "c", one(b)), ("x", "x", one(f)), ("c", "c", one(g)), ("xc", "x", one(a))]
        x1, c1 = recurrence(steps[:2], gamma, x=x, c=c)
        x, c = recurrence(steps, gamma, x=x, c=c)
        return x, c, x1.mean() + c1.std(), c.exp()


class InPlaceStreams(Streams):
    """Sums in place, of states that branches of the other stream read before."""

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x, c = x + self.fs[0](x), c + self.fs[1](c)
        for a, b in (self.readers[:2], self.readers[2:]):
            dc = b(c, x)
            x += a(x, c)
            c += dc
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        steps = [("x", "x", one(self.fs[0])), ("c", "c", one(self.fs[1]))]
        for a, b in (self.readers[:2], self.readers[2:]):
            steps += [("xc", "xc", lambda x, c, a=a, b=b: (a(x, c), b(c, x)))]
        return recurrence(steps, gamma, x=x, c=c)


class JointInside(Streams):
    """A chain of two streams in each branch of a chain of one."""

    inputs = ((2, 8, D),)

    def forward(self, h: Tensor) -> Tensor:
        for f, a, b in zip(self.fs[:2], self.readers[:2], self.readers[2:], strict=True):
            x, c = f(h).sin().split([3, 5], 1)
            for _ in range(2):
                x = x + a(x, c)
                c = c + b(c, x)
            h = h + torch.cat([x, c], 1).tanh()
        return h

    def by_hand(self, gamma: float, h: Tensor) -> Tensor:
        def inside(h: Tensor, f: nn.Module, a: nn.Module, b: nn.Module) -> Tensor:
            x, c = f(h).sin().split([3, 5], 1)
            steps = [("xc", "x", one(a)), ("cx", "c", one(b))]
            return torch.cat(recurrence(steps * 2, gamma, x=x, c=c), 1).tanh()

        blocks = zip(self.fs[:2], self.readers[:2], self.readers[2:], strict=True)
        steps = [("h", "h", one(lambda h, parts=parts: inside(h, *parts))) for parts in blocks]
        return recurrence(steps, gamma, h=h)[0]


class PostNormStreams(Streams):
    """Both streams are normalized after every sum, and each reads the other as it was (as in LXMERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        m, n = self.norms
        for a, b, f, g in (*self.readers[:2], *self.fs[:2]), (*self.readers[2:], *self.fs[2:]):
            x, c = m(x + a(x, c)), n(c + b(c, x))
            x = m(x + f(x))
            c = n(c + g(c))
        return x, c

    def by_hand(self, gamma: float, x: Tensor, c: Tensor) -> list[Tensor]:
        m, n = self.norms
        steps = []
        for a, b, f, g in (*self.readers[:2], *self.fs[:2]), (*self.readers[2:], *self.fs[2:]):
            steps += [("xc", "xc", lambda x, c, a=a, b=b: (m(x + a(x, c)) - x, n(c + b(c, x)) - c))]
            steps += [("x", "x", one(lambda x, f=f: m(x + f(x)) - x)), ("c", "c", one(lambda c, g=g: n(c + g(c)) - c))]
        return recurrence(steps, gamma, x=x, c=c)
