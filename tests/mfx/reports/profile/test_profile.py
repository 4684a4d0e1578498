"""`mfx.profile` against bytes counted by hand, torch's own FLOP counter, and checkpointing written by hand.

Every tensor is a multiple of one unit: 256 float32, 1 KiB. Times are never compared.
"""

import copy
import random
from itertools import groupby

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mfx

UNIT = 1024
SCALAR = 4  # the loss, or its gradient


class Tanhs(nn.Module):
    """tanh n times, after a product with a parameter."""

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x * self.weight  # keeps x, which was there before, and the weight
        for _ in range(self.n):
            x = x.tanh()  # keeps its output
        return x


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Stack(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Stateful(nn.Module):
    """Everything a step leaves behind: statistics, gradients, dropout's random numbers; and modes that differ."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(4).eval()
        self.layers[1].weight.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = x + nn.functional.dropout(layer(x), training=self.training)
        return self.frozen(self.norm(x))


def drawing(output):
    """A loss that draws from Python's generator."""
    return output.sum() * random.random()


def profile(model, *args, **kwargs):
    return mfx.profile(model, *args, repeats=1, progress=False, **kwargs)


def rows_of(profile):
    return {row.name: row for row in profile.rows}


@pytest.fixture(scope="module")
def of_stack():
    torch.manual_seed(0)
    return profile(Stack(4), torch.randn(16, 16))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_bytes_are_those_counted_by_hand(n):
    (row,) = profile(Tanhs(n), torch.ones(256), against="plain").rows
    assert row.kept_bytes == n * UNIT + SCALAR
    # Worst in the backward pass of the last tanh: all outputs, the gradient it makes, the loss and its gradient.
    assert row.peak_bytes == (n + 1) * UNIT + 2 * SCALAR


class Table(nn.Module):
    """Reads a few rows of a table, of which the gradient is by far the largest tensor of a step."""

    def __init__(self, rows, **kwargs):
        super().__init__()
        self.table = nn.Embedding(rows, 16, **kwargs)
        self.block = Block()

    def forward(self, index):
        return self.block(self.table(index)).sum()


def test_a_tables_gradient_is_in_the_whole_and_not_in_the_peak():
    index = torch.arange(8)
    (small,), (large,) = (profile(Table(rows), index, against="plain").rows for rows in (64, 4096))
    more = (4096 - 64) * 16 * 4
    assert small.peak_bytes == large.peak_bytes < more
    assert large.whole_bytes - small.whole_bytes == 2 * more  # the table and its gradient


def test_the_whole_peak_is_the_one_by_hand():
    (row,) = profile(Tanhs(3), torch.ones(256), against="plain").rows
    # The peak of activations, the weight, the input; the weight's gradient comes when tanhs' outputs have gone.
    assert row.whole_bytes == row.peak_bytes + SCALAR + UNIT


def test_the_largest_tensor_at_the_peak_is_named():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"wide": nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 4))})

        def forward(self, x):
            return self.inner["wide"](x)

    found = profile(Wide(), torch.ones(2, 4), against="plain")
    # At the peak, in the backward pass of tanh, three tensors of that size live: its input is none of them.
    assert found.rows[0].largest == "4.0 KiB, float32 2×512, by tanh in inner.wide.1, in the forward pass"
    assert "largest at the peak (plain): 4.0 KiB, float32 2×512, by tanh in inner.wide.1" in " ".join(
        str(found).split()
    )


def test_a_tensor_of_the_backward_pass_is_named_by_the_module_of_its_forward():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.mean = nn.Parameter(torch.ones(())), Mean()

        def forward(self, x):
            return self.mean((x * self.scale).expand(256, 256)).sum()  # no tensor of that size is made here

    (row,) = profile(Net(), torch.ones(256, 1), against="plain").rows
    assert row.largest == "256.0 KiB, float32 256×256, by div in mean, in the backward pass"


def test_the_timeline_is_that_worked_out_by_hand():
    (row,) = profile(Tanhs(2), torch.ones(256), against="plain").rows
    where, live = zip(*row.timeline, strict=True)
    before = where.index(row.forward_ends)
    # Nothing; the product; it and its tanh; that tanh, which autograd keeps, and the next; the loss.
    levels = [level for level, _ in groupby(live[: before + 1])]
    assert levels == [0, UNIT, 2 * UNIT, 2 * UNIT + SCALAR]
    assert max(live) == row.peak_bytes
    assert live[-1] < UNIT
    assert list(where) == sorted(where)
    assert (where[0], where[-1]) == (0, 1)


def test_long_timelines_are_thinned_and_keep_their_peak():
    (row,) = profile(Tanhs(1500), torch.ones(256), against="plain").rows
    assert len(row.timeline) == 1001
    assert max(live for _, live in row.timeline) == row.peak_bytes == 1501 * UNIT + 2 * SCALAR


def test_kept_bytes_of_momentum_do_not_grow_with_depth():
    x = torch.randn(16, 16)  # one unit
    shallow, deep = (
        rows_of(profile(Stack(n), x, against=("plain", "momentum"), options={"arithmetic": "float"})) for n in (6, 12)
    )
    assert deep["momentum"].kept_bytes == shallow["momentum"].kept_bytes
    # Per block: its input, mean and deviation of 16 rows, the normalised input, and tanh's output, twice as wide. The
    # first input was there before.
    block = UNIT + 2 * 16 * 4 + UNIT + 2 * UNIT
    assert shallow["plain"].kept_bytes == 6 * block - UNIT + SCALAR
    assert deep["plain"].kept_bytes == 12 * block - UNIT + SCALAR


def test_the_checkpoint_variant_is_what_one_would_write_by_hand():
    torch.manual_seed(0)
    model = Stack(4)

    def by_hand(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x

    found = profile(model, torch.randn(16, 16), against={"library": "checkpoint", "by hand": by_hand})
    library, hand = found.rows
    assert (library.kept_bytes, library.peak_bytes, library.flops) == (hand.kept_bytes, hand.peak_bytes, hand.flops)
    # The inputs of all blocks but the first (which was there before), the output; nothing else but the loss.
    assert library.kept_bytes < 4 * UNIT + 2 * SCALAR
    assert found.wrapped == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert library.note.startswith("torch.utils.checkpoint around 4 modules: blocks.0,")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_flops_are_those_of_torch(of_stack):
    model, x = Stack(4), torch.randn(16, 16)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    rows = rows_of(of_stack)
    assert rows["plain"].flops == counter.get_total_flops()
    # One more forward pass, of which checkpoint leaves out what nobody will read: the last product of each block.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert rows["momentum"].flops <= rows["plain"].flops + counter.get_total_flops()
    assert rows["plain"].flops < rows["checkpoint"].flops <= rows["momentum"].flops


def test_the_meter_agrees_with_the_momentum_row():
    torch.manual_seed(0)
    net, x = mfx.momentumize(Stack(4)), torch.randn(16, 16)
    net(x).sum().backward()
    net.zero_grad()
    with mfx.ActivationMeter([*net.parameters(), x]) as meter:
        loss = net(x).sum()
        kept = meter.live
        loss.backward()
    (row,) = profile(net, x, against="momentum").rows
    assert (row.kept_bytes, row.peak_bytes) == (kept, meter.peak)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    torch.manual_seed(0)
    model, x = Stateful(), torch.randn(8, 4)
    model(x).sum().backward()
    stepped = []
    hook = model.layers[0].weight.register_post_accumulate_grad_hook(stepped.append)  # an optimizer in the backward
    state = copy.deepcopy(model.state_dict())
    held = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    buffers, modes = list(model.buffers()), [module.training for module in model.modules()]
    random_states = torch.get_rng_state(), random.getstate()

    def failing(*_):
        raise ZeroDivisionError

    against = {"plain": "plain", "checkpoint": "checkpoint", "momentum": "momentum"}
    if fails:
        with pytest.raises(ZeroDivisionError):
            profile(model, x, loss=drawing, against={**against, "failing": failing})
    else:
        profile(model, x, loss=drawing, against=against)
        hook.remove()  # a module that is given as a variant is run as it is, hooks and all
        profile(model, x, against={"itself": model})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(new is old for new, old in zip(model.buffers(), buffers, strict=True))
    for parameter, (gradient, value) in zip(model.parameters(), held, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or torch.equal(gradient, value)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert stepped == []


def test_all_variants_draw_the_same_random_numbers_and_train():
    seen = []

    def watching(output):
        seen.append(output.detach().clone())
        return output.square().mean()

    torch.manual_seed(0)
    model = Stateful().eval()  # trained all the same
    profile(model, torch.randn(8, 4), loss=watching, against={"a": "plain", "b": "plain", "c": {"gamma": 0.0}})
    first, *others = seen
    assert all(torch.equal(first[:1], other[:1]) or torch.allclose(first, other) for other in others)
    with torch.no_grad():
        assert not torch.allclose(model(torch.zeros(8, 4)), first)
    assert not model.training


def test_inputs_keep_their_values_and_gradients():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x, mask):
            return (x * self.weight).masked_fill(mask.logical_not_(), 0)

    x, mask = torch.ones(4, requires_grad=True), torch.tensor([True, False, True, True])
    profile(InPlace(), x, against="plain", mask=mask)
    assert x.grad is None
    assert mask.tolist() == [True, False, True, True]


def test_a_momentumized_net_is_measured_with_its_own_options_and_without():
    torch.manual_seed(0)
    model, x = Stack(4), torch.randn(16, 16)
    net = mfx.momentumize(model, gamma=0.5, arithmetic="float")
    own = rows_of(profile(net, x, against=("plain", "momentum")))
    of_model = rows_of(profile(model, x, against=("plain", "momentum"), options={"gamma": 0.5, "arithmetic": "float"}))
    for name in ("plain", "momentum"):
        assert own[name].kept_bytes == of_model[name].kept_bytes
    assert own["plain"].kept_bytes > own["momentum"].kept_bytes
    assert own["momentum"].note == "1 chain of 4 steps; gamma 0.5, float arithmetic"
    other = rows_of(profile(net, x, against=("momentum",), options={"gamma": 0.25}))
    assert "gamma 0.25, exact" in other["momentum"].note


def test_velocity_modules_keep_their_gradients():
    velocity = nn.Linear(16, 16)
    profile(Stack(2), torch.randn(4, 16), against="momentum", options={"velocity": velocity})
    assert velocity.weight.grad is None


class Loop(nn.Module):
    """The code of the blocks stands around the modules that they call."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))

    def forward(self, x):
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


def test_without_a_block_the_modules_of_a_branch_are_checkpointed():
    found = profile(Loop(), torch.randn(4, 16), against="checkpoint")
    assert set(found.wrapped) == {f"{kind}.{number}" for kind in ("norms", "mlps") for number in range(3)}


def test_without_a_chain_the_notes_say_so():
    found = rows_of(profile(Tanhs(2), torch.ones(256)))
    assert "no block that could be wrapped was found" in found["checkpoint"].note
    assert found["momentum"].note == "no chain of residual adds was found, so this is the model as it is"
    assert found["momentum"].peak_bytes == found["plain"].peak_bytes


class Branching(nn.Module):
    """No one graph, because what it does depends on a value."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if float(x.detach().abs().sum()) > 0 else x


@pytest.mark.parametrize(
    "build, wrapped",
    [
        (lambda: nn.Sequential(*(Block() for _ in range(3))), ["part.0", "part.1", "part.2"]),
        (Loop, None),
    ],
    ids=["blocks", "branches"],
)
@pytest.mark.filterwarnings("ignore:mfx. Branching cannot be captured as one graph")
def test_blocks_of_a_part_that_is_rewritten_by_itself_are_checkpointed(build, wrapped):
    x = torch.randn(4, 16)
    whole = profile(build(), x, against=("plain", "checkpoint"))
    found = profile(Branching(build()), x, against=("plain", "checkpoint"))
    assert list(found.wrapped) == (wrapped or [f"part.{path}" for path in whole.wrapped])
    kept = [row.kept_bytes for row in found.rows]
    assert kept == [row.kept_bytes for row in whole.rows]
    assert kept[1] < kept[0]


def test_a_checkpoint_that_does_not_run_is_left_out_with_a_reason():
    class Growing(Stack):
        """Keeps what its blocks computed: a second run finds other sizes."""

        def forward(self, x):
            seen = []
            for block in self.blocks:
                x = self.remember(block, x, seen)
            return x

        def remember(self, block, x, seen):
            return block(x, seen)

    class Remembering(Block):
        def forward(self, x, seen):
            seen.append(x)
            return x + self.down(torch.stack(seen).sum(0).tanh().repeat(1, 2))

    model = Growing(2)
    model.blocks = nn.ModuleList(Remembering() for _ in range(2))
    found = profile(model, torch.randn(4, 16), against=("plain", "checkpoint"))
    assert [row.name for row in found.rows] == ["plain"]
    ((name, reason),) = found.skipped
    assert name == "checkpoint"
    assert "CheckpointError" in reason
    assert "checkpoint: not measured: CheckpointError" in str(found)
    with pytest.raises(mfx.MfxError, match="CheckpointError"):
        profile(model, torch.randn(4, 16), against="checkpoint")


def test_resnet18(recwarn):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=4)
    state = copy.deepcopy(model.state_dict())
    found = profile(model, torch.randn(2, 3, 32, 32))
    rows = rows_of(found)
    assert list(rows) == ["plain", "checkpoint", "momentum"]
    assert found.wrapped == tuple(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))
    assert rows["momentum"].kept_bytes < rows["plain"].kept_bytes
    assert rows["checkpoint"].flops == rows["momentum"].flops > rows["plain"].flops
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"against": ("plain", "momentun")},
            "'momentun' is not a variant. Those with a name are plain, checkpoint, mom",
        ),
        ({"against": {"mine": 3}}, "3 is not a variant"),
        ({"against": ()}, "name one variant or more of plain, checkpoint, momentum"),
        ({"against": None}, "against=None: name one variant or more"),
        ({"repeats": 0}, "repeats=0: the number of steps"),
        ({"options": {"gamma": 2}}, "gamma"),
        ({"loss": lambda output: output}, r"loss of the variant 'plain' is a tensor of shape \(4, 16\)"),
        ({"loss": lambda output: 1.0}, "loss of the variant 'plain' is a float; let loss= return a scalar"),
        ({"loss": lambda output: output.sum().detach()}, "'plain' depends on nothing that requires a gradient"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(mfx.MfxError, match=message):
        mfx.profile(Stack(2), torch.randn(4, 16), progress=False, **arguments)


class SeveralDevices(nn.Sequential):
    """Says that it has a parameter on a device that need not be there."""

    def parameters(self, recurse=True):
        class Elsewhere:
            device = torch.device("cuda:0")
            is_leaf = requires_grad = False
            grad = None

        yield from super().parameters(recurse)
        yield Elsewhere()


def test_bad_models():
    with pytest.raises(mfx.MfxError, match=r"profile takes a torch.nn.Module, not the class Stack"):
        mfx.profile(Stack, torch.randn(4, 16))
    with pytest.raises(mfx.MfxError, match=r"weight has no shape yet. Call the LazyLinear once"):
        profile(nn.LazyLinear(3), torch.randn(4, 16))
    with pytest.raises(mfx.MfxError, match=r"blocks.0.norm.weight is on the meta device"):
        profile(Stack(2).to("meta"), torch.randn(4, 16))
    with pytest.raises(mfx.MfxError, match="depends on nothing that requires a gradient"):
        profile(Stack(2).requires_grad_(False), torch.randn(4, 16), against="plain")
    with pytest.raises(mfx.MfxError, match="CPU and CUDA devices, not on meta"):
        profile(nn.Tanh(), torch.randn(4, 16, device="meta"))
    with pytest.raises(mfx.MfxError, match="SeveralDevices is on cpu, cuda:0; profile counts bytes on one"):
        profile(SeveralDevices(nn.Linear(2, 2)), torch.randn(4, 2))
    graph = mfx.momentumize(mfx.trace(Stack(2)))
    with pytest.raises(mfx.MfxError, match="this GraphModule was momentumized"):
        profile(graph, torch.randn(4, 16))


def test_outputs_without_a_floating_tensor_ask_for_a_loss():
    class Answer(nn.Module):
        def forward(self, x):
            return x.argmax()

    with pytest.raises(mfx.MfxError, match="no floating-point tensor was found in the model's output"):
        profile(Answer(), torch.ones(3), against="plain")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    torch.manual_seed(0)
    found = profile(Stack(8).cuda(), torch.randn(256, 16, device="cuda"))
    rows = rows_of(found)
    assert rows["momentum"].kept_bytes < rows["plain"].kept_bytes
    assert all(row.peak_bytes >= max(live for _, live in row.timeline) > 0 for row in found.rows)
