"""torch.func transforms and forward-mode differentiation, against the recurrence by ordinary autograd."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, make_root, make_steps, recurrence, run, weights_like

pytestmark = pytest.mark.filterwarnings(
    "ignore:mfx. chain blocks. inside torch.func transforms:UserWarning",
    "ignore:.torch.jit.script. is:Warning",  # torch's own forward-mode formulas use it
)

DEPTH = 9


class Chain(nn.Module):
    """A chain as a module, by one way of running it or another."""

    def __init__(self, root, how):
        super().__init__()
        self.root, self.how = root, how

    def forward(self, x):
        return self.how(self.root, make_steps(self.root), x).x


def make(**kw):
    root = make_root(DEPTH).double()
    gamma = kw["gamma"]
    return Chain(root, lambda *args: run(*args, **kw)), Chain(root, lambda *args: recurrence(*args, gamma=gamma))


CASES = [("exact", 0.9, 0.0), ("exact", 0.9, 1.0), ("float", 0.9, 0.0), ("exact", 0.0, 0.0)]


@pytest.fixture(params=CASES, ids=str)
def pair(request):
    arithmetic, gamma, budget = request.param
    return make(arithmetic=arithmetic, gamma=gamma, memory_budget=budget)


def loss(net, parameters, x):
    y = functional_call(net, parameters, (x,))
    return (y.square() * weights_like(y)).sum()


X = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TRANSFORMS = {
    "grad of parameters": lambda net, p: grad(lambda p: loss(net, p, X))(p),
    "grad of inputs": lambda net, p: grad(lambda x: loss(net, p, x))(X),
    "gradients per sample": lambda net, p: vmap(grad(lambda p, x: loss(net, p, x)), (None, 0))(p, X),
    "vmap": lambda net, p: vmap(lambda x: functional_call(net, p, (x,)))(X),
    "vmap over the module's own parameters": lambda net, p: vmap(net)(X),
    "ensemble": lambda net, p: vmap(lambda p: loss(net, p, X))({k: torch.stack([v, 2 * v]) for k, v in p.items()}),
    "jvp": lambda net, p: jvp(lambda x: functional_call(net, p, (x,)), (X,), (X.cos(),)),
    "vjp": lambda net, p: vjp(lambda x: functional_call(net, p, (x,)), X)[1](X.cos()),
    "jacrev": lambda net, p: jacrev(lambda x: functional_call(net, p, (x,)))(X[:1]),
    "hessian": lambda net, p: hessian(lambda x: loss(net, p, x))(X[:1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(pair, transform):
    net, plain = pair
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found, expected = transform(net, parameters), transform(plain, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_forward_mode(pair):
    results = []
    for net in pair:
        with forward_ad.dual_level():
            results.append(forward_ad.unpack_dual(net(forward_ad.make_dual(X, X.cos()))))
    torch.testing.assert_close(results[0].primal, results[1].primal, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[0].tangent, results[1].tangent, rtol=1e-9, atol=1e-11)


def test_afterwards_activations_are_left_out_again():
    net, _ = make(arithmetic="exact", gamma=0.9, memory_budget=0.0)
    grad(lambda x: net(x).sum())(X)
    net.root.runs = [0] * DEPTH
    net(X).sum().backward()
    assert net.root.runs == [2] * DEPTH


@pytest.mark.filterwarnings("error")
def test_one_warning_that_activations_are_kept():
    root, cache = make_root(3), {}

    def call(x, budget):
        return run(root, make_steps(root), x, cache=cache, memory_budget=budget).x.sum()

    x = X.float()
    vmap(grad(lambda x: call(x, 1.0)))(x)
    with pytest.warns(UserWarning, match=r"inside torch.func transforms .* nothing is rebuilt"):
        grad(lambda x: call(x, 0.0))(x)
    grad(lambda x: call(x, 0.0))(x)


@pytest.mark.parametrize("gamma", [0.9, 0.0])
def test_transforms_inside_a_branch(gamma):
    def force(f, x):
        return 0.1 * grad(lambda x: f(x).square().sum())(x)

    root = make_root(DEPTH).double()
    steps = make_steps(root, call=force)
    x = X.clone().requires_grad_()
    with pytest.raises(MfxError, match=r"blocks, step blocks\.0: this step uses a transform of torch.func.*budget=1.0"):
        run(root, steps, x, gamma=gamma)
    found, expected = (
        torch.autograd.grad(out.x.sum(), x)[0]
        for out in (run(root, steps, x, gamma=gamma, memory_budget=1.0), recurrence(root, steps, x, gamma=gamma))
    )
    # fixed point rounds states to 2^-41, nine times
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_errors_of_a_branch_itself_pass_unchanged():
    def fail(f, x):
        raise RuntimeError("mine")

    root = make_root(3)
    with pytest.raises(RuntimeError, match="mine"):
        run(root, make_steps(root, call=fail), torch.randn(2, WIDTH))
