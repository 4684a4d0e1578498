"""Random numbers: the second run draws what the first drew, and leaves the generators where one forward pass does."""
# ruff: noqa: NPY002  (the generator that users' code draws from)

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, make_root, make_steps, run, weights_like

DEPTH = 13  # exact arithmetic keeps the inputs of shorter chains, instead of a tape
CASES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


@pytest.fixture(params=CASES, ids=str)
def how(request):
    arithmetic, gamma = request.param
    return {"arithmetic": arithmetic, "gamma": gamma}


def attention(f, x):
    q = f(x).view(1, 2, -1, WIDTH // 2)
    return F.scaled_dot_product_attention(q, q, x.view_as(q), dropout_p=0.5).reshape(x.shape)


def seeded_inside(f, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        mask = torch.rand_like(x)
    return f(x) * mask * torch.rand_like(x)


DRAWS = {
    "dropout": lambda f, x: F.dropout(f(x), 0.5),
    "dropout in place": lambda f, x: F.dropout(f(x), 0.5, inplace=True),
    "feature dropout": lambda f, x: F.dropout1d(f(x)[None], 0.5)[0],
    "alpha dropout": lambda f, x: F.alpha_dropout(f(x), 0.5, training=True),
    "stochastic depth": lambda f, x: f(x) * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5) * 2,
    "whole steps left out": lambda f, x: f(x) if torch.rand(()) < 0.7 else x * 0,
    "attention dropout": attention,
    "noise": lambda f, x: f(x) + 0.1 * torch.randn_like(x),
    "permutation": lambda f, x: f(x[torch.randperm(len(x))]),
    "gumbel": lambda f, x: f(x) * F.gumbel_softmax(x, tau=1.0),
    "random ReLU": lambda f, x: F.rrelu(f(x), training=True),
    "multinomial": lambda f, x: f(x) * torch.multinomial(x.detach().softmax(-1), 1),
    "seeded inside": seeded_inside,
    "Python": lambda f, x: f(x * random.random()),
    "Python's Gaussian, of which each second one is a spare": lambda f, x: f(x * random.gauss(0, 1)),
    "as many of Python's as its generator has words": lambda f, x: f(x * [random.random() for _ in range(312)][-1]),
    "numpy": lambda f, x: f(x * float(np.random.rand())),
    "numpy's Gaussian, of which each second one is a spare": lambda f, x: f(x * float(np.random.randn())),
    "as many of numpy's as its generator has words": lambda f, x: f(x * float(np.random.rand(312)[-1])),
    "all three": lambda f, x: F.dropout(f(x * random.random() * float(np.random.rand())), 0.5),
}


def generators():
    """Return the states of the three generators in one tensor."""
    _, words, position, has_spare, spare = np.random.get_state()
    _, numbers, python_spare = random.getstate()
    return torch.tensor(
        [*torch.get_rng_state().tolist(), *words.tolist(), position, has_spare, spare, *numbers, python_spare or 0],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("call", DRAWS.values(), ids=DRAWS)
def test_masks_and_generators(call, how):
    results = []
    for budget in (0.0, 1.0):
        root = make_root(DEPTH).double()
        x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        states = []
        for _ in range(2):
            y = run(root, make_steps(root, call=call), x, memory_budget=budget, **how).x
            states.append(generators())
            (y * weights_like(y)).sum().backward()
            states.append(generators())
        grads = (torch.zeros_like(p) if p.grad is None else p.grad for p in root.parameters())
        results.append([y.detach(), x.grad, *grads])
        assert torch.equal(states[0], states[1])
        assert torch.equal(states[2], states[3])
        assert not torch.equal(states[1], states[2])
        results[-1].extend(states)
    for found, expected in zip(*results, strict=True):
        if how["arithmetic"] == "exact" or not found.is_floating_point():
            assert torch.equal(found, expected)
        else:
            # float64: rebuilt inputs err by eps·γ^-13
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_draws_between_forward_and_backward_do_not_matter(how):
    results = []
    for between in (False, True):
        root, x = make_root(DEPTH), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        loss = run(root, make_steps(root, call=DRAWS["dropout"]), x, **how).x.sum()
        after = torch.get_rng_state()
        if between:
            torch.rand(7)
            after = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), after)
        results.append([p.grad for p in root.parameters()])
    assert all(map(torch.equal, *results))


def test_retained_graph_draws_the_same_masks_again(how):
    root, x = make_root(DEPTH), torch.randn(4, WIDTH)
    loss = run(root, make_steps(root, call=DRAWS["dropout"]), x, **how).x.sum()
    parameters = list(root.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.rand(3)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(how, reentrant):
    results = []
    for wrap in (False, True):
        root, x = make_root(DEPTH), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        steps = make_steps(root, call=DRAWS["dropout"])
        torch.manual_seed(3)
        inner = lambda x: run(root, steps, x, **how).x  # noqa: B023, E731
        y = checkpoint(inner, x, use_reentrant=reentrant) if wrap else inner(x)
        y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in root.parameters())])
    if reentrant and how["gamma"]:
        # Its first pass is without gradients, by the plain recurrence: two roundings to float32 in each step, which are
        # in the loss's gradient 2y from the start. Steps and the loss do not enlarge that much: ten times.
        rounded = 2 * DEPTH * torch.finfo(torch.float32).eps
        for found, expected in zip(*results, strict=True):
            assert (found - expected).abs().max() <= 10 * rounded * expected.abs().max()
    else:
        assert all(map(torch.equal, *results))


class Noisy(torch.nn.Linear):
    """Scales its input by a number from a generator that it holds, or that a list of its holds."""

    def __init__(self, held):
        super().__init__(WIDTH, WIDTH)
        self.held = held

    def forward(self, x):
        generator = self.held[0] if isinstance(self.held, list) else self.held
        if isinstance(generator, torch.Generator):
            return super().forward(x * torch.rand((), generator=generator))
        return super().forward(x * float(generator.rand() if hasattr(generator, "rand") else generator.random()))


GENERATORS = {
    "random.Random": random.Random,
    "numpy.random.Generator": np.random.default_rng,
    "numpy.random.RandomState": np.random.RandomState,
    "torch.Generator": lambda seed: torch.Generator().manual_seed(seed),
}


@pytest.mark.parametrize("in_list", [False, True])
@pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)
def test_generators_that_modules_hold(make, in_list, how):
    if how["arithmetic"] == "float":
        return  # rebuilt inputs are not the forward's; the generators are handled alike
    results = []
    for budget in (0.0, 1.0):
        generator = make(5)
        root = make_root(DEPTH, lambda: Noisy([generator] if in_list else generator))  # noqa: B023
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = []
        for _ in range(2):
            outputs.append(run(root, make_steps(root), x, memory_budget=budget, **how).x)
            outputs[-1].sum().backward()
        results.append([*outputs, x.grad, *(p.grad for p in root.parameters())])
    assert all(map(torch.equal, *results))


def test_numbers_that_no_generator_gives_are_noticed(how):
    numbers = itertools.count(1)
    root, x = make_root(DEPTH), torch.randn(4, WIDTH)
    loss = run(root, make_steps(root, call=lambda f, x: f(x / next(numbers))), x, **how).x.sum()
    if how["arithmetic"] == "float" and how["gamma"]:
        return  # float arithmetic cannot tell
    with pytest.raises(MfxError, match=r"recomputation|did not lead back"):
        loss.backward()
