"""After a training step, buffers and random states are those that plain training leaves."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

import mfx
from mfx import recomputing
from tests.sampling import grid

# --- buffers that change in place -------------------------------------------------------------------------------------


DEPTH = 13  # exact arithmetic keeps the inputs of shorter chains, instead of a tape


class Residual(nn.Module):
    """x + f(x), over and over."""

    def __init__(self, build, depth=DEPTH):
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(build() for _ in range(depth))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


LAYERS = {
    "BatchNorm1d": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (5, 4)),
    "BatchNorm1d over a sequence": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)), (3, 4, 6)),
    "BatchNorm2d": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), (2, 4, 5, 5)),
    "BatchNorm3d": (lambda: nn.Sequential(nn.BatchNorm3d(4), nn.Conv3d(4, 4, 1)), (2, 4, 2, 3, 2)),
    "BatchNorm with a cumulative average": (lambda: nn.BatchNorm1d(4, momentum=None), (5, 4)),
    "BatchNorm without weights": (lambda: nn.BatchNorm1d(4, affine=False), (5, 4)),
    "BatchNorm in a frozen branch": (lambda: nn.BatchNorm1d(4).requires_grad_(False), (5, 4)),
    "SyncBatchNorm in one process": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.SyncBatchNorm(4)), (3, 4, 6)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (3, 4, 6)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (2, 4, 5, 5)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), (5, 4)),
    "spectral norm, three iterations": (
        lambda: parametrizations.spectral_norm(nn.Conv1d(4, 4, 1), n_power_iterations=3),
        (3, 4, 6),
    ),
    "spectral norm by hook": (lambda: spectral_norm(nn.Linear(4, 4)), (5, 4)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), (5, 4)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (5, 4)),
    "spectral norm and BatchNorm": (
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.Dropout(0.2)),
        (5, 4),
    ),
}
HOW = [("exact", 0.9), ("float", 0.9), ("exact", 0.0)]


def everything(net):
    """Return all that a training step leaves, in the net and outside it."""
    return {
        **{f"state.{name}": value for name, value in net.state_dict().items()},
        **{f"buffer.{name}": value for name, value in net.named_buffers()},
        **{f"grad.{name}": p.grad for name, p in net.named_parameters() if p.grad is not None},
        "random": torch.get_rng_state(),
    }


REBUILT, CONDITION = 6e-6, 30
"""The error that arithmetic "float" allows itself in a rebuilt state, and how much it grows on its way to a gradient:
normalisation divides it by the spread of a few numbers, and the steps before it see it again."""


def assert_equal(found, expected, arithmetic):
    assert found.keys() == expected.keys()
    scale = max((value.abs().max() for name, value in expected.items() if name.startswith("grad")), default=1.0)
    for name, value in expected.items():
        if name.startswith("grad") and arithmetic == "float":
            assert (found[name] - value).abs().max() <= CONDITION * REBUILT * scale, name
        else:
            assert torch.equal(found[name], value), name


def pair(build, how, **plain):
    """The net that keeps nothing, and ordinary backpropagation through the same network."""
    arithmetic, gamma = how
    model = Residual(build)
    net = mfx.momentumize(copy.deepcopy(model), arithmetic=arithmetic, gamma=gamma)
    return net, mfx.momentumize(model, arithmetic=arithmetic, gamma=gamma, memory_budget=1.0, **plain)


@grid(len(LAYERS), layer=LAYERS, how=HOW)
def test_training_steps_leave_what_plain_training_leaves(layer, how):
    build, shape = layer
    nets, results = pair(build, how), []
    for net in nets:
        torch.manual_seed(3)
        x = seeded(*shape).requires_grad_()
        for _ in range(3):
            net(x).square().mean().backward()
        results.append(everything(net))
    assert_equal(*results, how[0])


@grid(len(LAYERS), layer=LAYERS, how=HOW)
def test_at_gamma_zero_it_is_the_model_itself(layer, how):
    build, shape = layer
    model = Residual(build)
    net = mfx.momentumize(copy.deepcopy(model), arithmetic=how[0], gamma=0.0)
    results = []
    for each in (net, model):
        torch.manual_seed(3)
        for _ in range(2):
            y = each(seeded(*shape).requires_grad_())
            y.square().mean().backward()
        results.append(everything(each))
    assert_equal(*results, "exact")


@grid(len(LAYERS), layer=LAYERS, how=HOW)
def test_a_forward_pass_alone_changes_them_once_and_in_eval_mode_never(layer, how):
    build, shape = layer
    nets, x = pair(build, how), seeded(*shape)
    for net in nets:
        torch.manual_seed(3)
        net(x)
        with torch.no_grad():
            net(x)
    assert_equal(everything(nets[0]), everything(nets[1]), "exact")
    before = copy.deepcopy(everything(nets[0]))
    nets[0].eval()
    nets[0](x.requires_grad_()).square().mean().backward()
    after = {name: value for name, value in everything(nets[0]).items() if not name.startswith("grad")}
    assert_equal(after, {name: before[name] for name in after}, "exact")


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("kind", ["spectral norm", "BatchNorm1d"])
def test_the_second_run_reads_the_values_before_the_first(kind, how):
    build, shape = LAYERS[kind]
    net, _ = pair(build, how)
    seen = {False: [], True: []}
    for index in (0, 5, DEPTH - 1):
        net.branches[index].register_forward_pre_hook(
            lambda module, _: seen[recomputing()].append([b.clone() for b in module.buffers()])
        )
    net(seeded(*shape))  # which buffers change is known from here on
    seen[False].clear()
    net(seeded(*shape)).sum().backward()
    assert len(seen[False]) == len(seen[True]) == 3
    for first, second in zip(seen[False], reversed(seen[True]), strict=True):
        assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("how", HOW, ids=str)
def test_two_forward_passes_before_their_backward_passes(how):
    build, shape = LAYERS["spectral norm and BatchNorm"]
    results = []
    for net in pair(build, how):
        torch.manual_seed(3)
        first, second = net(seeded(*shape)).square().mean(), net(2 * seeded(*shape)).square().mean()
        first.backward()
        second.backward()
        results.append(everything(net))
    assert_equal(*results, how[0])


@pytest.mark.parametrize("how", HOW, ids=str)
def test_one_module_in_several_steps(how):
    build, shape = LAYERS["spectral norm and BatchNorm"]
    results = []
    for net in pair(build, how):
        shared = net.branches[0]
        for index in range(0, DEPTH, 3):
            net.branches[index] = shared
        torch.manual_seed(3)
        for _ in range(2):
            net(seeded(*shape)).square().mean().backward()
        results.append(everything(net))
    assert_equal(*results, how[0])


@pytest.mark.parametrize("how", HOW, ids=str)
def test_modes_of_parts_changed_between_forward_and_backward(how):
    build, shape = LAYERS["spectral norm and BatchNorm"]
    results = []
    for net, (train_first, train_later) in itertools.product(pair(build, how), [(True, False), (False, True)]):
        torch.manual_seed(3)
        net.train(train_first)
        loss = net(seeded(*shape)).square().mean()
        net.train(train_later)
        loss.backward()
        assert all(module.training == train_later for module in net.modules())
        results.append(everything(net))
    assert_equal(results[0], results[2], how[0])
    assert_equal(results[1], results[3], how[0])


@pytest.mark.parametrize("gamma", [0.0, 0.9])
@pytest.mark.parametrize(
    "layer", ["BatchNorm1d", "BatchNorm2d", "BatchNorm without weights", "InstanceNorm1d", "weight norm"]
)
def test_what_dynamo_captured_changes_them_once(layer, gamma):
    build, shape = LAYERS[layer]
    model = Residual(build, depth=4)
    net = mfx.momentumize(copy.deepcopy(model), gamma=gamma, capture="dynamo")
    plain = mfx.momentumize(model, gamma=gamma, memory_budget=1.0)  # by symbolic tracing
    results = []
    for each in (net, plain):
        torch.manual_seed(3)
        for _ in range(2):
            each(seeded(*shape).requires_grad_()).square().mean().backward()
        results.append(everything(each))
    (graph,) = net.forward.table.graphs
    assert any("branches.0" in path for path in graph.chain_targets)  # found in the model, not handed to the chain
    assert_equal(*results, "exact")


# --- buffers that a forward replaces ----------------------------------------------------------------------------------


class Counting(nn.Module):
    """x + tanh(fc(x) + its number of calls so far)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls = self.calls + 1
        return x + torch.tanh(self.fc(x) + self.calls)


def counting():
    torch.manual_seed(0)
    return nn.Sequential(*(Counting() for _ in range(3))).double()


def test_a_symbolic_trace_is_refused_and_leaves_them_alone():
    model = counting()
    before = [block.calls for block in model]
    with pytest.raises(mfx.MfxError, match="cannot be traced symbolically"):
        mfx.momentumize(model, capture="symbolic")
    assert all(block.calls is calls for block, calls in zip(model, before, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_dynamo_replaces_them_once_per_call(gamma):
    model, x = counting(), torch.randn(5, 4, dtype=torch.float64)
    reference = copy.deepcopy(model)
    net = mfx.momentumize(model, gamma=gamma)
    for call in range(1, 4):
        out = net(x)
        out.sum().backward()
        state, v = x, torch.zeros_like(x)
        for block in reference:
            v = gamma * v + (1 - gamma) * torch.tanh(block.fc(state) + call)
            state = state + v
        # The exact arithmetic rounds to 2^-40 at each of 3 steps.
        torch.testing.assert_close(out, state, rtol=0, atol=3 * 9 * 2.0**-40)
        state.sum().backward()
        for ours, theirs in zip(net.parameters(), reference.parameters(), strict=True):
            # Over three calls each is a sum of 15 products of a state and derivatives of at most 1.
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=15 * 3 * 9 * 2.0**-40)
        assert [block.calls.item() for block in net] == [call] * 3


def test_hooks_that_keep_account_are_warned_of_once_for_all_chains():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

        def forward(self, x):
            for fc in self.first:
                x = x + torch.tanh(fc(x))
            x = torch.relu(x[:, :2]).repeat(1, 2)
            for fc in self.second:
                x = x + torch.tanh(fc(x))
            return x

    net, accounts = mfx.momentumize(Two(), gamma=0.5), []
    for layer in (*net.first, *net.second):
        layer.register_forward_hook(lambda *_: accounts.append(1))
        layer.register_full_backward_hook(lambda *_: accounts.pop() and None)
    with pytest.warns(UserWarning, match=r"keep account of each other.*memory_budget=1\.0") as caught:
        net(torch.randn(3, 4, requires_grad=True)).sum().backward()
    net(torch.randn(3, 4, requires_grad=True)).sum().backward()  # warnings are errors here: there is no second one
    assert len(mfx.explain(net).chains) == 2
    assert sum("keep account" in str(warning.message) for warning in caught) == 1
