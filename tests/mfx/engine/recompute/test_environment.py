"""Recomputation is invisible: random numbers, buffers, flags, autocast; and the graph owns everything."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from mfx.engine.arithmetic.floating import predict
from mfx.modules.recomputing import recomputing
from mfx.options.gamma import Gamma
from mfx_passes.errors import MfxError
from tests.mfx.engine.chains import WIDTH, block, make_root, make_steps, run

CASES = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


@pytest.fixture(params=CASES, ids=str)
def how(request):
    arithmetic, gamma = request.param
    return {"arithmetic": arithmetic, "gamma": gamma}


def with_batch_norm():
    return nn.Sequential(block(WIDTH, nn.Dropout(0.3)), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2))


def train(root, how, budget, calls=2, cache=None):
    torch.manual_seed(1)
    x = torch.randn(5, WIDTH)
    for _ in range(calls):
        run(root, make_steps(root), x, memory_budget=budget, cache=cache, **how).x.pow(2).sum().backward()
    return {
        **root.state_dict(),
        **{f"{n}.grad": p.grad for n, p in root.named_parameters()},
        "rng": torch.get_rng_state(),
    }


CONDITION = 30
"""By how much an error in a rebuilt state grows on its way to a gradient: BatchNorm divides it by the spread of five
numbers, and the steps before see it again."""


def rebuilt_to(steps):
    """The error in the first state of a chain that was walked back in float32, relative to it."""
    return predict(Gamma.of(0.9), torch.float32, steps).error


@pytest.mark.parametrize("cache", [None, {}])
@pytest.mark.parametrize("shared", [False, True])
def test_dropout_and_batch_norm_leave_what_plain_training_leaves(how, shared, cache):
    root = make_root(10, with_batch_norm)
    if shared:
        root.blocks = nn.ModuleList([root.blocks[0]] * 10)
    other = copy.deepcopy(root)
    found, expected = train(root, how, 0.0, cache=cache), train(other, how, 1.0)
    assert found.keys() == expected.keys()
    scale = max(g.abs().max().item() for name, g in expected.items() if name.endswith("grad"))
    for name in found:
        if name.endswith("grad") and how["arithmetic"] == "float":
            # A bias before BatchNorm has no gradient but such noise.
            assert (found[name] - expected[name]).abs().max() <= CONDITION * rebuilt_to(10) * scale, name
        else:
            assert torch.equal(found[name], expected[name]), name


def test_eval_mode_and_flags_that_change_before_backward(how):
    root = make_root(10, with_batch_norm)
    x = torch.randn(5, WIDTH)
    loss = run(root, make_steps(root), x, **how).x.sum()
    root.eval()
    loss.backward()
    assert not any(m.training for m in root.modules())
    before = copy.deepcopy(root.state_dict())
    run(root, make_steps(root), x, **how).x.sum().backward()
    assert all(torch.equal(before[k], v) for k, v in root.state_dict().items())


class Counter(nn.Module):
    """Changes its buffers in every way there is; some only from the third call on."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(WIDTH))
        self.register_buffer("grown", torch.zeros(0))
        self.register_buffer("loose", torch.zeros(()), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.training:
            self.replaced = self.replaced + 1
            self.written.copy_(x.detach().mean(0))
            self.grown = torch.cat([self.grown, x.detach()[0, :1]])
            self.loose += 1
        return self.lin(x).tanh() * (1 + 0.1 * self.written + 0.1 * self.replaced + 0.1 * self.loose)


def test_buffers_changed_in_any_way(how):
    root = make_root(9, Counter)
    other = copy.deepcopy(root)
    found, expected = train(root, how, 0.0, cache={}), train(other, how, 1.0)
    assert found["blocks.0.replaced"] == 2
    assert len(found["blocks.0.grown"]) == 2
    scale = max(g.abs().max().item() for name, g in expected.items() if name.endswith("grad"))
    for name in found:
        if name.endswith("grad") and how["arithmetic"] == "float":
            assert (found[name] - expected[name]).abs().max() <= CONDITION * rebuilt_to(9) * scale, name
        else:
            assert torch.equal(found[name], expected[name]), name


def test_running_statistics_after_a_first_call_that_did_not_move_them(how):
    results = []
    for budget in (0.0, 1.0):
        root, cache = make_root(9, lambda: nn.BatchNorm1d(WIDTH)), {}
        for x in (torch.zeros(5, WIDTH), torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))):
            run(root, make_steps(root), x, memory_budget=budget, cache=cache, **how).x.square().sum().backward()
        results.append(root.state_dict())
    assert results[0]["blocks.0.running_mean"].any()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Late(nn.Module):
    """Begins to write into its buffer in its second call."""

    def __init__(self, replace):
        super().__init__()
        self.lin, self.replace, self.calls = nn.Linear(WIDTH, WIDTH), replace, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            if self.replace:
                self.seen = self.seen + 1
            else:
                self.seen += 1
        return self.lin(x) * (1 + self.seen)


def test_buffers_that_change_from_the_second_call_on(how):
    root, cache, x = make_root(9, lambda: Late(replace=True)), {}, torch.randn(5, WIDTH)
    for _ in range(3):
        run(root, make_steps(root), x, cache=cache, **how).x.sum().backward()
    assert all(block.seen == 2 for block in root.blocks)


def test_buffers_written_into_from_the_second_call_on(how):
    root, cache, x = make_root(9, lambda: Late(replace=False)), {}, torch.randn(5, WIDTH)

    def loss():
        return run(root, make_steps(root), x, cache=cache, **how).x.sum()

    loss().backward()
    with pytest.raises(MfxError, match=r"blocks\.8: this step wrote into blocks\.8\.seen, .* next call on it is kept"):
        loss().backward()
    loss().backward()
    assert all(block.seen == 2 for block in root.blocks)


def test_buffers_of_inference_mode(how):
    root = make_root(9)
    with torch.inference_mode():
        for each in root.blocks:
            each.register_buffer("table", torch.ones(WIDTH))
    run(root, make_steps(root, call=lambda f, x: f(x) + f.table), torch.randn(5, WIDTH), **how).x.sum().backward()


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(how, inside):
    root = make_root(10)
    dtypes = []
    root.blocks[3].register_forward_hook(lambda m, a, y: dtypes.append((y.dtype, recomputing())))
    results = []
    for budget in (0.0, 1.0):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(root, make_steps(root), x, memory_budget=budget, **how).x.float().pow(2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append([x.grad, *(p.grad.clone() for p in root.parameters())])
        root.zero_grad()
    assert dtypes == [(torch.bfloat16, False), (torch.bfloat16, True), (torch.bfloat16, False)]
    if how["arithmetic"] == "exact":
        assert all(map(torch.equal, *results))


def test_recomputing_is_false_outside(how):
    root = make_root(8)
    run(root, make_steps(root), torch.randn(2, WIDTH), **how).x.sum().backward()
    assert not recomputing()


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_tensors_changed_in_place_between_forward_and_backward(how, what):
    root = make_root(10, with_batch_norm).eval()
    loss = run(root, make_steps(root), torch.randn(5, WIDTH), **how).x.sum()
    with torch.no_grad():
        (root.blocks[4][0][1].bias if what == "parameter" else root.blocks[4][1].running_mean).add_(1)
    with pytest.raises(MfxError, match=r"blocks\.4\.\S+ was changed between"):
        loss.backward()


def test_captured_tensor_changed_in_place(how):
    root = make_root(10)
    c = torch.randn(5, WIDTH)
    steps = make_steps(root, call=lambda f, x, c: f(x) * c, captures=(0,))
    loss = run(root, steps, torch.randn(5, WIDTH), (c,), **how).x.sum()
    c.add_(1)
    with pytest.raises(MfxError, match="modified in place between the forward and the backward"):
        loss.backward()


@pytest.mark.parametrize("change", ["number", "shape"])
def test_second_run_that_saves_other_tensors(how, change):
    def call(f, x):
        if recomputing() and change == "number":
            return f[:2](x).sin()[..., :WIDTH]
        return f(x[:, :] if not recomputing() or change == "number" else x.repeat(2, 1))[:5]

    root = make_root(10)
    loss = run(root, make_steps(root, call=call), torch.randn(5, WIDTH), **how).x.sum()
    with pytest.raises(MfxError, match=r"blocks, step blocks\.9: the recomputation of this step"):
        loss.backward()


def test_second_run_with_other_values_is_noticed():
    root = make_root(10)
    steps = make_steps(root, call=lambda f, x: f(x) * (1 + 1e-6 * recomputing()))
    loss = run(root, steps, torch.randn(5, WIDTH)).x.sum()
    with pytest.raises(MfxError, match="did not lead back"):
        loss.backward()
    loss = run(root, steps, torch.randn(5, WIDTH), verify="warn").x.sum()
    with pytest.warns(UserWarning, match="did not lead back"):
        loss.backward()


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda f, x: f(x)[:1], r"shape \(1, 6\)"),
        (lambda f, x: f(x).double(), "float64"),
        (lambda f, x: f(x).int(), "int32"),
        (lambda f, x: 1.0, "a float"),
        (lambda f, x: f(x).to("meta"), "on meta"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_branch_values_that_do_not_fit(call, found, grad):
    root = make_root(3)
    with (
        pytest.raises(MfxError, match=rf"chain blocks, step blocks\.0: the branch gave a.*{found}|{found}"),
        torch.set_grad_enabled(grad),
    ):
        run(root, make_steps(root, call=call), torch.randn(5, WIDTH))


def test_values_out_of_range_and_not_finite():
    root = make_root(10)
    x = torch.randn(5, WIDTH)
    with pytest.raises(MfxError, match=r"at or before step blocks\.0: values beyond"):
        run(root, make_steps(root, call=lambda f, x: f(x) * 1e8), x)

    def spoil(f, x):
        return torch.where(torch.eye(5, WIDTH, dtype=torch.bool), torch.nan, x.tanh() * f[1].weight.sum())

    y = run(root, make_steps(root, call=spoil), x).x
    assert torch.equal(y.isnan(), torch.eye(5, WIDTH, dtype=torch.bool))
    y.nansum().backward()


@pytest.mark.parametrize("taps", [(), (3,)])
@pytest.mark.parametrize("backward", [False, True])
def test_graph_dies_with_its_last_reference(how, taps, backward):
    root = make_root(10, with_batch_norm)
    x = torch.randn(5, WIDTH, requires_grad=True)
    c = torch.randn(5, WIDTH).requires_grad_()
    steps = make_steps(root, call=lambda f, x, c: f(x) * c, captures=(0,))
    gc.collect()
    gc.disable()
    try:
        middle = c * 1
        out = run(root, steps, x * 1, (middle,), taps=taps, **how)
        refs = [weakref.ref(t) for t in (middle, out.x, *out.taps)]
        if how["gamma"]:
            refs.append(weakref.ref(out.x.grad_fn))
        if backward:
            out.x.sum().backward()
        del out, middle
        assert [r() for r in refs] == [None] * len(refs)
    finally:
        gc.enable()
