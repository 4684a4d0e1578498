"""Parametrizations that come and go between forward and backward, checkpoints in the model, statistics that move."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as spectral_norm_by_hook
from torch.nn.utils import weight_norm as weight_norm_by_hook
from torch.utils.checkpoint import checkpoint

import mfx

WIDTH, DEPTH = 4, 3


class Plain(nn.Module):
    """Steps x + tanh(fc(x))."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fcs = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for fc in self.fcs:
            x = x + torch.tanh(self.call(fc, x))
        return x

    def call(self, fc, x):
        return fc(x)


class Checkpointed(Plain):
    """The same function, with torch's checkpoint in every branch."""

    def call(self, fc, x):
        return checkpoint(fc, x, use_reentrant=False)


def batch():
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


def held(model):
    """The classes, and the names of all that the layers hold."""
    tables = [(vars(fc), fc._parameters, fc._buffers, fc._modules, fc._forward_pre_hooks) for fc in model.fcs]
    return [*map(type, model.fcs)], [[*map(list, each)] for each in tables]


def gradients(model, before, between):
    """Gradients of the parameters that a model has in its forward pass; both changes are made of every layer."""
    for fc in model.fcs:
        before(fc)
    own = list(model.parameters())
    loss = model(batch()).square().sum()
    torch.manual_seed(2)
    for fc in model.fcs:
        between(fc)
    now = held(model)
    found = torch.autograd.grad(loss, own, allow_unused=True)
    assert held(model) == now
    return found


def nothing(fc):
    pass


def remove(fc):
    parametrize.remove_parametrizations(fc, "weight")


CHANGES = {
    "weight norm": (nothing, parametrizations.weight_norm),
    "weight norm by a hook": (nothing, weight_norm_by_hook),
    "spectral norm by a hook": (nothing, spectral_norm_by_hook),
    "no weight norm by a hook": (weight_norm_by_hook, remove_weight_norm),
    "no spectral norm by a hook": (spectral_norm_by_hook, remove_spectral_norm),
    "no weight norm": (parametrizations.weight_norm, remove),
    "nothing": (nothing, nothing),
}


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated:FutureWarning")
def test_gradients_are_those_of_the_parametrization_of_the_forward_pass(change, capture):
    before, between = CHANGES[change]
    expected = gradients(Plain(), before, between)
    net = mfx.momentumize(Plain(), gamma=0.0, capture=capture)
    if change == "no weight norm" and capture == "symbolic":  # which calls the layer, whose class has lost its property
        with pytest.raises(mfx.MfxError, match=r"the parametrization of weight in a Linear was removed between"):
            gradients(net, before, between)
        return
    found = gradients(net, before, between)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("capture", ["dynamo", "symbolic"])
@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_a_parametrization_that_writes_the_weight_is_an_error_as_without_mfx(kind, capture):
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(Plain(), nothing, kind)
    with pytest.raises(mfx.MfxError, match=r"weight was changed between forward and backward"):
        gradients(mfx.momentumize(Plain(), gamma=0.0, capture=capture), nothing, kind)


def weights_of_the_moment(model, kind):
    """Gradients of a loss whose weights are gone at the backward pass."""
    own = dict(model.named_parameters())
    if kind == "functional_call":
        loss = functional_call(model, {name: 0.9 * p for name, p in own.items()}, (batch(),)).square().sum()
    else:
        loss = model(batch()).square().sum()
        for fc in model.fcs:
            fc.weight = nn.Parameter(0.9 * fc.weight.detach())
    return torch.autograd.grad(loss, own.values())


@pytest.mark.parametrize("kind", ["functional_call", "replaced"])
@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_what_the_model_checkpoints_sees_the_weights_of_the_forward_pass(kind, arithmetic):
    expected = weights_of_the_moment(Plain(), kind)
    assert not all(map(torch.equal, weights_of_the_moment(Checkpointed(), kind), expected))  # torch's: of now
    net = mfx.momentumize(Checkpointed(), gamma=0.0, arithmetic=arithmetic)
    assert all(map(torch.equal, weights_of_the_moment(net, kind), expected))


class Normalized(Plain):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for fc, norm in zip(self.fcs, self.norms, strict=True):
            x = x + torch.tanh(norm(fc(x)))
        return x


def across_modes(model, *, moves):
    """Gradients of a call in evaluation; before its backward pass there may be a call in training."""
    model.eval()
    loss = model(batch()).square().sum()
    model.train()
    if moves:
        model(batch())
    return torch.autograd.grad(loss, list(model.parameters()))


def test_statistics_that_a_later_call_moves_are_an_error():
    expected = across_modes(Normalized(), moves=False)
    assert all(map(torch.equal, across_modes(mfx.momentumize(Normalized(), gamma=0.0), moves=False), expected))
    moved = across_modes(Normalized(), moves=True)
    assert not all(map(torch.equal, moved, expected))  # torch's own: of the later statistics, unsaid
    with pytest.raises(mfx.MfxError, match=r"norms\.2\.num_batches_tracked was changed between forward and backward"):
        across_modes(mfx.momentumize(Normalized(), gamma=0.0), moves=True)


def switches():
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.mkldnn.deterministic,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
    )


AT_FIRST = switches()


class Asks(nn.Module):
    """Computes something else under other switches of the process."""

    def forward(self, x):
        return x * (2.0 if switches() == AT_FIRST else 3.0) * torch.full((WIDTH,), 1 / 3)


SWITCHES = {
    "default dtype": lambda on: torch.set_default_dtype(torch.float64 if on else torch.float32),
    "deterministic": lambda on: torch.use_deterministic_algorithms(on, warn_only=True),
    "kernels of attention": lambda on: torch.backends.cuda.enable_flash_sdp(not on),
    "a backend": lambda on: setattr(torch.backends.cudnn, "deterministic", on),
    "another backend": lambda on: setattr(torch.backends.mkldnn, "deterministic", on),
    "precision": lambda on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "none"),
    "reductions": lambda on: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", not on),
}


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.9}, {"gamma": 0.9, "arithmetic": "float"}])
@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_switches_of_the_process_are_those_of_the_forward_pass(switch, options):
    def gradients(is_switched, **budget):
        model = Plain()
        model.fcs = nn.ModuleList(nn.Sequential(fc, Asks()) for fc in [*model.fcs] * 4)
        net = mfx.momentumize(model, **options, **budget)
        try:
            loss = net(batch()).square().sum()
            switch(is_switched)
            left = switches()
            loss.backward()
            assert switches() == left
        finally:
            switch(False)
        return [p.grad for p in net.parameters()]

    found, expected = gradients(is_switched=True), gradients(is_switched=False)
    assert all(map(torch.equal, found, expected))
    kept = gradients(is_switched=False, memory_budget=1.0)
    assert all(map(torch.allclose, expected, kept))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.into(x).unflatten(-1, (4, 12)).transpose(1, 2).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Attentions(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(8))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.9}, {"gamma": 0.9, "arithmetic": "float"}])
def test_the_backward_pass_may_lie_outside_of_the_context_that_chooses_kernels(options):
    torch.manual_seed(0)
    model = Attentions()
    net = mfx.momentumize(model, **options)
    x = torch.randn(2, 32, 16)

    def gradients(forward, *, inside):
        model.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            loss = forward(x).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return [p.grad for p in model.parameters()]

    reference = gradients(model if options["gamma"] == 0 else net, inside=True)
    for _ in range(2):
        assert all(map(torch.equal, gradients(net, inside=False), reference))


class OnMeta(nn.Module):
    def forward(self, x):
        return x * (2.0 if torch.get_default_device().type == "meta" else 3.0)


@pytest.mark.parametrize("options", [{"gamma": 0.0}, {"gamma": 0.9, "arithmetic": "float"}])
@pytest.mark.parametrize("first", ["meta", "cpu"])
def test_the_default_device_is_that_of_the_forward_pass(first, options):
    def gradients(second):
        model = Plain()
        model.fcs = nn.ModuleList(nn.Sequential(fc, OnMeta()) for fc in [*model.fcs] * 4)
        net, x = mfx.momentumize(model, **options), batch()
        net(x)
        with torch.device(first):
            loss = net(x).square().sum()
        with torch.device(second):
            loss.backward()
        return [p.grad for p in net.parameters()]

    assert all(map(torch.equal, gradients("cpu"), gradients("meta")))
