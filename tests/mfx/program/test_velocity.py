"""γ and the velocity before the first step, by chain, against the recurrence of the paper."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mfx
from tests.mfx.models import WIDTH, assert_reversible, inputs, recurrence

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}  # exact arithmetic has 40 fraction bits, that is 1e-12 per operation


class Line(nn.Sequential):
    """A chain of residual steps."""

    def __init__(self, depth: int) -> None:
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))

    def forward(self, x):
        for fc in self:
            x = x + fc(x)
        return x


class Stages(nn.Module):
    """Three chains: stage.a, stage.b, last."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleDict({"a": Line(3), "b": Line(2)})
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.last = Line(4)

    def forward(self, x):
        x = self.middle(self.stage["a"](x))
        x = self.middle(self.stage["b"](x))
        return self.last(x)


class Punctuated(Stages):
    """Chains stage.a-b and stage.a_b."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.ModuleDict({"a-b": Line(3), "a_b": Line(2)})

    def forward(self, x):
        x = self.middle(self.stage["a-b"](x))
        x = self.middle(self.stage["a_b"](x))
        return self.last(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stages().double()


@pytest.fixture
def x():
    return inputs(dtype=torch.float64)


def expected(model, x, gammas, velocities=(0.0, 0.0, 0.0)):
    x = model.middle(recurrence(x, model.stage["a"], gammas[0], velocities[0]))
    x = model.middle(recurrence(x, model.stage["b"], gammas[1], velocities[1]))
    return recurrence(x, model.last, gammas[2], velocities[2])


GAMMAS = {
    "number": (0.5, (0.5, 0.5, 0.5)),
    "names": ({"stage.a": 0.2, "stage.b": 0.4, "last": 0.6}, (0.2, 0.4, 0.6)),
    "patterns": ({"stage.*": 0.2, "*": 0.6}, (0.2, 0.2, 0.6)),
    "a name before a pattern": ({"*": 0.6, "stage.b": 0.4}, (0.6, 0.4, 0.6)),
    "zero for some": ({"last": 0.0, "*": 0.9}, (0.9, 0.9, 0.0)),
}


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("gamma, gammas", GAMMAS.values(), ids=GAMMAS)
def test_gamma(model, x, gamma, gammas, arithmetic):
    net = mfx.momentumize(model, gamma=gamma, arithmetic=arithmetic)
    torch.testing.assert_close(net(x), expected(model, x, gammas), **TOLERANCE)
    explained = {chain.name: chain.gamma for chain in mfx.explain(net).chains}
    assert explained == dict(zip(("stage.a", "stage.b", "last"), gammas, strict=True))


@pytest.mark.parametrize("option, value", [("gamma", {"lats": 0.5, "*": 0.9}), ("velocity", {"lats": nn.Linear(8, 8)})])
def test_a_name_that_no_chain_has(model, option, value):
    message = rf"{option}: no chain is called 'lats'\. Chains: last, stage\.a, stage\.b"
    with pytest.raises(mfx.MfxError, match=message):
        mfx.momentumize(model, **{option: value})
    if option == "gamma":
        with pytest.raises(mfx.MfxError, match=message):
            mfx.momentumize(mfx.trace(model), gamma=value)


def test_a_chain_without_a_gamma(model):
    with pytest.raises(mfx.MfxError, match=r"without a value for the chain 'stage\.\w'.*key '\*'"):
        mfx.momentumize(model, gamma={"last": 0.5})


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
@pytest.mark.parametrize("grad", [True, False])
def test_residual_start(model, x, arithmetic, grad):
    net = mfx.momentumize(model, gamma=0.7, velocity="residual", arithmetic=arithmetic)
    starts = []
    y = x
    for line, after in ((model.stage["a"], model.middle), (model.stage["b"], model.middle), (model.last, None)):
        starts.append(line[0](y))  # v₀ = f₀(x₀), so that v₁ = γ·f₀ + (1−γ)·f₀ = f₀
        y = recurrence(y, line, 0.7, starts[-1])
        y = after(y) if after else y
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(net(x), y, **TOLERANCE)


def velocities():
    torch.manual_seed(1)
    last = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    return {"stage.*": nn.Linear(WIDTH, WIDTH).double(), "last": last.double()}


def with_velocities(model, x, gamma, v):
    a = model.middle(recurrence(x, model.stage["a"], gamma, v["stage.*"](x)))
    b = model.middle(recurrence(a, model.stage["b"], gamma, v["stage.*"](a)))
    return recurrence(b, model.last, gamma, v["last"](b))


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_modules_by_chain(model, x, arithmetic):
    modules = velocities()
    net = mfx.momentumize(model, gamma=0.7, velocity=modules, arithmetic=arithmetic)
    y = net(x)
    reference = with_velocities(model, x, 0.7, modules)
    torch.testing.assert_close(y, reference, **TOLERANCE)
    parameters = [*model.parameters(), *(p for module in modules.values() for p in module.parameters())]
    mine = torch.autograd.grad(y.square().sum(), parameters)
    theirs = torch.autograd.grad(reference.square().sum(), parameters)
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-7)


def test_one_module_for_all_chains(model, x):
    module = nn.Linear(WIDTH, WIDTH).double()
    net = mfx.momentumize(model, gamma=0.7, velocity=module)
    y = with_velocities(model, x, 0.7, {"stage.*": module, "last": module})
    torch.testing.assert_close(net(x), y, **TOLERANCE)
    assert len(list(net.parameters())) == len(list(model.parameters())) + 2


def test_a_mapping_may_leave_chains_out(model, x):
    module = nn.Linear(WIDTH, WIDTH).double()
    net = mfx.momentumize(model, gamma=0.7, velocity={"stage.a": module})
    torch.testing.assert_close(net(x), expected(model, x, (0.7,) * 3, (module(x), 0.0, 0.0)), **TOLERANCE)


def test_the_modules_are_the_users_own_under_velocity(model, x):
    modules = velocities()
    net = mfx.momentumize(model, velocity=modules)
    assert net.velocity.last is modules["last"]
    assert net.velocity.stage_a is net.velocity.stage_b is modules["stage.*"]
    added = list(net.state_dict())[len(model.state_dict()) :]
    assert list(net.state_dict())[: -len(added)] == list(model.state_dict())
    assert set(added) == {f"velocity.{m}.{p}" for m in ("stage_a", "stage_b") for p in ("weight", "bias")} | {
        "velocity.last.0.weight",
        "velocity.last.0.bias",
    }
    assert not hasattr(model, "velocity")
    net.eval()(x)
    assert list(net.state_dict())[len(model.state_dict()) :] == added
    mfx.momentumize(model, velocity=velocities()).load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(model, x, make_copy):
    net = mfx.momentumize(model, velocity=velocities())
    copied = make_copy(net)
    expected = net(x)
    with torch.no_grad():
        net.velocity.last[0].weight.zero_()
    assert torch.equal(copied(x), expected)
    assert not torch.equal(net(x), expected)
    with torch.no_grad():
        copied.velocity.last[0].weight.zero_()
    assert torch.equal(copied(x), net(x))
    assert_reversible(copied, copied.last[1], x)


def test_chains_whose_names_differ_in_punctuation_only(x):
    torch.manual_seed(0)
    modules = {name: nn.Linear(WIDTH, WIDTH).double() for name in ("stage.a-b", "stage.a_b")}
    model = Punctuated().double()
    net = mfx.momentumize(model, gamma=0.7, velocity=modules)
    a = model.middle(recurrence(x, model.stage["a-b"], 0.7, modules["stage.a-b"](x)))
    b = model.middle(recurrence(a, model.stage["a_b"], 0.7, modules["stage.a_b"](a)))
    torch.testing.assert_close(net(x), recurrence(b, model.last, 0.7), **TOLERANCE)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_replacing_one(model, x):
    net = mfx.momentumize(model, velocity=velocities())
    net(x)
    net.velocity.last = nn.Linear(WIDTH, WIDTH).double()
    y = net(x)
    net.eval()
    assert torch.equal(net(x), y)
    assert type(net.velocity.last) is nn.Linear


def test_new_options_replace_the_modules(model, x):
    net = mfx.momentumize(mfx.momentumize(model, velocity=velocities()), gamma=0.5)
    assert list(net.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(net(x), expected(model, x, (0.5,) * 3), **TOLERANCE)


OWN = {"plain": 3, "module": nn.Linear(2, 2), "parameter": nn.Parameter(torch.zeros(1))}


@pytest.mark.parametrize("attribute", OWN.values(), ids=OWN)
def test_a_model_with_a_velocity_of_its_own(model, x, attribute):
    model.velocity = attribute
    with pytest.raises(mfx.MfxError, match=r"Stages has an attribute 'velocity'.*Rename it, or use velocity='zero'"):
        mfx.momentumize(model, velocity=velocities())
    assert model.velocity is attribute
    mfx.momentumize(model, velocity="residual")(x)


def test_a_graph_module_takes_no_velocity_modules(model):
    with pytest.raises(mfx.MfxError, match="velocity modules need the model itself"):
        mfx.momentumize(mfx.trace(model), velocity=velocities())


@pytest.mark.parametrize(
    "v0, got",
    [
        (lambda x: x.repeat(1, 2), r"\(2, 16\) torch.float64 on cpu"),
        (lambda x: x.long(), r"\(2, 8\) torch.int64 on cpu"),
        (lambda x: x.to("meta"), r"\(2, 8\) torch.float64 on meta"),
        (lambda x: (x, x), "a tuple"),
    ],
    ids=["shape", "dtype", "device", "kind"],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_velocity_that_does_not_fit(model, x, v0, got, grad):
    module = nn.Module()
    module.forward = v0
    net = mfx.momentumize(model, velocity={"last": module})
    message = rf"velocity module of the chain last gave {got}; the state it starts from is \(2, 8\) torch.float64 on"
    with torch.set_grad_enabled(grad), pytest.raises(mfx.MfxError, match=message):
        net(x)
