"""Small models with a residual add that must stay as it is, one per reason."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mfx_passes import Selection

D = 4


@dataclass(frozen=True)
class Case:
    """A model and its rejections.

    Args:
        model: its class.
        reasons: how often each reason, a regular expression, is given.
        steps: how many steps are rewritten all the same.
        shapes: whether shapes are needed to see it.
    """

    model: type[Linears]
    reasons: dict[str, int]
    steps: int = 0
    selection: Selection = field(default_factory=Selection)
    shapes: bool = False

    def make(self) -> Linears:
        torch.manual_seed(0)
        return self.model()

    def example(self) -> list[Tensor]:
        torch.manual_seed(1)
        return [torch.randn(shape).to(dtype) for shape, dtype in self.model.inputs]


REFUSALS: dict[str, Case] = {}


def refused(reasons: dict[str, int], **more: object):  # type: ignore[no-untyped-def]
    def register(model: type[Linears]) -> type[Linears]:
        REFUSALS[model.__name__] = Case(model, reasons, **more)  # type: ignore[arg-type]
        return model

    return register


class Linears(nn.Module):
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (((2, 3, D), torch.float32),)

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(4))


@refused({"projection shortcut": 1, "single residual step": 1})
class Projection(Linears):
    """A projection shortcut, and the one step before it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x)
        return self.fs[1](x) + self.fs[2](x)


@refused({"scaled, gated or subtracted, and no plain step": 3})
class Scaled(Linears):
    """The skip is subtracted from the branch, scaled, or gated, and no step beside it is a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fs[0](x) - x
        x = torch.add(self.fs[1](x), x, alpha=0.5)
        gate = self.fs[2](x).sigmoid()
        return gate * x + (1 - gate) * self.fs[3](x)


@refused({"and fs.1 is read in another step, too": 2, "single residual step": 1})
class Recurrent(Linears):
    """A gated unit runs over time, after a plain step."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x)
        for _ in range(2):
            gate = self.fs[1](x).sigmoid()
            x = gate * x + (1 - gate) * self.fs[2](x)
        return x


@refused({"rearranged on its way and not put back": 1})
class Rearranged(Linears):
    """The skip is flattened for the only sum, and stays so."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fs[0](x)
        return x.flatten(1) + self.fs[1](x).flatten(1)


@refused({"single residual step": 1})
class Single(Linears):
    """One residual step is no chain."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fs[0](x)


@refused({"a chain of 3 steps; chains have at least 4": 3}, selection=Selection(min_steps=4))
class TooShort(Linears):
    """Three steps, where four were asked for."""

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs[:3]:
            x = x + f(x)
        return x


@refused({"relu_ changes in place a value that the branch is given from outside": 1}, steps=2)
class ChangesOutside(Linears):
    """A branch changes a capture in place."""

    inputs = (((2, 3, D), torch.float32), ((2, 3, D), torch.float32))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.fs[0](x) * memory.relu_()
        x = x + self.fs[1](x)
        return x + self.fs[2](x)


@refused({"sub_ changes in place a value that the branch reads": 2}, steps=2)
class ChangedLater(Linears):
    """Two branches read a view of a capture that is changed in place afterwards."""

    inputs = (((2, 3, D), torch.float32), ((2, 3, D), torch.float32))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        keys = memory.transpose(0, 1)
        x = x + self.fs[0](x) * keys.transpose(0, 1)
        x = x + self.fs[1](x) * keys.transpose(0, 1)
        memory.sub_(1)
        x = x + self.fs[2](x)
        return x + self.fs[3](x), memory


@refused({"iadd changes in place a value that the branch reads": 2, "single residual step": 2}, steps=2)
class ChangedByASum(Linears):
    """Two branches read a value that a residual sum changes in place afterwards, and the sum stays as it is."""

    inputs = (((2, 3, D), torch.float32), ((2, 3, D), torch.float32))

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.fs[3](memory)
        x = x + self.fs[0](x + memory)
        x = x + self.fs[1](x + memory)
        memory += self.fs[2](memory)
        x = x + self.fs[2](x)
        return x + self.fs[3](x), memory


@refused({"mul_ changes in place a value that the branch is given": 1}, steps=6)
class BetweenStreams(Linears):
    """An update of a stream stays as it is: those before and after it, one each, are in chains of both streams."""

    inputs = (((2, 3, D), torch.float32), ((2, 3, D), torch.float32), ((2, 3, D), torch.float32))

    def forward(self, x: Tensor, c: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        c = c + self.fs[0](c) * x
        x = x + self.fs[1](x) * c
        c = c + self.fs[2](c) * x
        x = x + memory.mul_(self.fs[3](x))
        c = c + self.fs[0](c) * x
        x = x + self.fs[1](x) * c
        c = c + self.fs[2](c) * x
        return x, c, memory


@refused({"add_ changes the stream in place and a view of it is read afterwards": 1}, steps=2)
class Tangled(Linears):
    """A view of the stream is read after the stream has been changed in place by the sum."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fs[3](x)
        view = x.view(-1, D)
        x.add_(self.fs[0](x))
        x = x + self.fs[1](x)
        return x + self.fs[2](x), view * 2


@refused({"relu_ changes the stream in place and a view of it is read afterwards": 1}, steps=2)
class TangledTap(Linears):
    """A view of the end state is read after somebody has changed the end state in place."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.fs[0](x)
        x = x + self.fs[1](x)
        x = x + self.fs[2](x)
        view = x.view(-1, D)
        return x.relu_(), view * 2


@refused({"iadd changes in place a value that lives on outside of the model's forward": 1}, steps=2)
class ChangesInput(Linears):
    """The first sum changes the caller's tensor."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.fs[0](x)
        x = x + self.fs[1](x)
        return x + self.fs[2](x)


@refused({"grad differentiates in the branch through what lies outside of it": 1}, steps=2)
class DifferentiatesOutside(Linears):
    """A branch that holds the gradient of the stream by an earlier value."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fs[3](x)
        y = x.tanh()
        y = y + self.fs[0](y)
        y = y + self.fs[1](y)
        return y + torch.autograd.grad(self.fs[2](y).sum(), x, create_graph=True)[0]


@refused({r"changes the stream from \(2, 1, 4\) float32 on cpu to \(2, 3, 4\)": 1}, steps=2, shapes=True)
class ChangesShape(Linears):
    """The first sum broadcasts the stream."""

    inputs = (((2, 1, D), torch.float32),)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x).expand(-1, 3, -1)
        x = x + self.fs[1](x)
        return x + self.fs[2](x)


@refused({r"the branch \(2, 1, 4\) is broadcast over the stream \(2, 3, 4\)": 1}, steps=2, shapes=True)
class BroadcastBranch(Linears):
    """A branch is broadcast (squeeze and excite, a global context)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x).mean(1, keepdim=True)
        x = x + self.fs[1](x)
        return x + self.fs[2](x)


@refused({"changes the stream from .* float32 on cpu to .* float64 on cpu": 1}, steps=2, shapes=True)
class ChangesDtype(Linears):
    """The first branch is wider than the stream."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x).double()
        x = x + x.tanh()
        return x + x.sin()


@refused({"in place and gives float32, where x \\+ f\\(x\\) would give float64": 1}, steps=2, shapes=True)
class Narrows(Linears):
    """A branch is wider than the stream, but the sum is in place and keeps the stream's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.fs[3](x)
        x += self.fs[0](x).double()
        x = x + self.fs[1](x)
        return x + self.fs[2](x)


@refused({"the stream is int64, not floating point": 2}, shapes=True)
class Integers(Linears):
    """A stream of integers."""

    inputs = (((2, 3), torch.int64),)

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.flip(0)
        return x + x.flip(1)


@refused(
    {"partly inside a step of another chain": 2, "found out later": 1, "single residual step": 1},
    steps=2,
    selection=Selection(refused={"add_2": "found out later"}),
)
class Crossing(Linears):
    """Two sums lie in a step that is refused, and the first of them in a step of another chain."""

    inputs = (((2, 3, D), torch.float32), ((2, 3, D), torch.float32))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h = self.fs[0](x) * y
        h = h + h.tanh()
        first, h = h, h + h.sin()
        x = x + h
        y = y + first.cos()
        return x + self.fs[2](x), y + self.fs[1](y)


@refused({"left out by only/skip": 1, "single residual step": 1}, steps=2, selection=Selection(skip=("fs.1",)))
class LeftOut(Linears):
    """One step is left out: two remain after it, and one before, which is too few."""

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            x = x + f(x)
        return x


@refused({"it lies in none of the sub layers that were asked for": 2}, selection=Selection(marked=True))
class Unnamed(Linears):
    """Only named steps are asked for, and these are none."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x)
        return x + self.fs[1](x)


@refused(
    {"found out later": 1},
    steps=2,
    selection=Selection(refused={"add": "found out later"}),
)
class RefusedByName(Linears):
    """A sum that was refused before, by name."""

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs[:3]:
            x = x + f(x)
        return x
