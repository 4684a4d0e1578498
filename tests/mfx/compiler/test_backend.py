"""torch.compile(model, backend="mfx"): the network that momentumize makes, inside of a torch.compile pipeline."""

import warnings

import pytest
import torch
from torch import nn

import mfx
from mfx.compiler.backend import momentum
from mfx.program.codegen import to_function

# Dynamo looks at .grad of whatever it is given, and hides the warning in a way that does not work for errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # Inductor in torch 2.13
]
INNER = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Blocks(nn.Module):
    """An embedding, blocks x + f(x), and a head."""

    def __init__(self, depth=6, dropout=0.0):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(dropout)) for _ in range(depth)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Normalized(nn.Module):
    """Convolutions with BatchNorm, whose statistics a branch changes, and a ReLU after the sum."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)) for _ in range(4)
        )

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


def compiled(model, inner="eager", fullgraph=True, **options):
    return torch.compile(model, backend=momentum, fullgraph=fullgraph, options={"inner": inner, **options})


def result(function, parameters, x, seed=1):
    """Output, gradients by parameter and input, and the random state afterwards."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = function(x)
    gradients = torch.autograd.grad(out.square().sum(), [x, *parameters])
    return [out.detach(), *gradients, torch.get_rng_state()]


def assert_same(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("options", [{"gamma": 0.9}, {"gamma": 0.0}, {"gamma": 0.5, "arithmetic": "float"}], ids=str)
def test_it_is_the_momentumized_network(inner, options):
    model, x = Blocks(dropout=0.2), torch.randn(4, 5)
    expected = result(mfx.momentumize(model, **options), list(model.parameters()), x)
    assert_same(result(compiled(model, inner, **options), list(model.parameters()), x), expected)


def test_at_gamma_zero_it_is_the_model():
    model, x = Blocks(dropout=0.2), torch.randn(4, 5)
    expected = result(model, list(model.parameters()), x)
    assert_same(result(compiled(model, gamma=0.0), list(model.parameters()), x), expected)


def test_it_is_another_function_otherwise():
    model, x = Blocks(), torch.randn(4, 5)
    assert not torch.allclose(compiled(model, gamma=0.9)(x), model(x), atol=1e-3)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("options", [{"memory_budget": 0.5}, {"recompute": "all"}], ids=str)
def test_plans_of_what_is_kept(inner, options):
    model, x = Blocks(), torch.randn(4, 5)
    expected = result(mfx.momentumize(model), list(model.parameters()), x)
    net = compiled(model, inner, **options)
    for _ in range(3):  # the first call measures the branches, as they run in its backward pass too: compiled
        assert_same(result(net, list(model.parameters()), x), expected)


class Nested(nn.Module):
    """Blocks whose branches are chains themselves."""

    def __init__(self):
        super().__init__()
        self.outer = nn.ModuleList(nn.ModuleList(nn.Linear(5, 5) for _ in range(3)) for _ in range(2))

    def forward(self, x):
        for inner in self.outer:
            y = x.sin()
            for block in inner:
                y = y + block(y).tanh()
            x = x + y
        return x


@pytest.mark.parametrize("inner", INNER)
def test_chains_in_branches_of_a_chain(inner):
    model, x = Nested(), torch.randn(4, 5)
    net = compiled(model, inner)
    expected = result(mfx.momentumize(model), list(model.parameters()), x)
    assert_same(result(net, list(model.parameters()), x), expected)
    assert [chain.name for chain in mfx.explain(net).chains] == ["root", "root#2", "root#3"]


@pytest.mark.parametrize("inner", INNER)
def test_statistics_of_batch_norm(inner):
    model, x = Normalized(), torch.randn(2, 4, 6, 6)
    net = compiled(model, inner)
    net(x).sum().backward()
    counts = [block[1].num_batches_tracked.item() for block in model.blocks]
    means = [block[1].running_mean.clone() for block in model.blocks]
    assert counts == [1] * 4
    torch.manual_seed(0)
    reference = Normalized()
    mfx.momentumize(reference)(x)
    for block, mean in zip(reference.blocks, means, strict=True):
        # One pass over the same numbers, by kernels that may sum the 72 of them in another order.
        torch.testing.assert_close(mean, block[1].running_mean, rtol=0, atol=72 * 2.0**-24)


def test_train_and_eval():
    model, x = Blocks(dropout=0.5), torch.randn(4, 5)
    net, eager = compiled(model), mfx.momentumize(model)
    net(x)
    model.eval(), eager.eval()
    with torch.no_grad():
        assert torch.equal(net(x), eager(x))


def test_other_batch_sizes():
    model = Blocks()
    net, eager = compiled(model), mfx.momentumize(model)
    for batch in range(2, 22):
        x = torch.randn(batch, 5)
        assert torch.equal(net(x), eager(x))


# --- whose parameters? ------------------------------------------------------------------------------------------------


def test_each_model_of_a_class_has_its_own_parameters():
    x = torch.randn(4, 5)
    for model in (Blocks(), Blocks()):
        expected = result(mfx.momentumize(model), list(model.parameters()), x)
        assert_same(result(compiled(model), list(model.parameters()), x), expected)


def test_parameters_put_in_the_place_of_others():
    model, x = Blocks(), torch.randn(4, 5)
    net = compiled(model)
    before = net(x)
    model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}, assign=True)
    assert torch.equal(net(x), mfx.momentumize(model)(x))
    assert not torch.equal(net(x), before)


def test_two_models_in_one_function():
    one, two, x = Blocks(), Blocks(), torch.randn(4, 5)

    def both(x):
        return one(x), two(x)

    function = torch.compile(both, backend=momentum, options={"inner": "eager"})
    for found, model in zip(function(x), (one, two), strict=True):
        assert torch.equal(found, mfx.momentumize(model)(x))


def test_modules_in_a_plain_list():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Linear(5, 5) for _ in range(4)]

        def forward(self, x):
            return through(self.hidden, x)

    model, x = Listed(), torch.randn(4, 5)
    state, v = x.double(), torch.zeros(4, 5, dtype=torch.float64)
    for layer in model.hidden:
        v = 0.9 * v + 0.1 * layer(state.float()).double()
        state = state + v
    # float32 roundings of values below 8 in four branches.
    torch.testing.assert_close(compiled(model)(x).double(), state, rtol=0, atol=4 * 8 * 2.0**-23)


def test_a_pending_backward_pass_keeps_its_parameters():
    one, two, x = Blocks(), Blocks(), torch.randn(4, 5)
    losses = [compiled(model)(x).sum() for model in (one, two)]
    for loss, model in zip(losses, (one, two), strict=True):
        found = torch.autograd.grad(loss, list(model.parameters()))
        assert_same(found, torch.autograd.grad(mfx.momentumize(model)(x).sum(), list(model.parameters())))


def test_the_fused_layer_for_inference_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = compiled(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval())
    with torch.no_grad(), pytest.raises(Exception, match="set_fastpath_enabled"):
        net(torch.randn(2, 3, 8))


def test_inductor():
    model, x = Blocks(depth=3).double(), torch.randn(4, 5, dtype=torch.float64)
    found = result(compiled(model, "inductor"), list(model.parameters()), x)
    expected = result(mfx.momentumize(model), list(model.parameters()), x)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        # The same sums of at most 8 numbers, in another order, through 3 blocks forth and back.
        torch.testing.assert_close(a, b, rtol=8 * 6 * 2.0**-40, atol=8 * 6 * 2.0**-40)


def test_inductor_draws_the_same_masks_twice():
    model, x = Blocks(depth=3, dropout=0.3).double(), torch.randn(2, 5, dtype=torch.float64)
    net, parameter = compiled(model, "inductor"), model.blocks[0][1].bias

    def loss():
        torch.manual_seed(3)
        return net(x).square().sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="mfx")  # a step that did not compute the same values twice would warn
        (gradient,) = torch.autograd.grad(loss(), [parameter])
    step = 1e-4
    with torch.no_grad():
        parameter[2] += step
    above = loss().item()
    with torch.no_grad():
        parameter[2] -= 2 * step
    below = loss().item()
    # A central difference errs by step²/6 times a third derivative of order 10, and by 2^-40 · 10 / step.
    assert gradient[2].item() == pytest.approx((above - below) / (2 * step), abs=1e-5)


def test_branches_of_one_structure_are_compiled_once():
    calls = []

    def counting(module, inputs):
        calls.append(module)
        return module

    counts = []
    for depth in (4, 12):
        calls.clear()
        torch._dynamo.reset()
        compiled(Blocks(depth), counting)(torch.randn(4, 5)).sum().backward()
        counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "given", [{"mode": "reduce-overhead"}, {"options": {"gamma": 0.5, "inner_mode": "reduce-overhead"}}], ids=str
)
def test_the_mode_is_the_inner_backends(given, monkeypatch):
    """torch.compile takes either a mode or options."""
    made = []

    def spy(inner, **settings):
        made.append((inner, settings))
        return to_function

    monkeypatch.setattr("mfx.compiler.backend.BackendCompiler", spy)
    torch.compile(Blocks(), backend=momentum, **given)(torch.randn(2, 5))
    assert made == [("inductor", {"mode": "reduce-overhead"})]


def test_the_mode_and_the_options_arrive():
    arrived = []

    def inner(module, inputs, *, mode=None, options=None):
        arrived.append((mode, options))
        return module

    for name, value in (("inner_mode", "max-autotune-no-cudagraphs"), ("inner_options", {"max_autotune": True})):
        torch._dynamo.reset()
        compiled(Blocks(), inner, **{name: value})(torch.randn(2, 5))
    modes, options = zip(*dict.fromkeys((mode, str(options)) for mode, options in arrived), strict=True)
    assert (modes, options) == (("max-autotune-no-cudagraphs", None), ("None", str({"max_autotune": True})))


def test_dynamic_sizes_need_one_graph():
    pieces = []

    def counting(module, inputs):
        pieces.append(module)
        return module

    model = Blocks()
    net = torch.compile(model, backend=momentum, fullgraph=True, dynamic=True, options={"inner": counting})
    eager = mfx.momentumize(model)
    counts = []
    for batch in range(2, 12):
        x = torch.randn(batch, 5)
        assert torch.equal(net(x), eager(x))
        counts.append(len(pieces))
    assert len(mfx.graphs(net)) == 1
    assert counts[-1] == counts[1] <= 2 * counts[0]  # a piece may need a second size to know which one changes


# --- what was made ----------------------------------------------------------------------------------------------------


def test_the_graphs_of_a_compiled_model():
    model, other, x = Blocks(), Blocks(), torch.randn(4, 5)
    net = compiled(model, gamma=0.5, skip="blocks.0")
    with pytest.raises(mfx.MfxError, match="no graph of this compiled Blocks is known: it was not called yet"):
        mfx.explain(net)
    net(x)
    assert list(mfx.graphs(net)) == ["train"]
    net.eval()
    net(x)
    graphs = mfx.graphs(net)
    assert list(graphs) == ["train", "eval"]
    assert "momentum_blocks" in graphs["train"].code
    found = mfx.explain(net)
    assert found.model == "Blocks"
    assert [(chain.name, len(chain.steps), chain.gamma) for chain in found.chains] == [("blocks", 5, 0.5)]
    assert list(found.graphs) == ["train", "eval"]
    assert any("skip" in rejection.reason for rejection in found.rejections)
    assert "blocks" in str(found)
    assert "memory could not be predicted: compiled graphs are not rehearsed" in str(mfx.explain(net, x))
    with pytest.raises(mfx.MfxError, match="it was not called yet"):
        mfx.graphs(compiled(other))
    torch._dynamo.reset()
    del net


def test_the_graphs_of_a_model_in_pieces():
    model = BrokenBefore()
    net = compiled(model, fullgraph=False)
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        net(torch.randn(4, 5))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [6]
    assert len(mfx.graphs(net)) == 2


def test_a_compiled_net_is_explained_as_the_net():
    net = mfx.momentumize(Blocks())
    made = torch.compile(net, backend="eager")
    assert str(mfx.explain(made)) == str(mfx.explain(net))
    assert list(mfx.graphs(made)) == list(mfx.graphs(net))


def test_options_do_not_reach_a_net_inside():
    net, x = mfx.momentumize(Blocks(), gamma=0.9), torch.randn(4, 5)
    with pytest.warns(UserWarning, match=r"mfx: gamma: no effect, .* Give them to mfx.momentumize"):
        out = compiled(net, gamma=0.5)(x)
    assert torch.equal(out, net(x))


def test_code_around_a_net_has_its_chains():
    net, x = mfx.momentumize(Blocks()), torch.randn(2, 5)

    def function(x):
        return net(x) * 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of there being no chain, say
        assert torch.equal(torch.compile(function, backend="mfx", options={"inner": "eager"})(x), function(x))


def test_a_model_without_chains_says_so():
    model, x = nn.Sequential(nn.Linear(5, 5), nn.ReLU()), torch.randn(2, 5)
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        assert torch.equal(compiled(model)(x), model(x))


def through(blocks, x):
    for block in blocks:
        x = x + block(x)
    return x


class Broken(Blocks):
    def forward(self, x):
        x = through(self.blocks[:3], self.embed(x))
        torch._dynamo.graph_break()
        return self.head(through(self.blocks[3:], x))


class BrokenInLoop(Blocks):
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
            torch._dynamo.graph_break()
        return self.head(x)


class BrokenBefore(Blocks):
    def forward(self, x):
        x = self.embed(x) * 2
        torch._dynamo.graph_break()
        return Blocks.forward(self, x[:, :5])


def test_a_graph_break_inside_a_chain_is_refused():
    with pytest.raises(Exception, match="chain blocks is cut by a graph break"):
        compiled(Broken(), fullgraph=False)(torch.randn(4, 5))


@pytest.mark.parametrize("backend", [momentum, "eager"], ids=["mfx", "another"])
def test_a_function_that_dynamo_gives_up_is_run_without_mfx_but_not_in_silence(backend):
    model, x = BrokenInLoop(), torch.randn(4, 5)
    net = torch.compile(model, backend=backend, options={"inner": "eager"} if backend is momentum else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(net(x), model(x))  # as it is written
        net(x)
    said = [str(one.message) for one in caught if str(one.message).startswith("mfx:")]
    assert len(said) == (backend is momentum)
    assert all("has given up on forward" in text and __file__ in text and "fullgraph=True" in text for text in said)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        torch.compile(model, backend=momentum, fullgraph=True)(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_a_nested_tensor():
    x = torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(2, 5)], layout=torch.jagged)
    with pytest.raises(mfx.MfxError, match=r"chain blocks: its stream is a nested tensor.* Leave the chain out with"):
        compiled(Blocks())(x)
    model = Blocks()
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        out = compiled(model, min_steps=100)(x)
    assert torch.equal(out.values(), model(x).values())


def test_a_graph_break_elsewhere_is_none_of_our_business():
    model, x = BrokenBefore(), torch.randn(4, 5)
    with pytest.warns(UserWarning, match="no chain of residual adds"):
        out = compiled(model, fullgraph=False)(x)
    rest = mfx.momentumize(Blocks())
    rest.load_state_dict(model.state_dict())
    assert torch.equal(out, rest((model.embed(x) * 2)[:, :5]))


def test_the_recompile_limit_is_an_error():
    class Scaled(Blocks):
        def forward(self, x, how):
            return super().forward(x) * len(how)

    net = compiled(Scaled())
    for number in range(1, torch._dynamo.config.recompile_limit):
        net(torch.randn(2, 5), "x" * number)
    with pytest.raises(Exception, match=r"as many graphs of this function as it will.*recompile_limit"):
        net(torch.randn(2, 5), "x" * torch._dynamo.config.recompile_limit)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"gama": 0.9},
            "options of the backend 'mfx': gama unknown. There are inner, inner_mode, inner_options, gamma",
        ),
        ({"gamma": 1.0}, "gamma must be a real number"),
        ({"gamma": {"heads": 0.5, "*": 0.9}}, "no chain is called 'heads'. Chains: blocks"),
        ({"inner": "inductr"}, "inner='inductr': no torch.compile backend has this name. There are .*inductor"),
        ({"inner": "mfx"}, "the inner backend compiles what mfx has rewritten"),
        ({"velocity": nn.Linear(8, 8)}, "velocity modules need the model itself"),
        ({"only": "heads"}, "'heads' in only/skip fits no chain"),
        ({"capture": "dynamo"}, "options of the backend 'mfx': capture unknown"),
        (["gamma"], r"options must be a dictionary such as .*, not \['gamma'\]"),
        ({"inner_options": 3}, "inner_options must be a dictionary, .* not 3"),
        ({"inner_options": {"max_autotune": False}, "inner_mode": "default"}, "takes a mode or options"),
        ({"inner_mode": "fast"}, "Unrecognized mode=fast"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    net = torch.compile(Blocks(), backend=momentum, options=options)
    with pytest.raises(Exception, match=message):
        net(torch.randn(2, 5))


def test_it_is_installed_under_its_name():
    from importlib.metadata import entry_points

    found = {point.name: point.value for point in entry_points(group="torch_dynamo_backends")}
    if "mfx" not in found:
        pytest.skip("mfx is on the path, but not installed")
    assert "mfx" in torch._dynamo.list_backends()
    model, x = Blocks(), torch.randn(2, 5)
    net = torch.compile(model, backend="mfx", options={"inner": "eager"})
    assert torch.equal(net(x), mfx.momentumize(model)(x))


# --- a momentumized net inside of what torch.compile compiles ---------------------------------------------------------


def test_a_momentumized_net_runs_between_the_graphs():
    net, x = mfx.momentumize(Blocks()), torch.randn(4, 5)
    outer = nn.Sequential(nn.Linear(5, 5), net, nn.Linear(3, 3))
    parameters = list(outer.parameters())
    expected = result(outer, parameters, x)
    assert_same(result(torch.compile(outer, backend="eager"), parameters, x), expected)
    assert torch.equal(torch.compile(net, backend="eager")(x), net(x))
