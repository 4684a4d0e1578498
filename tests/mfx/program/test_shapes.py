"""Shapes become known at the first call: what does not fit is dropped then, and refused later."""

import copy

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import assert_reversible, inputs, recurrence

GAMMA = 0.5


class Odd(nn.Module):
    """Five steps, of which one is given something odd to add."""

    def __init__(self, odd, at: int = 2) -> None:
        super().__init__()
        self.at = at
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(5)).double()
        self.odd = odd

    def forward(self, x):
        for i, fc in enumerate(self.fcs):
            f = fc(x)
            x = x + (self.odd(f) if i == self.at else f)
        return x


class Broadcast(nn.Module):
    def forward(self, f):
        return f.mean(-1, keepdim=True)


class Grow(nn.Module):
    """Broadcasts the stream over the branch."""

    def forward(self, f):
        return torch.stack([f, f, f])


class ToComplex(nn.Module):
    def forward(self, f):
        return f + 0j


def by_hand(model: Odd, x: torch.Tensor) -> torch.Tensor:
    """Two chains of two steps around a plain residual add."""
    x = recurrence(x, model.fcs[:2], GAMMA)
    x = x + model.odd(model.fcs[2](x))
    return recurrence(x, model.fcs[3:], GAMMA)


ODD = {
    "broadcast": (Broadcast, r"broadcast over the stream"),
    "shape": (Grow, r"changes the stream from \(2, 8\) float64 on cpu to \(3, 2, 8\) float64 on cpu"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build, reason", ODD.values(), ids=ODD)
def test_a_step_that_does_not_fit_is_dropped(build, reason, training):
    model = Odd(build()).train(training)
    net = mfx.momentumize(model, gamma=GAMMA)
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [5]
    x = inputs(dtype=torch.float64)
    with pytest.warns(UserWarning, match=rf"residual add add_2 in .* is left as it was: .*{reason}") as caught:
        y = net(x)
    assert len(caught) == 1
    torch.testing.assert_close(y, by_hand(model, x), rtol=1e-9, atol=1e-9)
    explanation = mfx.explain(net)
    assert [len(chain.steps) for chain in explanation.chains] == [2, 2]
    (rejection,) = explanation.rejections
    assert rejection.node.name == "add_2"
    assert_reversible(net, net.fcs[0], x)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


@pytest.mark.parametrize("build, reason", ODD.values(), ids=ODD)
def test_explain_with_inputs_tells_beforehand(build, reason):
    explanation = mfx.explain(Odd(build()), inputs(dtype=torch.float64))
    assert [len(chain.steps) for chain in explanation.chains] == [2, 2]
    (rejection,) = explanation.rejections
    assert reason.split(" ")[0] in rejection.reason


def test_training_and_evaluation_drop_the_same():
    model = Odd(Broadcast())
    net = mfx.momentumize(model, gamma=GAMMA)
    x = inputs(dtype=torch.float64)
    with pytest.warns(UserWarning, match="left as it was"):
        y = net(x)
    torch.testing.assert_close(net.eval()(x), y)


def test_a_gradient_through_a_dropped_step():
    model = Odd(Broadcast())
    net = mfx.momentumize(model, gamma=GAMMA)
    x = inputs(dtype=torch.float64)
    with pytest.warns(UserWarning, match="left as it was"):
        net(x).square().sum().backward()
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    by_hand(model, x).square().sum().backward()
    torch.testing.assert_close(mine, [p.grad for p in model.parameters()], rtol=1e-8, atol=1e-8)


class WholeBatch(nn.Module):
    """Fits a batch of one, and broadcasts for any other."""

    def forward(self, f):
        return f.mean(0, keepdim=True)


@pytest.mark.parametrize("training", [True, False])
def test_a_relation_that_changes_later_is_refused(training):
    net = mfx.momentumize(Odd(WholeBatch()).train(training), gamma=GAMMA)
    net(inputs(1, dtype=torch.float64))
    with pytest.raises(
        mfx.MfxError, match=r"chain root, step number 3 of 5: the branch gave .*\(1, 8\).* stream of shape \(2, 8\)"
    ):
        net(inputs(2, dtype=torch.float64))


def test_nothing_left():
    net = mfx.momentumize(Pair(), gamma=GAMMA)
    with pytest.warns(UserWarning, match="left as it was"):
        y = net(inputs())
    with mfx.original(net):
        assert torch.equal(net(inputs()), y)
    assert mfx.explain(net).chains == ()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, x):
        for fc in self.fcs:
            x = x + fc(x)
        return x


class Integers(nn.Module):
    def forward(self, x):
        for _ in range(3):
            x = x + x // 2
        return x


def test_integers_stay_integers():
    model = Integers()
    net = mfx.momentumize(model, gamma=GAMMA)
    x = torch.arange(8)
    with pytest.warns(UserWarning, match="not floating point"):
        assert torch.equal(net(x), model(x))


class EightBits(nn.Module):
    def __init__(self, dtype, in_place):
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.dtype, self.in_place = dtype, in_place

    def forward(self, x):
        x = x.to(self.dtype)
        for fc in self.fcs:
            if self.in_place:
                x += fc(x.float()).to(self.dtype)
            else:
                x = x + fc(x.float()).to(self.dtype)
        return x.float()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_a_stream_of_eight_bits_fails_as_without_mfx(arithmetic, dtype, in_place):
    """Fake tensors of float8 are added, tensors are not."""
    model, x = EightBits(dtype, in_place), torch.randn(2, 8)
    with pytest.raises(NotImplementedError) as plain:
        model(x)
    net = mfx.momentumize(model, gamma=0.9, arithmetic=arithmetic)
    with pytest.raises(NotImplementedError) as raised, pytest.warns(UserWarning, match="not floating point of 16 bits"):
        net(x)
    assert str(raised.value) == str(plain.value)


def test_complex_branches_are_dropped():
    model = Odd(ToComplex(), at=4)
    net = mfx.momentumize(model, gamma=0.0)
    x = inputs(dtype=torch.float64)
    with pytest.warns(UserWarning, match="complex128"):
        y = net(x)
    assert torch.equal(y, model(x))


class Counting(nn.Module):
    """Counts its calls in buffers, and cannot be captured as one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("calls", torch.zeros(1))
        self.fcs = nn.Sequential(*(Residual() for _ in range(3)))

    def forward(self, x):
        self.calls += 1
        x = self.fcs(self.norm(x))
        torch._dynamo.graph_break()
        return x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(x)


@pytest.mark.filterwarnings("ignore:mfx. Counting cannot be captured as one graph")
def test_what_is_looked_at_before_the_first_call_counts_no_call():
    net = mfx.momentumize(Counting())
    for number in (1, 2):
        net(torch.randn(4, 8))
        assert net.calls.item() == net.norm.num_batches_tracked.item() == number
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]
