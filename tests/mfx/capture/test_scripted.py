"""Modules that TorchScript, torch.export, quantization and others have made, inside of a model: called whole."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.sampling import grid

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:quantized..linear_dynamic"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh())


def with_state() -> nn.Module:
    return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3)))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), x


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = torch.jit.script(Pair())

    def forward(self, x: Tensor) -> Tensor:
        first, _ = self.pair(x)
        return first


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
    scripted_tanh = torch.jit.script(tanh)


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return scripted_tanh(self.inner(x))


KINDS = {
    "scripted": lambda: torch.jit.script(layers()),
    "scripted, with state and random numbers": with_state,
    "scripted inside": lambda: nn.Sequential(nn.LayerNorm(8), with_state(), nn.Linear(8, 8)),
    "scripted pair": First,
    "scripted function": Function,
    "traced": lambda: torch.jit.trace(layers(), torch.randn(2, 8)),
    "frozen": lambda: torch.jit.freeze(torch.jit.script(layers().eval())),
    "exported": lambda: torch.export.export(layers(), (torch.randn(4, 8),)).module(),
    "quantized": lambda: torch.ao.quantization.quantize_dynamic(layers(), {nn.Linear}),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh()),
    "data parallel": lambda: nn.DataParallel(layers()),
    "compiled": lambda: torch.compile(layers(), backend="eager"),
}


class Net(nn.Module):
    def __init__(self, build, depth: int = 9) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.branches = nn.ModuleList(build() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for branch in self.branches:
            x = x + branch(x)
        return x


def model_of(kind: str) -> Net:
    torch.manual_seed(0)
    model = Net(KINDS[kind])
    for _ in range(3):  # TorchScript chooses its kernels after it has seen some calls, for all copies of a module
        copy.deepcopy(model)(data()).sum().backward()
    if kind == "lazy":
        model(data())
    return model


def data() -> Tensor:
    return torch.linspace(-1, 1, 32).reshape(4, 8).clone()


def two_steps(net: nn.Module) -> list[Tensor]:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        x = data().requires_grad_()
        y = net(x)
        found += [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]
        found += [buffer.clone() for buffer in net.buffers()] + [torch.get_rng_state()]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_at_gamma_zero_it_is_the_model(kind):
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    expected = two_steps(model)
    model.load_state_dict(before)
    net = mfx.momentumize(model, gamma=0.0, verify="raise")
    assert all(map(torch.equal, two_steps(net), expected))
    assert "9 of 9 residual steps in 1 chain" in str(mfx.explain(net))


@grid(len(KINDS), kind=list(KINDS), options=[{}, {"memory_budget": 0.5}])
def test_gradients_are_those_of_kept_activations(kind, options):
    model = model_of(kind)
    before = copy.deepcopy(model.state_dict())
    expected = two_steps(mfx.momentumize(model, gamma=0.9, memory_budget=1.0))
    model.load_state_dict(before)
    assert all(map(torch.equal, two_steps(mfx.momentumize(model, gamma=0.9, verify="raise", **options)), expected))


@pytest.mark.parametrize("kind", ["scripted, with state and random numbers", "scripted inside", "traced"])
def test_a_net_has_the_tensors_of_the_model_and_modules_of_its_own(kind):
    model = model_of(kind)
    net = mfx.momentumize(model)
    for table in (nn.Module.parameters, nn.Module.buffers):
        assert all(a is b for a, b in zip(table(net), table(model), strict=True))
    assert [*net.state_dict()] == [*model.state_dict()]
    net.eval()
    assert {module.training for module in model.modules()} == {True}
    copied = copy.deepcopy(net)
    assert torch.equal(copied(data()), net(data()))
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in net.parameters()}


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x.view(-1).mul_(0.5)
        return self.inner(x)


def test_a_scripted_branch_that_writes_into_the_stream_is_left_alone():
    torch.manual_seed(0)
    model = Net(lambda: torch.jit.script(InPlace()))
    expected = model(data())
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        net = mfx.momentumize(model, gamma=0.9)
    assert torch.equal(net(data()), expected)


def test_dynamo_cannot_capture_it_and_says_so():
    with pytest.raises(mfx.MfxError, match=r"Net cannot be captured as one graph.*torch\.jit"):
        mfx.momentumize(model_of("scripted"), capture="dynamo")(data())
