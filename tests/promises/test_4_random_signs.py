"""gamma=mfx.BDIA: signs drawn in training, exact gradients, the model itself in evaluation, and what is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.promises.test_4_streams import KINDS as STREAM_KINDS
from tests.promises.test_4_streams import Net as Streams
from tests.promises.test_4_streams import inputs as stream_inputs
from tests.promises.test_4_streams import same
from tests.promises.test_4_streams import step as stream_step
from tests.sampling import grid

DEPTH, BATCH, WIDTH = 14, 4, 6


class Stack(nn.Module):
    """A chain x + f(x), or of steps norm(x + f(x)), under ``body.blocks``."""

    def __init__(self, kind: str = "residual", dropout: float = 0.0, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, WIDTH))
            for _ in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth)) if kind == "map" else None

    def forward(self, x: Tensor) -> Tensor:
        for t, block in enumerate(self.body.blocks):
            x = x + block(x)
            if self.norms is not None:
                x = self.norms[t](x)
        return x


class Outer(nn.Module):
    """Blocks with a chain inside their branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleList(Stack(depth=8, dropout=0.1) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        for inner in self.inner:
            x = x + inner(x).tanh()
        return x


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def train(net: nn.Module, x: Tensor, seed: int = 2) -> list[Tensor]:
    """Output and gradients of one training step."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = net(x)
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum()
    return [y.detach(), *torch.autograd.grad(loss, [x, *net.parameters()])]


def by_hand(model: Stack, x: Tensor, a: float, per: str) -> Tensor:
    """The recurrence, with the signs that a chain draws first."""
    draws = torch.randint(0, 2, (DEPTH,) if per == "call" else (DEPTH, BATCH))
    v = torch.zeros_like(x)
    for t, block in enumerate(model.body.blocks):
        gamma = torch.zeros(()) if t == 0 else (2 * draws[t] - 1) * a
        gamma = gamma.double().view(-1, 1)
        f = block(x) if model.norms is None else model.norms[t](x + block(x)) - x
        v = gamma * v + (1 - gamma) * f
        x = x + v
    return x


@grid(
    8,
    dtype=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    arithmetic=["exact", "float"],
    per=["call", "sample"],
    kind=["residual", "map"],
)
def test_gradients_are_those_of_the_recurrence_and_of_ordinary_backprop(
    dtype: torch.dtype, arithmetic: str, per: str, kind: str
) -> None:
    model = Stack(kind).to(dtype)
    gamma = mfx.BDIA(0.25, per)
    x = batch(dtype)
    net = mfx.momentumize(model, gamma=gamma, arithmetic=arithmetic, verify="raise")
    found = train(net, x)
    kept = train(mfx.momentumize(model, gamma=gamma, arithmetic=arithmetic, memory_budget=1.0), x)
    if arithmetic == "float" and dtype is torch.float64:  # states are walked back with an error of 1e-10
        torch.testing.assert_close(found, kept, rtol=1e-8, atol=1e-8)
    else:
        assert all(map(torch.equal, found, kept))
    wide = copy.deepcopy(model).double()
    torch.manual_seed(2)
    leaf = x.double().requires_grad_()
    y = by_hand(wide, leaf, 0.25, per)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum()
    expected = [y, *torch.autograd.grad(loss, [leaf, *wide.parameters()])]
    # Steps round to ``dtype`` a few times each and enlarge what was rounded before by less than 2 (1 + a at most in v,
    # and branches that are contractions); fixed point has 2⁻⁴⁰.
    eps = max(torch.finfo(dtype).eps, 2.0**-40)
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).abs().max() <= 16 * DEPTH * eps * max(1.0, float(b.detach().abs().max()))


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_evaluation_is_the_model_itself(capture: str) -> None:
    model = Stack(dropout=0.2)
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25), capture=capture)
    x = batch()
    assert not torch.equal(train(net, x)[0], train(model, x)[0])
    for whole in (model, net):
        whole.eval()
    assert all(map(torch.equal, train(net, x), train(model, x)))
    with torch.no_grad():
        assert torch.equal(net(x), model(x))
    net.train()
    assert not torch.equal(train(net, x)[0], train(model.train(), x)[0])


@pytest.mark.parametrize("capture", ["symbolic", "dynamo"])
def test_the_flag_is_that_of_the_innermost_module_that_owns_the_steps(capture: str) -> None:
    model = Stack()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25), capture=capture)
    x, plain = batch(), model(batch())
    assert not torch.equal(net(x), plain)
    net.body.blocks.eval()  # the net itself stays in training
    assert torch.equal(net(x), plain)
    net.body.blocks.train()
    assert not torch.equal(net(x), plain)
    net.eval()
    net.body.blocks.training = True
    assert not torch.equal(net(x), plain)


def test_signs_are_drawn_without_gradients_too_and_repeat_with_the_seed() -> None:
    net = mfx.momentumize(Stack(), gamma=mfx.BDIA(0.25, "sample"), verify="raise")
    outputs = []
    for _ in range(2):
        torch.manual_seed(2)
        with torch.no_grad():
            outputs.append(net(batch()))
    assert torch.equal(*outputs)
    # Without a backward pass states are not rounded to fixed point.
    torch.testing.assert_close(outputs[0], train(net, batch())[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(outputs[0], net(batch()))


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_chains_in_branches_draw_again_what_they_drew(budget: float) -> None:
    model = Outer()
    gamma = {"*": mfx.BDIA(0.25, "sample"), "root": 0.9}
    for case in (gamma, mfx.BDIA(0.25)):
        kept = train(mfx.momentumize(model, gamma=case, memory_budget=1.0), batch())
        net = mfx.momentumize(model, gamma=case, memory_budget=budget, verify="raise")
        assert all(map(torch.equal, train(net, batch()), kept))
        assert all(map(torch.equal, train(net, batch()), kept))
        assert not torch.equal(train(net, batch(), seed=3)[0], kept[0])
        net.eval()
        if case != gamma:
            assert torch.equal(net(batch()), copy.deepcopy(model).eval()(batch()))


def test_a_net_that_goes_into_evaluation_before_its_backward_pass() -> None:
    model = Outer()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25), verify="raise")
    kept = train(net, batch())
    torch.manual_seed(2)
    x = batch().requires_grad_()
    y = net(x)
    net.eval()
    loss = (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum()
    assert all(map(torch.equal, torch.autograd.grad(loss, [x, *net.parameters()]), kept[1:]))


@pytest.mark.parametrize("gamma", [mfx.BDIA(0.25), mfx.BDIA(0.125, "sample")], ids=str)
def test_streams_that_read_each_other(gamma: Any) -> None:
    for make in (Streams, STREAM_KINDS[0]) if gamma.per == "call" else (Streams,):
        if make is Streams:
            model, xs = make(), stream_inputs()
            net = mfx.momentumize(model, gamma=gamma, verify="raise")
            assert same(
                stream_step(net, xs=xs), stream_step(mfx.momentumize(model, gamma=gamma, memory_budget=1.0), xs=xs)
            )
            net.eval()
            model.eval()
            assert same(net(*xs), model(*xs))


@pytest.mark.parametrize("residual", [True, False])
def test_momentum_net(residual: bool) -> None:
    functions = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)]
    kw: dict[str, Any] = {"gamma": mfx.BDIA(0.25), "is_residual": residual, "verify": "raise"}
    net, kept = mfx.MomentumNet(functions, use_backprop=False, **kw), mfx.MomentumNet(functions, **kw)
    x = batch()
    assert all(map(torch.equal, train(net, x), train(kept, x)))
    assert net.gamma == mfx.BDIA(0.25)
    plain = x
    for function in functions:
        plain = plain + function(plain) if residual else function(plain)
    net.network.eval()
    assert torch.equal(net(x), plain)


def test_compiled_around() -> None:
    model = Stack()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample"), verify="raise")
    compiled = torch.compile(net, backend="eager")
    x = batch()
    assert all(map(torch.equal, train(compiled, x), train(net, x)))
    compiled.eval()
    assert torch.equal(compiled(x), model(x))
    net.train()
    net.body.eval()
    assert torch.equal(compiled(x), model(x))


def test_weights_load_where_the_function_is_the_same_in_evaluation() -> None:
    model = Stack()
    nets = {
        g: mfx.momentumize(model, gamma=g, example_inputs=batch()) for g in (0.0, 0.9, mfx.BDIA(0.25), mfx.BDIA(0.5))
    }
    saved = nets[mfx.BDIA(0.25)].state_dict()
    assert saved._metadata[""]["mfx.bdia"] == {"body.blocks": (1, 4, "call", 0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (model, nets[0.0], nets[mfx.BDIA(0.5)]):
            other.load_state_dict(saved)
        for gamma in (0.0, 0.9):
            nets[gamma].load_state_dict(nets[gamma].state_dict())
        nets[mfx.BDIA(0.25)].load_state_dict(nets[0.0].state_dict())
    with pytest.warns(UserWarning, match="another function"):
        nets[0.9].load_state_dict(saved)
    with pytest.warns(UserWarning, match="another function"):
        nets[mfx.BDIA(0.25)].load_state_dict(nets[0.9].state_dict())


@pytest.mark.parametrize("captured", [True, False])
def test_a_schedule_sets_magnitudes_and_set_gamma_plain_momenta(captured: bool) -> None:
    model = Stack()
    net = mfx.momentumize(model, gamma=mfx.BDIA(0.25, "sample"))
    if captured:
        net(batch())
    scheduler = mfx.GammaScheduler(net, lambda step: [0.125, 0.0, 0.5][step])
    expected = mfx.momentumize(model, gamma=mfx.BDIA(0.125, "sample"))
    assert all(map(torch.equal, train(net, batch()), train(expected, batch())))
    scheduler.step()
    assert all(map(torch.equal, train(net, batch()), train(model, batch())))
    scheduler.step()
    expected = mfx.momentumize(model, gamma=mfx.BDIA(0.5, "sample"))
    assert all(map(torch.equal, train(net, batch()), train(expected, batch())))
    mfx.set_gamma(net, 0.5)
    assert all(map(torch.equal, train(net, batch()), train(mfx.momentumize(model, gamma=0.5), batch())))
    mfx.set_gamma(net, mfx.BDIA(0.5, "sample"))
    assert all(map(torch.equal, train(net, batch()), train(expected, batch())))


def test_a_graph_module() -> None:
    model = Stack()
    net = mfx.momentumize(torch.fx.symbolic_trace(model), gamma=mfx.BDIA(0.25))
    expected = mfx.momentumize(model, gamma=mfx.BDIA(0.25))
    assert all(map(torch.equal, train(net, batch()), train(expected, batch())))
    net.eval()
    assert torch.equal(net(batch()), model(batch()))


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: mfx.BDIA(0.0), "between 0 and 1"),
        (lambda: mfx.BDIA(1.0), "between 0 and 1"),
        (lambda: mfx.BDIA(float("nan")), "between 0 and 1"),
        (lambda: mfx.BDIA("half"), "between 0 and 1"),
        (lambda: mfx.BDIA(per="step"), "per 'call' or per 'sample'"),
        (lambda: mfx.BDIA(dim=0.5), "batch dimension"),
        (lambda: mfx.momentumize(Stack(), gamma=mfx.BDIA(), velocity="residual"), "Leave velocity"),
        (lambda: mfx.momentumize(Stack(), gamma={"*": mfx.BDIA()}, velocity=nn.Identity()), "Leave velocity"),
        (lambda: mfx.momentumize(Stack(), gamma=mfx.BDIA(), velocity={"*": nn.Identity()}), "Leave velocity"),
        (lambda: mfx.set_gamma(mfx.momentumize(Stack(), velocity="residual"), mfx.BDIA()), "Leave velocity"),
        (lambda: mfx.MomentumNet([nn.Tanh()], mfx.BDIA(), True, nn.Identity()), "Leave velocity"),
        (lambda: mfx.momentumize(Stack("map"), gamma=mfx.BDIA(1 / 3)), "below 1/3"),
        (lambda: mfx.set_gamma(mfx.momentumize(Stack("map")), mfx.BDIA(0.5)), "below 1/3"),
        (lambda: mfx.MomentumNet([nn.Tanh()], mfx.BDIA(0.5), is_residual=False), "below 1/3"),
        (lambda: mfx.momentumize(Stack(), gamma=mfx.BDIA(per="sample", dim=2))(batch()), "not the batch"),
        (lambda: mfx.momentumize(Streams(), gamma=mfx.BDIA(per="sample", dim=1))(*stream_inputs()), "not the batch"),
        (lambda: mfx.GammaScheduler(mfx.momentumize(Stack(), gamma=mfx.BDIA()), lambda step: mfx.BDIA()), "magnitude"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Any, text: str) -> None:
    with pytest.raises(mfx.MfxError, match=text):
        make()


def test_a_refused_gamma_leaves_the_old_one() -> None:
    net = mfx.momentumize(Stack("map"))
    before = train(net, batch())
    with pytest.raises(mfx.MfxError, match="below 1/3"):
        mfx.set_gamma(net, mfx.BDIA(0.5))
    assert all(map(torch.equal, train(net, batch()), before))


@pytest.mark.parametrize("depth, gamma", [(11, 0.0), (12, 0.9)])
def test_auto_is_decided_by_the_number_of_updates(depth: int, gamma: float) -> None:
    model = Stack(depth=depth)
    expected = mfx.momentumize(model, gamma=gamma, min_steps=2) if gamma else model
    for given in ("auto", {"*": "auto"}):
        assert all(map(torch.equal, train(mfx.momentumize(model, gamma=given), batch()), train(expected, batch())))
    net = mfx.momentumize(model, gamma=0.5)
    mfx.set_gamma(net, "auto")
    assert all(map(torch.equal, train(net, batch()), train(expected, batch())))
