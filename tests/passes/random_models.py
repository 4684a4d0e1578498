"""Random residual models that know their own structure, and so their own momentum recurrence."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

D = 4
SPELLINGS = ("x + f", "f + x", "f += x", "x.add(f)", "add(x, f, alpha)", "x - f", "addcmul", "sum([x, f])", "x + f + g")
BRANCHES = ("linear", "mlp", "in place", "memory", "constant", "parameter", "side", "view", "nested")
FLAVOURS = ("plain", "relu", "norm", "preactivation")


@dataclass(frozen=True)
class BranchSpec:
    kind: str
    inner: ChainSpec | None = None


@dataclass(frozen=True)
class StepSpec:
    spelling: str
    branch: BranchSpec
    other: BranchSpec = field(default=BranchSpec("linear"))
    tap: bool = False
    shared: bool = False


@dataclass(frozen=True)
class ChainSpec:
    """``projected``: a linear map comes before the first step, so that the chain's start is nobody else's."""

    flavour: str
    steps: tuple[StepSpec, ...]
    projected: bool


def branches(depth: int) -> st.SearchStrategy[BranchSpec]:
    flat = st.sampled_from([kind for kind in BRANCHES if kind != "nested"]).map(BranchSpec)
    if depth == 0:
        return flat
    return st.one_of(flat, flat, chains(depth - 1, 1).map(lambda chain: BranchSpec("nested", chain)))


def steps(depth: int) -> st.SearchStrategy[StepSpec]:
    flags = st.booleans(), st.booleans()
    return st.builds(StepSpec, st.sampled_from(SPELLINGS), branches(depth), branches(depth), *flags)


def chains(depth: int, at_least: int) -> st.SearchStrategy[ChainSpec]:
    rows = st.lists(steps(depth), min_size=at_least, max_size=4).map(tuple)
    return st.builds(ChainSpec, st.sampled_from(FLAVOURS), rows, st.booleans())


def models() -> st.SearchStrategy[tuple[ChainSpec, ...]]:
    return st.tuples(chains(1, 2), chains(2, 1)) | st.tuples(chains(2, 2))


Outs = list[Tensor]


class Branch(nn.Module):
    def __init__(self, spec: BranchSpec) -> None:
        super().__init__()
        self.spec = spec
        self.first = nn.Linear(D, D)
        self.last = nn.Linear(D, D)
        self.weight = nn.Parameter(torch.rand(D))
        self.act = nn.ReLU(inplace=True)
        self.inner = Chain(spec.inner) if spec.inner else None

    def forward(self, x: Tensor, memory: Tensor, constant: Tensor) -> tuple[Tensor, Outs]:
        return self.compute(x, memory, constant, None)

    def compute(self, x: Tensor, memory: Tensor, constant: Tensor, gamma: float | None) -> tuple[Tensor, Outs]:
        h = self.first(x)
        outs: Outs = []
        match self.spec.kind:
            case "mlp":
                h = F.gelu(h)
            case "in place":
                h = self.act(h)
            case "memory":
                h = h * memory
            case "constant":
                h = h * constant.tanh()
            case "parameter":
                h = h * self.weight
            case "side":
                outs.append(h.softmax(-1))
                h = outs[0] * h
            case "view":
                h = h.reshape(-1, D).view(x.shape)
            case "nested":
                if not self.spec.inner.projected:
                    h = x
                call = self.inner if gamma is None else lambda *args: self.inner.momentum(*args, gamma)
                h, outs = call(h, memory, constant)
        return self.last(h), outs


class Chain(nn.Module):
    """Residual steps in a row."""

    def __init__(self, spec: ChainSpec) -> None:
        super().__init__()
        self.spec = spec
        self.preactivation = spec.flavour == "preactivation"
        self.stem = nn.Linear(D, D)
        self.fs, self.gs = nn.ModuleList(), nn.ModuleList()
        for step in spec.steps:
            share = step.shared and len(self.fs) > 0
            self.fs.append(self.fs[-1] if share else Branch(step.branch))
            self.gs.append(Branch(step.other))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in spec.steps)
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.rand(D))

    def start(self, x: Tensor) -> Tensor:
        # What an in-place ReLU changes must not be somebody else's.
        return self.stem(x) if self.spec.projected or self.preactivation else x

    def tail(self, t: int, x: Tensor) -> Tensor:
        match self.spec.flavour:
            case "relu":
                return F.relu(x)
            case "norm":
                return self.norms[t](x)
        return x

    def forward(self, x: Tensor, memory: Tensor, constant: Tensor) -> tuple[Tensor, Outs]:
        x, outs = self.start(x), []
        for t, step in enumerate(self.spec.steps):
            if self.preactivation:
                self.relu(x)
            f, sides = self.fs[t](x, memory, constant)
            outs += sides
            if step.spelling == "x + f + g":
                g, sides = self.gs[t](x, memory, constant)
                outs += sides
                x = x + f + g
            else:
                x = self.add(step.spelling, x, f)
            x = self.tail(t, x)
            if self.taps(step):
                outs.append(x)
        return x, outs

    def add(self, spelling: str, x: Tensor, f: Tensor) -> Tensor:
        match spelling:
            case "x + f":
                return x + f
            case "f + x":
                return f + x
            case "f += x":
                f += x
                return f
            case "x.add(f)":
                return x.add(f)
            case "add(x, f, alpha)":
                return torch.add(x, f, alpha=0.5)
            case "x - f":
                return x - f
            case "addcmul":
                return torch.addcmul(x, self.scale, f, value=2)
            case "sum([x, f])":
                return sum([x, f])
        raise ValueError(spelling)

    def taps(self, step: StepSpec) -> bool:
        # A tap would be changed by the next step's in-place ReLU.
        return step.tap and not self.preactivation

    def branch(self, t: int, x: Tensor, memory: Tensor, constant: Tensor, gamma: float) -> tuple[Tensor, Outs]:
        """f(x), from its definition."""
        step = self.spec.steps[t]
        f, outs = self.fs[t].compute(x, memory, constant, gamma)
        if step.spelling == "x + f + g":
            g, more = self.gs[t].compute(x, memory, constant, gamma)
            return f + g, outs + more
        scale = {"add(x, f, alpha)": 0.5, "x - f": -1, "addcmul": 2 * self.scale}
        return f * scale.get(step.spelling, 1), outs

    def momentum(self, x: Tensor, memory: Tensor, constant: Tensor, gamma: float) -> tuple[Tensor, Outs]:
        """The same chain by v ← γ·v + (1−γ)·f(x), x ← x + v; a single step is no chain."""
        x, outs = self.start(x), []
        if self.preactivation:
            x = F.relu(x)
        gamma_here = gamma if len(self.spec.steps) > 1 else 0.0
        v = torch.zeros_like(x)
        for t, step in enumerate(self.spec.steps):
            f, sides = self.branch(t, x, memory, constant, gamma)
            outs += sides
            h = self.tail(t, x + f)
            if self.preactivation and t + 1 < len(self.spec.steps):
                h = F.relu(h)
            v = gamma_here * v + (1 - gamma_here) * (h - x)
            x = x + v
            if self.taps(step):
                outs.append(x)
        return x, outs


class Model(nn.Module):
    """Chains with linear maps before, between and after them."""

    def __init__(self, specs: tuple[ChainSpec, ...]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(Chain(spec) for spec in specs)
        self.between = nn.ModuleList(nn.Linear(D, D) for _ in range(len(specs) + 1))

    def forward(self, x: Tensor, memory: Tensor, constant: Tensor) -> list[Tensor]:
        outs: Outs = []
        for linear, chain in zip(self.between, self.chains, strict=False):
            x, more = chain(linear(x), memory, constant)
            outs += more
        return [self.between[-1](x), *outs]

    def momentum(self, x: Tensor, memory: Tensor, constant: Tensor, gamma: float) -> list[Tensor]:
        outs: Outs = []
        for linear, chain in zip(self.between, self.chains, strict=False):
            x, more = chain.momentum(linear(x), memory, constant, gamma)
            outs += more
        return [self.between[-1](x), *outs]
