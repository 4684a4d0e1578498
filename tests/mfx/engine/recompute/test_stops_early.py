"""A recomputation whose value is not needed stops early, after the last saved tensor of the forward pass."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mfx
from mfx.modules.recomputing import recomputing
from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, block, gradients, make_root, make_steps, run, weights_like
from tests.mfx.models import counting

# γ = 0, verified and not, and a chain so short that its inputs are kept.
CASES = {
    "exact": {"gamma": 0.0},
    "float": {"gamma": 0.0, "arithmetic": "float"},
    "unverified": {"gamma": 0.0, "verify": "off"},
    "short": {"gamma": 0.9},
}
DEPTH = 3


@pytest.fixture(params=CASES)
def how(request):
    return CASES[request.param]


def data():
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def train(how, build=block, call=None, **kw):
    """Gradients, buffers and the random state after a training step, and the root."""
    root = make_root(DEPTH, build)
    steps, x = make_steps(root, call=call), data()
    torch.manual_seed(2)
    y = run(root, steps, x, **how, **kw).x
    found = gradients((y * weights_like(y)).sum(), root, x)
    return [*found, *root.buffers(), torch.get_rng_state()], root


def assert_as_kept(how, build=block, call=None):
    """Assert that a training step leaves what it leaves without recomputation, bit for bit."""
    found, root = train(how, build, call)
    expected, _ = train(how, build, call, memory_budget=1.0)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    return root


def flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_flops_are_those_of_checkpoint(how):
    root, x = make_root(DEPTH), data()

    def checkpointed():
        y = x
        for each in root.blocks:
            y = y + checkpoint(each, y, use_reentrant=False)
        y.sum().backward()

    steps = make_steps(root)
    plain = flops(lambda: run(root, steps, x, memory_budget=1.0, **how).x.sum().backward())
    found = flops(lambda: run(root, steps, x, **how).x.sum().backward())
    assert found == flops(checkpointed) < plain * 4 / 3


def test_the_first_step_of_a_walk_stops_early_unless_the_end_of_the_walk_is_verified():
    root, x = make_root(13), data()
    steps, last = make_steps(root), 2 * x.shape[0] * 2 * WIDTH * WIDTH
    plain = flops(lambda: run(root, steps, x, memory_budget=1.0).x.sum().backward())
    for how, spared in (({}, 0), ({"verify": "off"}, last), ({"arithmetic": "float"}, last)):
        found = flops(lambda how=how: run(root, steps, x, **how).x.sum().backward())
        assert 3 * (found + spared) == 4 * plain


def ends_in_dropout():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))


def ends_in_norm():
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))


def ends_in_tanh():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())


def ends_in_noise():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RReLU())


BUILDS = [ends_in_dropout, ends_in_norm, ends_in_tanh, ends_in_noise, lambda: nn.Linear(WIDTH, WIDTH)]


@pytest.mark.parametrize("build", BUILDS)
def test_gradients_buffers_and_random_numbers(how, build):
    assert_as_kept(how, build)


def test_autocast(how):
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_kept(how)
    assert not torch.is_autocast_enabled("cpu")


def test_an_end_that_draws_and_writes_into_buffers(how):
    """Effects of code after the last saved tensor are those of one run."""

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            y = self.fc(x)
            self.calls += 1
            return y + torch.rand(())

    root = assert_as_kept(how, Noted)
    assert [int(each.calls) for each in root.blocks] == [1] * DEPTH


@pytest.mark.parametrize("raises", [False, True])
def test_a_branch_that_catches_all_errors(how, raises):
    def call(f, x):
        try:
            return f(x)
        except Exception as error:
            if raises:
                raise ValueError("what else?") from error
            return f(x) * 2

    assert_as_kept(how, call=call)


def test_what_a_branch_has_to_clean_up_is_cleaned_up(how):
    events = []

    def call(f, x):
        events.append("begin")
        try:
            return f(x)
        finally:
            events.append("end")

    assert_as_kept(how, call=call)
    assert events == ["begin", "end"] * 3 * DEPTH


def test_a_backward_pass_inside_the_branch_is_not_broken_off(how):
    def call(f, x):
        if not x.requires_grad:
            x.requires_grad_()
        return torch.autograd.grad(f(x).pow(2).sum(), x, create_graph=True)[0]

    assert_as_kept(how, call=call)


def test_a_checkpoint_inside_the_branch(how):
    assert_as_kept(how, ends_in_dropout, lambda f, x: checkpoint(f, x, use_reentrant=False))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_chain_inside_the_branch(how, gamma):
    inner = make_root(DEPTH)

    def call(f, x):
        return run(inner, make_steps(inner), f(x), gamma=gamma).x

    assert_as_kept(how, call=call)


def test_side_outputs_have_their_gradients(how):
    def step(**kw):
        root, x = make_root(DEPTH), data()
        out = run(root, make_steps(root, call=lambda f, x: (f(x), f[0](x).exp(), x.shape[0])), x, **how, **kw)
        sides = [side[0] for side in out.sides]
        return gradients(out.x.sum() + sum(side.square().sum() for side in sides), root, x)

    assert all(map(torch.equal, step(), step(memory_budget=1.0)))


def test_retained_graphs_and_second_derivatives(how):
    root, x = make_root(DEPTH), data()
    steps = make_steps(root)

    def second(**kw):
        y = run(root, steps, x, **how, **kw).x
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return [first.detach(), *gradients(first.square().sum(), root, x)]

    assert all(map(torch.equal, second(), second(memory_budget=1.0)))


def test_a_step_with_forward_hooks_runs_to_its_end(how):
    root, x = make_root(DEPTH), data()
    with counting(root.blocks[1][-1]) as calls, counting(root.blocks[0]) as others:
        run(root, make_steps(root), x, **how).x.sum().backward()
    assert calls == others == [False, True]


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_other_values_are_noticed_where_they_matter(gamma):
    root, x = make_root(DEPTH), data()
    steps = make_steps(root, call=lambda f, x: f(x * (1 + 1e-6 * recomputing())))
    with pytest.raises(MfxError, match=r"step blocks\.2: the recomputation.* did not compute the values"):
        run(root, steps, x, gamma=gamma).x.sum().backward()


def test_other_values_after_the_last_saved_tensor_do_no_harm(how):
    root, x = make_root(DEPTH), data()
    results = []
    for wrong in (0, 1):
        steps = make_steps(root, call=lambda f, x, wrong=wrong: f(x) * (1 + wrong * recomputing()))
        results.append(gradients(run(root, steps, x, **how).x.sum(), root, x))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("view", [torch.Tensor.clone, torch.t, lambda x: x[::2]], ids=["none", "t", "slice"])
def test_without_a_witness_the_values_are_compared(view):
    """Nothing that the branch computes and saves is as large as its input: it runs to its end, and that is looked at.

    What the branch reads is not computed by it, a view neither.
    """
    x = view(data() * 1)

    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Linear(x.shape[-1], 2), nn.Linear(2, x.shape[-1])

        def forward(self, x):
            return self.up(self.down(x)) * (1 + recomputing())

    root = make_root(1, Low)
    with pytest.raises(MfxError, match="did not compute the values of the forward"):
        run(root, make_steps(root), x, gamma=0.0).x.sum().backward()


MASKS = {
    "numbers": lambda x, generator: torch.rand(x.shape, generator=generator),
    "bool": lambda x, generator: torch.rand(x.shape, generator=generator) > 0.5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_mask_drawn_anew_is_noticed(mask, gamma):
    """It needs no gradient, and is the last thing that is saved: the value is never formed again."""
    root, x, generator = make_root(DEPTH), data(), torch.Generator().manual_seed(1)
    steps = make_steps(root, call=lambda f, x: f(x) * mask(x, generator))
    with pytest.raises(MfxError, match="did not compute the values of the forward"):
        run(root, steps, x, gamma=gamma).x.sum().backward()


def test_a_run_that_saves_less_is_noticed(how):
    root, x = make_root(DEPTH), data()
    steps = make_steps(root, call=lambda f, x: f[0](x) if recomputing() else f(x))
    with pytest.raises(MfxError, match=r"the recomputation of this step.* in the forward pass"):
        run(root, steps, x, **how).x.sum().backward()


def test_nothing_outlives_the_backward_pass(how):
    """The exception that ends a run would keep everything alive that it passes, were there a cycle."""
    root, x = make_root(DEPTH), data()
    steps = make_steps(root)
    run(root, steps, x, **how).x.sum().backward()
    gc.collect()
    gc.disable()
    try:
        with mfx.ActivationMeter(exclude=[x, *root.parameters()]) as meter:
            run(root, steps, x, **how).x.sum().backward()
        assert meter.live == 0
    finally:
        gc.enable()
