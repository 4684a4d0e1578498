"""torch.compile(model, backend="mfx"): chains of several streams, against the recurrence by hand and the model."""

import pytest
import torch

import mfx
from mfx.compiler.backend import momentum
from tests.oracles import assert_close_grads
from tests.passes.cases import example, make
from tests.passes.stream_cases import CASES
from tests.sampling import grid

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
NAMES = ["JointAttention", "SelfAndCross", "CoAttention", "ThreeStreams", "TappedStreams", "PostNormStreams"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, inner="eager", **options):
    return torch.compile(model, backend=momentum, fullgraph=True, options={"inner": inner, **options})


def outputs_of(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def step(function, model, inputs):
    """Outputs and gradients of inputs and parameters, of a loss on which every output has a say of its own."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    outputs = outputs_of(function(*inputs))
    loss = sum((i * x.square()).sum() for i, x in enumerate(outputs, 1))
    wanted = [*inputs, *model.parameters()]
    return outputs, torch.autograd.grad(loss, wanted, allow_unused=True)


def assert_equal(found, expected):
    for some, others in zip(found, expected, strict=True):
        assert len(some) == len(others)
        for a, b in zip(some, others, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_gamma_zero_is_the_model(name):
    model, inputs = make(CASES[name]), example(CASES[name])
    found, expected = step(compiled(model, gamma=0.0), model, inputs), step(model, model, inputs)
    assert_equal(found[:1], expected[:1])
    grads, plain = ({str(i): grad for i, grad in enumerate(each[1])} for each in (found, expected))
    # At most 2^4 terms in another order, in at most 2^5 layers; a key's bias has a gradient of 0 but for rounding, so
    # errors are those relative to the largest gradient.
    assert_close_grads(grads, plain, 2**4 * 2**5 / 2 * torch.finfo(torch.float64).eps, noise=1.0)


@grid(len(NAMES), name=NAMES, inner=["eager", "aot_eager"])
def test_momentum_is_the_recurrence_by_hand(name, inner):
    model, inputs = make(CASES[name]), example(CASES[name])
    outputs, _ = step(compiled(model, inner, gamma=0.75), model, inputs)
    for a, b in zip(outputs, outputs_of(model.by_hand(0.75, *inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # exact states have 40 fraction bits


@pytest.mark.parametrize("name", NAMES)
def test_the_chains_and_their_gradients_are_those_of_momentumize(name):
    model, inputs = make(CASES[name]), example(CASES[name])
    by_backend, net = compiled(model, gamma=0.75), mfx.momentumize(model, gamma=0.75)
    assert_equal(step(by_backend, model, inputs), step(net, model, inputs))
    chains = [
        sorted((len(chain.steps), len(chain.updates), len(chain.streams)) for chain in mfx.explain(each).chains)
        for each in (by_backend, net)
    ]
    assert chains[0] == chains[1]
    assert any(count > 1 for _, _, count in chains[0])
