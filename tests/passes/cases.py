"""Small models, one per kind of residual step, each with its momentum recurrence written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles import momentum_reference

D = 4
CASES: dict[str, type[Case]] = {}


class Case(nn.Module):
    """A model of residual steps; ``by_hand`` is what it must compute once they are momentum steps."""

    inputs: tuple[tuple[int, ...], ...] = ((2, 3, D),)

    def __init_subclass__(cls) -> None:
        CASES[cls.__name__] = cls

    def linears(self, count: int) -> None:
        self.fs = nn.ModuleList(nn.Linear(D, D) for _ in range(count))

    def by_hand(self, gamma: float, *inputs: Tensor) -> Any:
        raise NotImplementedError


def make(case: type[Case]) -> Case:
    torch.manual_seed(0)
    return case().double()


def example(case: type[Case]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64) for shape in case.inputs]


def end(functions: list[Callable[[Tensor], Tensor]], x: Tensor, gamma: float) -> Tensor:
    return momentum_reference(functions, x, gamma).output


def end_of_maps(functions: list[Callable[[Tensor], Tensor]], x: Tensor, gamma: float) -> Tensor:
    return momentum_reference(functions, x, gamma, "map").output


class Plain(Case):
    """x + f(x) and f(x) + x."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x)
        return self.fs[1](x) + x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        return end(list(self.fs), x, gamma)


class TailRelu(Case):
    """ResNet: the activation after the sum belongs to the step, in the last one too."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)
        self.head = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        for f in self.fs:
            x = F.relu(f(x) + x)
        return self.head(x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        maps = [lambda x, f=f: F.relu(x + f(x)) for f in self.fs]
        return self.head(end_of_maps(maps, F.relu(x), gamma))


class PreActivation(Case):
    """In-place ReLU in front of the branch: the skip is relu(x) without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)
        self.stem = nn.Linear(D, D)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for f in self.fs:
            x = x + f(self.relu(x))
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for_tails = [lambda x, f=f: F.relu(x + f(x)) for f in self.fs[:-1]]
        # The last sum is not followed by a ReLU.
        return end_of_maps([*for_tails, lambda x: x + self.fs[-1](x)], x, gamma)


class PostNorm(Case):
    """Post-norm transformer: LayerNorm after every sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for f, norm in zip(self.fs, self.norms, strict=True):
            x = norm(x + f(x))
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        maps = [lambda x, f=f, n=n: n(x + f(x)) for f, n in zip(self.fs, self.norms, strict=True)]
        return end_of_maps(maps, x, gamma)


class Parallel(Case):
    """Two branches in one sum, in either nesting."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x) + self.fs[1](x)
        return (self.fs[2](x) + self.fs[3](x)) + x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c, d = self.fs
        return end([lambda x: a(x) + b(x), lambda x: c(x) + d(x)], x, gamma)


class Subtraction(Case):
    """x - f(x), and x - a(x) + b(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.fs[0](x)
        return x - self.fs[1](x) + self.fs[2](x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c = self.fs
        return end([lambda x: -a(x), lambda x: c(x) - b(x)], x, gamma)


class Spellings(Case):
    """addcmul, alpha, sum(), methods, torch functions with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(7)
        self.scale = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        f = self.fs
        x = torch.addcmul(x, self.scale, f[0](x), value=0.5)
        x = torch.add(x, f[1](x), alpha=2)
        x = sum([x, f[2](x)])
        x = x.add(f[3](x))
        x = torch.add(input=f[4](x), other=x)
        x = torch.sub(x, f[5](x), alpha=3)
        return x.addcmul(self.scale, f[6](x))

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        f, s = self.fs, self.scale
        branches = [
            lambda x: 0.5 * (s * f[0](x)),
            lambda x: 2 * f[1](x),
            f[2],
            f[3],
            f[4],
            lambda x: -3 * f[5](x),
            lambda x: s * f[6](x),
        ]
        return end(branches, x, gamma)


class Quantizable(Case):
    """FloatFunctional.add, as torchvision's quantizable models write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(2)
        self.add = nn.ModuleList(torch.ao.nn.quantized.FloatFunctional() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for f, add in zip(self.fs, self.add, strict=True):
            x = add.add(x, f(x))
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        return end(list(self.fs), x, gamma)


class InPlaceSums(Case):
    """``out += identity``, ``x += f(x)``, add_ and sub_."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)
        self.stem = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.fs[0](x)
        out += x
        x = out
        x += self.fs[1](x)
        x.add_(self.fs[2](x))
        return x.sub_(self.fs[3](x))

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c, d = self.fs
        return end([a, b, c, lambda x: -d(x)], self.stem(x), gamma)


class Relayout(Case):
    """The stream is permuted and reshaped for the sum and put back; the second step reads it as a sequence."""

    inputs = ((2, D, 3, 5),)

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            rows = x.flatten(2).transpose(1, 2)
            rows = rows + f(rows)
            x = rows.transpose(1, 2).reshape(x.shape)
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        on_rows = [lambda x, f=f: f(x.flatten(2).transpose(1, 2)).transpose(1, 2).view_as(x) for f in self.fs]
        return end(on_rows, x, gamma)


class ReadInAnotherLayout(Case):
    """GCViT: the start is laid out anew, and back; what a later branch reads is computed of it in the other layout."""

    inputs = ((2, 3, 5, D),)

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)
        self.query = nn.Conv2d(D, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        images = x.sin().permute(0, 3, 1, 2)
        query = self.query(images)
        x = images.permute(0, 2, 3, 1)
        x = x + self.fs[0](x)
        query = query.permute(0, 2, 3, 1).tanh()
        x = x + self.fs[1](x) * query
        return x + self.fs[2](x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        x = x.sin()
        query = self.query(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).tanh()
        return end([self.fs[0], lambda x: self.fs[1](x) * query, self.fs[2]], x, gamma)


class Windows(Case):
    """MaxViT: the stream is cut into windows for two sums, then into a grid for two more, between convolutions."""

    inputs = ((2, D, 4, 6),)

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)
        self.convs = nn.ModuleList(nn.Conv2d(D, D, 1) for _ in range(2))

    def windows(self, x: Tensor, grid: bool) -> Tensor:
        b, c, h, w = x.shape
        y = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h // 2 * (w // 2), 4, c)
        return y.transpose(1, 2) if grid else y

    def back(self, y: Tensor, grid: bool, h: int, w: int) -> Tensor:
        y = y.transpose(1, 2) if grid else y
        b, _, _, c = y.shape
        return y.reshape(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convs[0](x)
        for grid in (False, True):
            y = self.windows(x, grid)
            y = y + self.fs[2 * grid](y)
            y = y + self.fs[2 * grid + 1](y)
            x = self.back(y, grid, 4, 6)
        return x + self.convs[1](x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        def branch(f: nn.Module, grid: bool) -> Callable[[Tensor], Tensor]:
            return lambda x: self.back(f(self.windows(x, grid)), grid, 4, 6)

        a, b, c, d = self.fs
        on_windows = [branch(a, False), branch(b, False), branch(c, True), branch(d, True)]
        return end([self.convs[0], *on_windows, self.convs[1]], x, gamma)


class Joins(Case):
    """Flux: in every block, two streams are put together for a step and split again."""

    inputs = ((2, 2, D), (2, 3, D))

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        for f in self.fs:
            n = text.shape[1]
            x = torch.cat([text, image], dim=1)
            x = x + f(x)
            text, image = x[:, :n], x[:, n:]
        return text, image

    def by_hand(self, gamma: float, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        x = end(list(self.fs), torch.cat([text, image], 1), gamma)
        return x[:, :2], x[:, 2:]


class OtherJoins(Case):
    """Halves put together in another order, overlapping, or one of them changed: other values than the stream."""

    inputs = ((2, 4, D),)

    def __init__(self) -> None:
        super().__init__()
        self.linears(8)

    def forward(self, x: Tensor) -> Tensor:
        joins = (
            lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
            lambda x: torch.cat([x[:, :3], x[:, 2:3]], 1),
            lambda x: torch.cat([x[:, :2], x[:, 2:].relu()], 1),
            lambda x: x,
        )
        for i, join in enumerate(joins):
            x = x + self.fs[2 * i](x)
            x = join(x + self.fs[2 * i + 1](x))
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h = self.fs
        x = end([a, b], x, gamma)
        x = end([c, d], torch.cat([x[:, 2:], x[:, :2]], 1), gamma)
        x = end([e, f], torch.cat([x[:, :3], x[:, 2:3]], 1), gamma)
        return end([g, h], torch.cat([x[:, :2], x[:, 2:].relu()], 1), gamma)


class WrongWindows(Case):
    """A square is cut into windows and put together transposed: not what undoes it, but the shape is right."""

    inputs = ((2, D, 4, 4),)

    def __init__(self) -> None:
        super().__init__()
        self.linears(2)
        self.convs = nn.ModuleList(nn.Conv2d(D, D, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convs[0](x)
        y = x.reshape(-1, 2, 32).transpose(1, 2).reshape(-1, 16, D)
        y = y + self.fs[0](y)
        y = y + self.fs[1](y)
        x = y.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, D, 4, 4)
        return x + self.convs[1](x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        def cut(x: Tensor) -> Tensor:
            return x.reshape(-1, 2, 32).transpose(1, 2).reshape(-1, 16, D)

        def right(y: Tensor) -> Tensor:
            return y.reshape(-1, 32, 2).transpose(1, 2).reshape(-1, D, 4, 4)

        def wrong(y: Tensor) -> Tensor:
            return y.reshape(-1, 8, 8).transpose(1, 2).reshape(-1, D, 4, 4)

        a, b = self.fs
        first, last = self.convs
        maps = [
            lambda x: x + first(x),
            lambda x: right(cut(x) + a(cut(x))),
            lambda x: wrong(cut(x) + b(cut(x))),
            lambda x: x + last(x),
        ]
        return end_of_maps(maps, x, gamma)


class Neutral(Case):
    """Casts, clones and Identity on the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(2)
        self.identity = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.identity(x).contiguous() + self.fs[0](x)
        skip = x.to(torch.float64).clone()
        return skip + self.fs[1](x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        return end(list(self.fs), x, gamma)


class Captures(Case):
    """Branches read an input of the model, a value computed from it between the steps, and a parameter."""

    inputs = ((2, 3, D), (2, 3, D))

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.fs[0](x) * memory
        keys = self.fs[3](memory)
        x = x + self.fs[1](x) * keys
        return x + self.fs[2](x) * keys + self.bias * x

    def by_hand(self, gamma: float, x: Tensor, memory: Tensor) -> Tensor:
        a, b, c, key = self.fs
        keys = key(memory)
        branches = [lambda x: a(x) * memory, lambda x: b(x) * keys, lambda x: c(x) * keys + self.bias * x]
        return end(branches, x, gamma)


class Taps(Case):
    """Somebody else reads the states: one is returned, one feeds a head, one is returned through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)
        self.head = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x + self.fs[0](x)
        first = x
        x = x + self.fs[1](x)
        second = self.head(x)
        x = x + self.fs[2](x)
        third = x.flatten(1)
        return x + self.fs[3](x), first, second, third

    def by_hand(self, gamma: float, x: Tensor) -> tuple[Tensor, ...]:
        states = momentum_reference(list(self.fs), x, gamma).taps
        return states[4], states[1], self.head(states[2]), states[3].flatten(1)


class SideOutputs(Case):
    """Somebody else reads values inside the branches: attention weights, router logits."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        weights = []
        for score, value in zip(self.fs[::2], self.fs[1::2], strict=True):
            weight = score(x).softmax(-1)
            weights.append(weight)
            x = x + weight * value(x)
        return x, weights[0] + weights[1], weights

    def by_hand(self, gamma: float, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        scores, values = self.fs[::2], self.fs[1::2]
        branches = [lambda x, s=s, f=f: s(x).softmax(-1) * f(x) for s, f in zip(scores, values, strict=True)]
        states = momentum_reference(branches, x, gamma).taps
        weights = [score(state).softmax(-1) for score, state in zip(scores, states[:2], strict=True)]
        return states[2], weights[0] + weights[1], weights


class _Group(nn.Module):
    """A chain with a long skip around it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.end = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for f in self.body:
            y = y + f(y)
        return self.end(y) + x


class Nested(Case):
    """RCAN: groups of residual blocks, each in a residual connection of its own, all in a third one."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = nn.ModuleList(_Group() for _ in range(2))
        self.end = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for group in self.groups:
            y = group(y)
        return x + self.end(y)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        def branch(group: _Group) -> Callable[[Tensor], Tensor]:
            return lambda x: group.end(end(list(group.body), x, gamma))

        return x + self.end(end([branch(group) for group in self.groups], x, gamma))


class Shared(Case):
    """One block used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.f(x)
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        return end([self.f] * 3, x, gamma)


class Stages(Case):
    """Several chains, with projections between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.ModuleList(nn.Linear(D, D) for _ in range(2)) for _ in range(2))
        self.down = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.stages[0]:
            x = x + f(x)
        x = self.down(x)
        for f in self.stages[1]:
            x = x + f(x)
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        x = self.down(end(list(self.stages[0]), x, gamma))
        return end(list(self.stages[1]), x, gamma)


class Sizes(Case):
    """Sizes read off a state in one step and used in the next, and sizes of a value inside a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x)
        b, n, d = x.shape
        x = x + self.fs[1](x.view(b * n, d)).view(b, n, d)
        wide = torch.cat([x, x], 1)
        m = wide.size(1)
        x = x + wide[:, :n] / m
        return x + self.fs[2](x).reshape(b, n, d) * m

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c = self.fs
        n = x.shape[1]
        return end([a, b, lambda x: x / (2 * n), lambda x: c(x) * (2 * n)], x, gamma)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y, _ = self.attn(self.norm(x), scale=scale)
        x = x + y
        return x + self.mlp(x)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, -1)
        weights = (q * scale @ k.transpose(-1, -2)).softmax(-1)
        out = self.act(weights @ v)
        return out, weights


class Transformer(Case):
    """Attention and MLP in each block: their calls are folded, the blocks' are not (each holds two steps)."""

    inputs = ((2, 3, D), (1,))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(2))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale)
        return x

    def by_hand(self, gamma: float, x: Tensor, scale: Tensor) -> Tensor:
        branches: list[Callable[[Tensor], Tensor]] = []
        for block in self.blocks:
            branches += [lambda x, b=block: b.attn(b.norm(x), scale)[0], block.mlp]
        return end(branches, x, gamma)


class LateCapture(Case):
    """A step's capture is computed after somebody has read a state: that reader has to wait for the call."""

    inputs = ((2, 3, D), (2, 3, D))

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        x = x + self.fs[0](x)
        x = x + self.fs[1](x)
        tapped = self.fs[3](x) * 2
        late = other.tanh()
        return x + self.fs[2](x) * late, tapped, late

    def by_hand(self, gamma: float, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = self.fs
        states = momentum_reference([a, b, lambda x: c(x) * other.tanh()], x, gamma).taps
        return states[3], d(states[2]) * 2, other.tanh()


class LateCaptureInPlace(LateCapture):
    """As before, but the reader may not wait: what it reads is changed in place. The chain is cut."""

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        x = x + self.fs[0](x)
        x = x + self.fs[1](x)
        tapped = self.fs[3](x) * other
        other = other.clone()
        tapped = tapped + other
        other.zero_()
        late = other.exp()
        x = x + self.fs[2](x) * late
        return x + self.fs[2](x), tapped, late

    def by_hand(self, gamma: float, x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = self.fs
        x = end([a, b], x, gamma)
        return end([c, c], x, gamma), d(x) * other + other, torch.ones_like(other)


class SizesOutside(Case):
    """Somebody else asks for the size of a state, and of a sum before its tail: neither is handed out for that."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(3)

    def forward(self, x: Tensor) -> Tensor:
        count = 0
        for f in self.fs:
            y = x + f(x)
            x = F.relu(y)
            count = count + y.size(1) + x.shape[1]
        return x * count

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        maps = [lambda x, f=f: F.relu(x + f(x)) for f in self.fs]
        return end_of_maps(maps, x, gamma) * (6 * x.shape[1])


class Hidden(Case):
    """In-place activations whose value is not used, in and between module calls, and & between masks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Careless() for _ in range(2))
        self.stem = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            block.act(x)
            x = x + block(x)
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        first, second = (lambda x, b=b: x + b(x) for b in self.blocks)
        return end_of_maps([lambda x: F.relu(first(x)), second], F.relu(self.stem(x)), gamma)


class _Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.act(y)
        positive, large = y > 0, y > 0.5
        both = positive & large
        return y * positive + y * both


class CutByCapture(Case):
    """Later branches use a value that the third branch computes of the second state: the chain is cut after it."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fs[0](x)
        x = x + self.fs[1](x)
        gate = self.fs[5](x).sigmoid()
        for f in self.fs[2:5]:
            x = x + f(x) * gate
        return x

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c, d, e, g = self.fs
        states = momentum_reference([a, b, lambda x: c(x) * g(x).sigmoid()], x, gamma).taps
        gate = g(states[2]).sigmoid()
        return end([lambda x: d(x) * gate, lambda x: e(x) * gate], states[3], gamma)


class CutByOutsideCapture(Case):
    """The third step's capture is computed from the second state, outside of all branches: the chain is cut there."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.fs[0](x)
        x = x + self.fs[1](x)
        gate = self.fs[4](x.detach()).sigmoid()
        kept = gate.clone()
        x = x + self.fs[2](x)
        x = x + self.fs[3](x) * kept
        return x + self.fs[0](x) * kept, gate

    def by_hand(self, gamma: float, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d, g = self.fs
        states = momentum_reference([a, b, c], x, gamma).taps
        gate = g(states[2]).sigmoid()
        return end([lambda x: d(x) * gate, lambda x: a(x) * gate], states[3], gamma), gate


class ChangedOutside(Case):
    """The chain's end is changed in place by somebody else: they get a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(2)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            x = x + f(x)
        x = x.view(-1, D)
        x.mul_(2)
        return x.relu_()

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        return (2 * end(list(self.fs), x, gamma)).relu().view(-1, D)


class SideHead(Case):
    """The first state also feeds a residual add of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.fs[0](x)
        aux = x + self.fs[3](x)
        x = x + self.fs[1](x)
        return x + self.fs[2](x), aux

    def by_hand(self, gamma: float, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = self.fs
        states = momentum_reference([a, b, c], x, gamma).taps
        return states[3], states[1] + d(states[1])


class Scaled(Case):
    """Scaled, gated and subtracted skips, between plain steps."""

    def __init__(self) -> None:
        super().__init__()
        self.linears(7)
        self.scale = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.fs
        x = x + a(x)
        x = self.scale * x + b(x)
        x = c(x) - x
        gate = d(x).sigmoid()
        x = gate * x + (1 - gate) * e(x)
        x = torch.lerp(x, f(x), 0.25)
        return x + g(x)

    def by_hand(self, gamma: float, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g = self.fs
        gated = lambda x: d(x).sigmoid() * x + (1 - d(x).sigmoid()) * e(x)  # noqa: E731
        maps = [
            lambda x: x + a(x),
            lambda x: self.scale * x + b(x),
            lambda x: c(x) - x,
            gated,
            lambda x: 0.75 * x + 0.25 * f(x),
            lambda x: x + g(x),
        ]
        return end_of_maps(maps, x, gamma)
