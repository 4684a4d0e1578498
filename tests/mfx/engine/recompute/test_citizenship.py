"""A recorded chain among torch's own tools: hooks, modes, engines; against ordinary backpropagation."""

import threading
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from mfx.modules import random_state
from mfx.modules.random_state import Generator
from mfx.modules.recomputing import recomputing
from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, error, gradients, make_root, make_steps, recurrence, run, weights_like

DEPTH = 13  # exact arithmetic keeps the inputs of shorter chains, instead of a tape
CASES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]
# 13 float64 steps: exact errs by fixed point, 2^-40 a step, float by eps·γ^-13; both far below.
CLOSE = 1e-8


@pytest.fixture(params=CASES, ids=str)
def how(request):
    arithmetic, gamma = request.param
    return {"arithmetic": arithmetic, "gamma": gamma}


def data():
    x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_()


def make(**kw):
    root = make_root(DEPTH).double()
    return root, make_steps(root, **kw), data()


def total(x):
    return (x.square() * weights_like(x)).sum()


def expected_gradients(root, steps, x, how, loss=total, *inputs):
    return gradients(loss(recurrence(root, steps, x, gamma=how["gamma"]).x), root, x, *inputs)


def test_post_accumulate_hooks_fire_once_each_from_the_last_step_to_the_first(how):
    """An optimiser inside backward: each parameter is changed, its gradient freed, before earlier steps are re-run."""
    root, steps, x = make()
    expected = expected_gradients(root, steps, x, how)
    events, found = [], {}

    def free(p):
        assert p not in found
        found[p] = p.grad
        p.grad = None

    for index, each in enumerate(root.blocks):
        each.register_forward_hook(lambda *_, i=index: events.append(("run", i)) if recomputing() else None)
        for p in each.parameters():
            p.register_post_accumulate_grad_hook(free)
        each[1].weight.register_post_accumulate_grad_hook(lambda _, i=index: events.append(("grad", i)))
    total(run(root, steps, x, **how).x).backward()
    assert error([x.grad, *(found[p] for p in root.parameters())], expected) < CLOSE
    assert events == [(what, i) for i in reversed(range(DEPTH)) for what in ("run", "grad")]


def descend(p):
    with torch.no_grad():
        p.sub_(0.01 * p.grad)


def test_an_optimizer_that_steps_inside_the_backward_pass(how):
    results = []
    for budget in (0.0, 1.0):
        root, steps, x = make()
        for p in root.parameters():
            p.register_post_accumulate_grad_hook(descend)
        for _ in range(2):
            total(run(root, steps, x, memory_budget=budget, **how).x).backward()
            root.zero_grad()
        results.append([p.detach() for p in root.parameters()])
    assert error(*results) < CLOSE


def test_tensor_hooks_see_the_gradients(how):
    root, steps, x = make()
    seen = []
    for each in (x, root.blocks[4][1].weight):
        each.register_hook(lambda g: seen.append(g) or 2 * g)
    found = gradients(total(run(root, steps, x, **how).x), root, x)
    expected = expected_gradients(root, steps, x, how)  # the hooks double these too
    assert error(found, expected) < CLOSE
    assert len(seen) == 4
    assert error(seen[:2], seen[2:]) < CLOSE


def test_a_parameter_used_inside_and_outside(how):
    root, steps, x = make()
    w, calls = root.blocks[3][1].weight, []
    w.register_post_accumulate_grad_hook(lambda p: calls.append(p))

    def loss(y):
        return total(y) + (y @ w.t()).sum()

    expected = expected_gradients(root, steps, x, how, loss)
    loss(run(root, steps, x @ torch.eye(WIDTH, dtype=x.dtype), **how).x).backward()
    assert error([x.grad, *(p.grad for p in root.parameters())], expected) < CLOSE
    assert len(calls) == 1


def test_gradients_of_a_few_parameters_only(how):
    root, steps, x = make()
    wanted = [root.blocks[7][1].weight, root.blocks[2][4].bias if len(root.blocks[2]) > 4 else root.blocks[2][1].bias]
    found = torch.autograd.grad(total(run(root, steps, x, **how).x), wanted)
    expected = torch.autograd.grad(total(recurrence(root, steps, x, gamma=how["gamma"]).x), wanted)
    assert error(found, expected) < CLOSE
    total(run(root, steps, x, **how).x).backward(inputs=wanted)
    assert error([p.grad for p in wanted], expected) < CLOSE
    assert sum(p.grad is not None for p in root.parameters()) == 2


def test_low_rank_corrections_of_frozen_weights(how):
    class LoRA(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
            self.unused = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return self.base(x).tanh() + self.up(self.down(x))

    root = make_root(DEPTH, LoRA).double()
    root.blocks[5].requires_grad_(False)
    steps = make_steps(root)
    found, expected = (
        gradients(total(y.x), root)
        for y in (
            run(root, steps, data().detach(), **how),
            recurrence(root, steps, data().detach(), gamma=how["gamma"]),
        )
    )
    assert error(found, expected) < CLOSE
    total(run(root, steps, data().detach(), **how).x).backward()
    assert all(each.unused.grad is None and each.base.weight.grad is None for each in root.blocks)


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode(how):
    root, steps, x = make()
    expected = expected_gradients(root, steps, x, how)
    with torch.autograd.detect_anomaly():
        assert error(gradients(total(run(root, steps, x, **how).x), root, x), expected) < CLOSE
        root, steps, x = make(call=lambda f, x: f(x) * x.detach().mul(0).sqrt().pow(1) / (x - x.detach()).sqrt())
        with pytest.raises(RuntimeError, match="returned nan values"):
            run(root, steps, x, **how).x.nansum().backward()


@pytest.mark.parametrize("inside", [False, True])
def test_save_on_cpu(how, inside):
    def call(f, x):
        with save_on_cpu():
            return f(x)

    root, steps, x = make(call=call if inside else None)
    expected = expected_gradients(root, steps, x, how)
    with save_on_cpu():
        loss = total(run(root, steps, x, **how).x)
    assert error(gradients(loss, root, x), expected) < CLOSE


def test_hooks_around_see_what_is_kept_and_nothing_of_the_branches(how):
    """Someone else's hooks (offloading, compression) get the end state or the inputs, and give them back."""
    packed, unpacked = [], []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    def unpack(t):
        unpacked.append(t.shape)
        return t

    root, steps, x = make()
    expected = expected_gradients(root, steps, x, how)
    with saved_tensors_hooks(pack, unpack):
        y = run(root, steps, x, **how).x
    assert all(shape[-1] <= WIDTH for shape in packed)
    assert len(packed) <= DEPTH + 4
    assert error(gradients(total(y), root, x), expected) < CLOSE
    assert unpacked


def test_flops_are_those_of_three_forward_passes_and_one(how):
    root, steps, x = make()
    counts = []
    for budget in (1.0, 0.0):
        with FlopCounterMode(display=False) as counter:
            total(run(root, steps, x, memory_budget=budget, **how).x).backward()
        counts.append(counter.get_total_flops())
    # A second run whose value is not asked for leaves out the last product, half of the block's.
    without_end = {("exact", 0.9): 0, ("float", 0.9): 1, ("exact", 0.0): DEPTH}[how["arithmetic"], how["gamma"]]
    assert counts[1] * 6 * DEPTH == counts[0] * (8 * DEPTH - without_end)


def test_inference_mode_and_no_grad_run_every_branch_once(how):
    root, steps, x = make()
    expected = recurrence(root, steps, x, gamma=how["gamma"]).x.detach()
    for context in (torch.no_grad, torch.inference_mode):
        root.runs = [0] * DEPTH
        with context():
            y = run(root, steps, x, **how).x
        assert root.runs == [1] * DEPTH
        assert y.is_inference() == (context is torch.inference_mode)
        assert error([y.clone()], [expected]) < CLOSE
    total(run(root, steps, x, **how).x).backward()


def test_backward_in_another_thread(how):
    root, steps, x = make()
    expected = expected_gradients(root, steps, x, how)
    loss = total(run(root, steps, x, **how).x)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert error([x.grad, *(p.grad for p in root.parameters())], expected) < CLOSE


def test_two_threads_train_on_the_same_weights(how):
    """One cache, two calls at once, as some evaluation loops do."""
    root, steps, _ = make()
    cache, found = {}, [None, None]
    xs = [data(), data().detach().mul(2).requires_grad_()]

    def work(i):
        for _ in range(3):
            found[i] = torch.autograd.grad(total(run(root, steps, xs[i], cache=cache, **how).x), xs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [torch.autograd.grad(total(recurrence(root, steps, x, gamma=how["gamma"]).x), x)[0] for x in xs]
    assert error(found, expected) < CLOSE


def test_backward_inside_a_hook_of_another_backward(how):
    """Engines nest: each pass has its own walk."""
    root, steps, x = make()
    expected = expected_gradients(root, steps, x, how)
    other = total(run(root, steps, x, **how).x)
    inner = []
    loss_tensor = run(root, steps, x, **how).x
    root.blocks[6][1].weight.register_hook(
        lambda g: inner.append(torch.autograd.grad(other, x, retain_graph=True)[0]) if not inner else None
    )
    assert error(gradients(total(loss_tensor), root, x), expected) < CLOSE
    assert error(inner, expected[:1]) < CLOSE


def test_the_same_graph_walked_inside_a_hook_of_its_own_walk(how):
    root, steps, x = make()
    expected = expected_gradients(root, steps, x, how)
    loss = total(run(root, steps, x, **how).x)
    inner = []
    root.blocks[6][1].weight.register_hook(
        lambda g: inner.append(torch.autograd.grad(loss, x, retain_graph=True)[0]) if not inner else None
    )
    assert error(gradients(loss, root, x, retain_graph=True), expected) < CLOSE
    assert error(inner, expected[:1]) < CLOSE


@pytest.mark.parametrize("what", ["input", "tap", "output", "output without taps"])
def test_a_tensor_of_the_stream_modified_in_place(how, what):
    """A copy is kept of some, and then it does not matter; of the others an error says which step still needs them."""
    root, steps, x = make()
    entry = x * 1
    out = run(root, steps, entry, taps=() if "without" in what else (4,), **how)
    loss = out.x.sum() + sum(tap.sum() for tap in out.taps)
    expected = gradients(loss, root, x, retain_graph=True)
    with torch.no_grad():
        {"input": entry, "tap": out.taps[0] if out.taps else None}.get(what, out.x).add_(1)
    needed = {"input": "input of step blocks.0", "tap": "input of step blocks.4"}.get(what)
    if how["gamma"]:
        kept = how["arithmetic"] == "float" and "output" in what
        needed = "stream after step blocks.12" if kept else None
    if needed is None:
        assert all(map(torch.equal, gradients(loss, root, x), expected))
        return
    with pytest.raises(MfxError, match=rf"blocks: the {needed} was modified in place between"):
        gradients(loss, root, x)


def test_a_saved_tensor_changed_in_place_by_its_own_branch(how):
    def changes(f, x):
        y = f(x).exp()  # saves y
        return torch.tanh(y.mul_(2))

    root = make_root(3)
    x = torch.randn(4, WIDTH, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changes(root.blocks[0], x).sum().backward()
    with pytest.raises(MfxError, match="changes in place a tensor of shape \\(4, 6\\) that its backward pass needs"):
        run(root, make_steps(root, call=changes), x, **how).x.sum().backward()


def test_a_shape_that_changes_between_the_runs_names_its_step(how):
    sizes = {"rows": 3}
    root, steps, x = make(call=lambda f, x: f(x[: sizes["rows"]]).mean(0, keepdim=True).expand(3, -1))
    loss = total(run(root, steps, x, **how).x)
    sizes["rows"] = 2
    with pytest.raises(
        MfxError, match=r"blocks, step blocks\.12: the recomputation of this step.* saved a tensor of shape"
    ):
        loss.backward()


def test_after_an_error_in_a_second_run_the_graph_works_again(how):
    fail = []

    def call(f, x):
        if fail and recomputing():
            raise ValueError("no luck")
        return f(x)

    root, steps, x = make(call=call)
    expected = expected_gradients(root, steps, x, how)
    loss = total(run(root, steps, x, **how).x)
    fail.append(1)
    with pytest.raises(ValueError, match="no luck"):
        loss.backward(retain_graph=True)
    assert not recomputing()
    fail.clear()
    root.zero_grad()
    assert error(gradients(loss, root, x), expected) < CLOSE


def test_random_states_are_kept_for_branches_that_drew_only(how, monkeypatch):
    root, steps, x = make()
    for index in (2, 9):
        root.blocks[index].append(nn.Dropout(0.5))
    states, read = [], torch.get_rng_state

    def reading():
        state = read()
        states.append(weakref.ref(state))
        return state

    clock = [Generator("one without a sign", reading, torch.set_rng_state)]
    monkeypatch.setattr(random_state, "_global_generators_of", lambda kinds, has_numpy: clock)
    y = run(root, steps, x, **how).x
    alive = [index for index, state in enumerate(states) if state() is not None]
    # One reading before the first step, one after every step; a reading that finds no change is dropped. Steps 2 and 9
    # drew: kept are the state at the start, that after step 2 (which is the one before step 9), and that after step 9.
    assert alive == [0, 3, 10]
    y.sum().backward()
