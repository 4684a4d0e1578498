"""torch.compile(mfx.momentumize(model), fullgraph=True), alone and inside of what else is compiled.

The oracle is the same net without a compiler: results, gradients, buffers and random state are to be equal bit for bit
where the compiler changes no arithmetic (backends "eager" and "aot_eager").
"""

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import mfx
from mfx.compiler import ops as opaque
from mfx.compiler.backend import momentum
from mfx.compiler.site_run import SiteRun

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # Inductor in torch 2.13
]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
    gc.collect()
    assert not opaque._RUNS  # whoever drops a result drops what was kept for its backward pass


class Block(nn.Module):
    """x + f(x), with statistics and random numbers in f."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.down(self.dropout(torch.tanh(self.up(self.norm(x)))))


class Blocks(nn.Module):
    """An embedding, blocks and a head; ``scale`` may be left out."""

    def __init__(self, depth=4, dropout=0.0):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.blocks = nn.Sequential(*(Block(dropout=dropout) for _ in range(depth)))

    def forward(self, x, scale=None):
        out = self.head(self.blocks(self.embed(x)))
        return out if scale is None else out * scale


class Larger(nn.Module):
    """A net between layers that are compiled with it."""

    def __init__(self, net):
        super().__init__()
        self.before, self.net, self.after = nn.Linear(5, 5), net, nn.Linear(3, 2)

    def forward(self, x):
        return self.after(self.net(self.before(x), None)).square()


def trained(model, call, x, seed=1):
    """Result, gradients, buffers and random state after a forward and a backward pass."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = call(x)
    gradients = torch.autograd.grad(out.sum(), [x, *model.parameters()])
    return [out.detach(), *gradients, *(buffer.clone() for buffer in model.buffers()), torch.get_rng_state()]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def pair(net):
    """A model around a net, and one to compare it with that shares nothing with it."""
    model = Larger(net)
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("backend, options", [("eager", {}), ("aot_eager", {}), ("aot_eager", {"gamma": 0.0})], ids=str)
def test_training_is_as_without_a_compiler(backend, options):
    model, reference = pair(mfx.momentumize(Blocks(dropout=0.3), verify="raise", **options))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for seed in (1, 2):
        x = torch.randn(4, 5)
        assert_same(trained(model, compiled, x, seed), trained(reference, reference, x, seed))


def test_a_net_by_itself():
    net = mfx.momentumize(Blocks(), verify="raise")
    reference, x = copy.deepcopy(net), torch.randn(4, 5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same(trained(net, compiled, x), trained(reference, reference, x))


def test_what_dynamo_captured():
    class Counted(Blocks):
        def forward(self, x):
            return super().forward(x) if len(x.shape) == 2 and x.shape[1] > 3 else x

    net = mfx.momentumize(Counted(dropout=0.3), capture="dynamo", verify="raise")
    reference, x = copy.deepcopy(net), torch.randn(4, 5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same(trained(net, compiled, x), trained(reference, reference, x))


def test_new_batch_sizes_need_no_new_graphs():
    made = []

    def count(graph, inputs):
        made.append(graph)
        return graph.forward

    model, reference = pair(mfx.momentumize(Blocks()).eval())
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for batch in range(3, 12):
        x = torch.randn(batch, 5)
        assert torch.equal(compiled(x), reference(x))
    around = [graph for graph in made if graph.graph.find_nodes(op="call_function", target=nn.functional.linear)]
    assert len(around) <= 2  # one for the first size, one for all others


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_gradients_are_those_of_the_masks_that_were_drawn(backend):
    model = Larger(mfx.momentumize(Blocks(2, dropout=0.5), verify="raise")).double()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x, step = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)

    def loss(x):
        torch.manual_seed(3)
        return compiled(x).sum()

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    h = 1e-5  # error of the central difference: about h², and 1e-16 / h from rounding
    slope = (loss(x + h * step) - loss(x - h * step)) / (2 * h)
    torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-7, atol=1e-7)


def test_evaluation_and_training_by_turns():
    model, reference = pair(mfx.momentumize(Blocks(dropout=0.3)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 5)
    for mode in (True, False, True):
        model.train(mode), reference.train(mode)
        assert_same(trained(model, compiled, x), trained(reference, reference, x))
        with torch.no_grad():
            torch.manual_seed(2)
            found = compiled(x)
            torch.manual_seed(2)
            assert torch.equal(found, reference(x))
        assert_same(model.buffers(), reference.buffers())


def test_statistics_are_there_for_code_that_follows():
    net = mfx.momentumize(Blocks())
    reference = copy.deepcopy(net)

    def run(net, x):
        return net(x).sum() + net.blocks[2].norm.running_mean.sum()

    x = torch.randn(4, 5)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(net, x), run(reference, x))


def test_statistics_of_a_call_whose_result_nobody_wants():
    net = mfx.momentumize(Blocks())
    reference = copy.deepcopy(net)

    @torch.no_grad()
    def calibrate(net, x):
        net(x)
        return x

    torch.compile(calibrate, backend="aot_eager", fullgraph=True)(net, x := torch.randn(4, 5))
    calibrate(reference, x)
    assert_same(net.buffers(), reference.buffers())


def test_autocast_around_and_within():
    model, reference = pair(mfx.momentumize(Blocks()))
    x = torch.randn(4, 5)

    def within(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = torch.compile(within, backend="aot_eager", fullgraph=True)
    expected = trained(reference, lambda x: within(reference, x), x)
    assert expected[0].dtype == torch.bfloat16
    assert_same(trained(model, lambda x: compiled(model, x), x), expected)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(trained(model, compiled, x), trained(reference, reference, x))


def test_gamma_may_change_afterwards():
    model, reference = pair(mfx.momentumize(Blocks(), gamma=0.9))
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(4, 5)
    before, _ = compiled(x), reference(x)
    mfx.set_gamma(model.net, 0.5)
    mfx.set_gamma(reference.net, 0.5)
    after = compiled(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, reference(x))


def test_the_original_may_be_compiled_too():
    plain = Blocks()
    net, x = mfx.momentumize(plain), torch.randn(4, 5)
    net.eval(), plain.eval()
    with mfx.original(net):
        assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), plain(x))


@dataclass
class Pair:
    """An output class."""

    x: torch.Tensor
    hidden: torch.Tensor


pytree.register_dataclass(Pair)


class Structured(nn.Module):
    """Returns much: what it got, one tensor twice, views, plain values, None, a class, a parameter."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x, flag=True):
        y = self.blocks(x)
        return {
            "given": x,
            "both": (y, [y]),
            "views": (y[:, :2], y[:, 1:]),
            "plain": (1, 2.5, "text", flag, None, len(x.shape)),
            "class": Pair(y * 2, y.detach()),
            "weight": self.blocks[0].up.weight,
        }


def test_structures_are_returned_as_they_are():
    net = mfx.momentumize(Structured())
    reference, x = copy.deepcopy(net), torch.randn(4, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x, flag=False), reference(x, flag=False)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else (type(a), a) == (type(b), b)
    assert found["given"] is x
    assert found["both"][0] is found["both"][1][0]
    assert not found["class"].hidden.requires_grad
    (found["class"].x.sum() + found["views"][1].sum() + found["weight"].sum()).backward()
    (expected["class"].x.sum() + expected["views"][1].sum() + expected["weight"].sum()).backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in reference.parameters()])


def test_parameters_that_have_no_share_get_no_gradient():
    net = mfx.momentumize(Blocks())
    net.unused = nn.Parameter(torch.ones(3))
    net.embed.requires_grad_(False)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(4, 5)).sum().backward()
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert without == {"unused", "embed.weight", "embed.bias"}


def test_hooks_of_parameters_run_once():
    net = mfx.momentumize(Blocks())
    seen = []
    net.head.weight.register_hook(lambda gradient: seen.append("head"))
    net.blocks[1].up.weight.register_hook(lambda gradient: gradient * 2)
    reference = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(x := torch.randn(4, 5)).sum().backward()
    reference(x).sum().backward()
    assert seen.count("head") == 1
    torch.testing.assert_close(net.blocks[1].up.weight.grad, 2 * reference.blocks[1].up.weight.grad, rtol=0, atol=0)


def test_a_graph_that_is_kept_can_be_used_again():
    net, x = mfx.momentumize(Blocks()), torch.randn(4, 5)
    loss = torch.compile(net, backend="aot_eager", fullgraph=True)(x).sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert_same(torch.autograd.grad(loss, list(net.parameters())), first)


def assert_compiled_as_eager(model):
    net = mfx.momentumize(model)
    compiled, x = torch.compile(net, backend="aot_eager", fullgraph=True), torch.randn(4, 5)
    found = trained(net, compiled, x)
    torch._dynamo.reset()
    model.blocks.apply(lambda module: module.reset_running_stats() if isinstance(module, nn.BatchNorm1d) else None)
    assert_same(found, trained(net, net, x))


def test_shared_parameters():
    model = Blocks()
    model.blocks[2].up.weight = model.blocks[0].up.weight
    assert_compiled_as_eager(model)


class Tied(Blocks):
    """Has a buffer that is the very tensor of a parameter, and comes before it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", self.blocks[1].up.weight)

    def forward(self, x):
        return super().forward(x) + self.seen.sum()


def test_a_buffer_that_is_a_parameter():
    model = Tied()
    assert next(model.buffers()) is model.blocks[1].up.weight
    assert_compiled_as_eager(model)


def test_an_error_of_the_model_itself_is_told():
    compiled = torch.compile(mfx.momentumize(Blocks()), backend="eager", fullgraph=True)
    with (
        pytest.warns(
            UserWarning, match=r"Blocks raised an error when torch.compile looked at this call. RuntimeError: "
        ),
        pytest.raises(torch._dynamo.exc.Unsupported),
    ):
        compiled(torch.randn(4, 6))


def kept_bytes(call, x):
    """Bytes that a forward pass leaves, by the profiler: while a dispatch mode looks on, Dynamo compiles nothing."""
    call(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = call(x).sum()
    bytes_kept = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    loss.backward()
    return bytes_kept


def test_no_more_is_kept_than_without_a_compiler():
    net, x = mfx.momentumize(Blocks(16)), torch.randn(512, 5)
    eager = kept_bytes(net, x)
    compiled = kept_bytes(torch.compile(net, backend="aot_eager", fullgraph=True), x)
    buffers = sum(buffer.nbytes for buffer in net.buffers())
    assert compiled <= eager + buffers + 1024  # the run's own buffers; a token, flags


class Odd:
    """Something that cannot go through a graph."""

    def __init__(self, x):
        self.x = x


def test_what_cannot_come_out_of_a_graph():
    class Wrapping(Blocks):
        def forward(self, x):
            return Odd(super().forward(x))

    net = mfx.momentumize(Wrapping())
    reference, x = copy.deepcopy(net), torch.randn(4, 5)
    with (
        pytest.warns(UserWarning, match="returns a Odd.*without fullgraph"),
        pytest.raises(torch._dynamo.exc.Unsupported),
    ):
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
    net = copy.deepcopy(reference)
    with pytest.warns(UserWarning, match="returns a Odd"):
        found = torch.compile(net, backend="aot_eager")(x)
    assert torch.equal(found.x, reference(x).x)


def test_an_input_that_is_changed_in_place():
    class Greedy(Blocks):
        def forward(self, x):
            x.mul_(2)
            return super().forward(x)

    compiled = torch.compile(mfx.momentumize(Greedy()), backend="aot_eager", fullgraph=True)
    with pytest.raises(mfx.MfxError, match="changes its input in place"):
        compiled(torch.randn(4, 5))


@pytest.mark.filterwarnings("ignore:mfx. GraphModule has no chain")  # there is none around the net
def test_inside_of_what_mfx_compiles():
    model, reference = pair(mfx.momentumize(Blocks(dropout=0.3), verify="raise"))
    compiled = torch.compile(model, backend=momentum, options={"inner": "aot_eager"}, fullgraph=True)
    x = torch.randn(4, 5)
    assert_same(trained(model, compiled, x), trained(reference, reference, x))


class Switched(Blocks):
    """Has another head in evaluation if a flag is set; returns how many it was given, in training only."""

    def __init__(self):
        super().__init__(2)
        self.other, self.flag = nn.Linear(8, 3), False

    def forward(self, x):
        out = self.blocks(self.embed(x))
        return (self.head(out), x.shape[0]) if self.training else (self.other if self.flag else self.head)(out)


def first(returned):
    return returned[0] if isinstance(returned, tuple) else returned


def test_code_compiled_for_one_call_keeps_what_it_knows_when_another_call_is_compiled():
    net = mfx.momentumize(Switched())
    net.flag = True
    reference = copy.deepcopy(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)

    def gradients(model, call, x):
        model.zero_grad()
        first(call(x)).sum().backward()
        return [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]

    for batch, mode in [(4, True), (4, False), (4, True)]:
        net.train(mode), reference.train(mode)
        x = torch.randn(batch, 5)
        assert_same(gradients(net, compiled, x), gradients(reference, reference, x))
        if mode:
            assert compiled(x)[1] == reference(x)[1] == batch


@pytest.mark.parametrize("change", ["flag", "shared"])
def test_a_change_of_the_model_that_compiled_code_does_not_know_of(change):
    net, x = mfx.momentumize(Switched()).eval(), torch.randn(4, 5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(x)
    if change == "flag":
        net.flag = True
    else:
        net.blocks[1].up.weight = net.blocks[0].up.weight
    with pytest.raises(mfx.MfxError, match=r"reset\(\) after a change"):
        compiled(x)


def test_a_tensor_from_elsewhere_that_wants_a_gradient():
    scale = torch.ones(3, requires_grad=True)

    class Scaled(Blocks):
        def forward(self, x):
            return super().forward(x) * scale

    compiled = torch.compile(mfx.momentumize(Scaled(2)), backend="aot_eager", fullgraph=True)
    with (
        pytest.warns(UserWarning, match="neither an argument nor a parameter"),
        pytest.raises(torch._dynamo.exc.Unsupported),
    ):
        compiled(torch.randn(4, 5))


def test_the_velocity_has_a_module():
    net = mfx.momentumize(Blocks(2), velocity=nn.Linear(8, 8))
    reference, x = copy.deepcopy(net), torch.randn(4, 5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same(trained(net, compiled, x), trained(reference, reference, x))


def test_hooks_of_the_net_itself():
    net = mfx.momentumize(Blocks(2))
    net.register_forward_pre_hook(lambda module, args: (args[0][0],))
    net.register_forward_hook(lambda module, args, out: {"out": out.double()})
    reference, x = copy.deepcopy(net), torch.randn(1, 4, 5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    found, expected = (
        trained(net, lambda x: compiled(x)["out"], x),
        trained(reference, lambda x: reference(x)["out"], x),
    )
    assert_same(found, expected)


def test_conjugates():
    class Conjugate(Blocks):
        def forward(self, x):
            out = super().forward(x)
            return torch.complex(out, out.square()).conj()

    net = mfx.momentumize(Conjugate(2)).eval()
    reference, x = copy.deepcopy(net), torch.randn(4, 5)

    def call(net):
        return torch.view_as_real(net(x).resolve_conj())

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(net), call(reference))


def test_a_checkpoint_around_it():
    class Checkpointed(Larger):
        def forward(self, x):
            return self.after(checkpoint(self.net, self.before(x), use_reentrant=False))

    plain = Blocks(2, dropout=0.5)
    for block in plain.blocks:
        block.norm = nn.LayerNorm(8)
    model = Checkpointed(mfx.momentumize(plain, verify="raise"))
    reference, x = copy.deepcopy(model), torch.randn(4, 5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(trained(model, compiled, x), trained(reference, reference, x))


def test_the_model_is_called_something_else_than_self():
    class Its(Blocks):
        def forward(its, x):  # noqa: N805
            return super().forward(x)

    net = mfx.momentumize(Its(2), capture="dynamo").eval()
    reference, x = copy.deepcopy(net), torch.randn(4, 5)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same(trained(net, compiled, x), trained(reference, reference, x))


def test_threads_leave_the_net_its_own_parameters():
    net, x = mfx.momentumize(Blocks()).eval(), torch.randn(4, 5)
    own = [*net.parameters(), *net.buffers()]
    with torch.no_grad():
        torch.compile(net, backend="aot_eager", fullgraph=True)(x)
    first, second = (SiteRun(net.forward.call_sites[0], [x], own) for _ in range(2))
    entered, leave = threading.Event(), threading.Event()

    def run_second():
        with net.forward.lock.writing(), second._held_by_net():
            entered.set()
            leave.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with net.forward.lock.writing(), first._held_by_net():
            done = pool.submit(run_second)
            assert not entered.wait(0.2)  # else it would take the first one's stand-ins for the net's own
        assert entered.wait(10)
        leave.set()
        done.result()
    assert all(a is b for a, b in zip([*net.parameters(), *net.buffers()], own, strict=True))


class Scaled(nn.Module):
    """Divides by a number that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(nn.Linear(5, 5) for _ in range(2))
        self.scale = 0.5

    def forward(self, x):
        for fc in self.fcs:
            x = x + fc(x / self.scale)
        return x


def test_an_attribute_is_a_number_in_every_graph():
    """Read off a tensor, as Dynamo would have it, it would break the graphs of the branches."""
    net = mfx.momentumize(model := Scaled(), gamma=0.0, capture="dynamo")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        y = compiled(x := torch.randn(batch, 5))
        y.sum().backward()
        assert torch.equal(y, model(x))
