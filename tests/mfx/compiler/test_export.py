"""torch.export, AOTInductor and ONNX: the momentum network for inference, as the recurrence by ordinary operations."""

import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import mfx
from tests.sampling import grid

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo asks
WIDTH, DEPTH = 8, 4


class Blocks(nn.Module):
    """An embedding, blocks x + f(x), and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout()) for _ in range(DEPTH)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def resnet18():
    models = pytest.importorskip("torchvision.models")
    return models.resnet18(num_classes=10)


def family(name):
    pytest.importorskip("transformers")
    from tests.models.huggingface import FAMILIES

    (found,) = (family for family in FAMILIES if family.name == name)
    return found.make()


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape):
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(1))


# What makes the model, how it is captured, and what makes its input for a batch size.
NETS = {
    "hand-written": (Blocks, "symbolic", lambda batch: numbers(batch, 5)),
    "hand-written by Dynamo": (Blocks, "dynamo", lambda batch: numbers(batch, 5)),
    "resnet18": (resnet18, "auto", lambda batch: numbers(batch, 3, 64, 64)),
    "bert": (partial(family, "bert"), "auto", lambda batch: tokens(batch, 7)),
    "vit": (partial(family, "vit"), "auto", lambda batch: numbers(batch, 3, 32, 32)),
}


def made(net):
    """The net for inference, and what makes its input."""
    make, capture, inputs = net
    torch.manual_seed(0)
    return mfx.momentumize(make(), capture=capture).eval(), inputs


def exported(net, x, *, grad=False):
    with torch.set_grad_enabled(grad):
        return export(net, (x,), dynamic_shapes=({0: Dim("batch", max=64)},))


def output(function, x):
    with torch.no_grad():
        found = function(x)
    return found if isinstance(found, torch.Tensor) else found[0]


@grid(3, net=NETS, grad=[True, False], called=[True, False])
def test_export(net, grad, called):
    net, inputs = made(net)
    if called:
        net(inputs(3))
    graphs = {name: module.code for name, module in mfx.graphs(net).items()}
    program = exported(net, inputs(2), grad=grad)
    assert {name: module.code for name, module in mfx.graphs(net).items()} == graphs, "what was exported is kept"
    assert set(program.state_dict) == set(net.state_dict())
    for batch in (2, 5):
        x = inputs(batch)
        assert torch.equal(output(program.module(), x), output(net, x))
        with mfx.original(net):
            assert not torch.allclose(output(program.module(), x), output(net, x), atol=1e-3), "γ changes nothing"


def test_a_file_of_it():
    net, inputs = made(NETS["hand-written"])
    file = io.BytesIO()
    torch.export.save(exported(net, inputs(2)), file)
    file.seek(0)
    assert torch.equal(output(torch.export.load(file).module(), inputs(3)), output(net, inputs(3)))


def test_the_exported_network_can_be_trained():
    net = mfx.momentumize(Blocks().double(), arithmetic="float", memory_budget=1.0)
    net.blocks.eval()  # the masks of dropout would differ
    x = numbers(4, 5).double()
    program = export(net, (x,)).module()
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    found = torch.autograd.grad(program(x).sum(), [program.get_parameter(name) for name, _ in net.named_parameters()])
    for a, b in zip(found, expected, strict=True):
        # The same recurrence in float64, with its products rounded in another order in each of 4 steps and back; the
        # condition of these networks is below 1000.
        torch.testing.assert_close(a, b, rtol=1000 * 8 * 2.0**-52, atol=1000 * 8 * 2.0**-52)


class Broadcast(nn.Module):
    """One step changes the stream's shape, by a tensor that forward makes anew."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            y = block(x)
            x = x + (y.unsqueeze(0) * torch.tensor([[[1.0]], [[2.0]]]) if number == 2 else y)
        return x


# torch.export takes the constant of a trace for an attribute that forward sets; other steps are named as they are left.
@pytest.mark.filterwarnings("ignore:The tensor attribute self._tensor_constant", "ignore:mfx. the residual add")
def test_shapes_are_looked_at_and_constants_have_values():
    torch.manual_seed(0)
    model, x = Broadcast().eval(), numbers(2, WIDTH)
    program = export(mfx.momentumize(model).eval(), (x,))
    assert torch.equal(output(program.module(), x), output(mfx.momentumize(model), x))


def test_strict_tracing_says_what_to_do():
    net, inputs = made(NETS["hand-written"])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="strict=False"):
        export(net, (inputs(2),), strict=True)


def assert_near(actual, expected):
    # Sums of at most 64·9 products each in another order in the few dozen layers of these networks, of numbers of
    # order 1; errors of either sign add up like a random walk.
    torch.testing.assert_close(actual, expected, rtol=0, atol=(64 * 9 * 40) ** 0.5 * 2.0**-23)


@pytest.mark.parametrize("name", [n if n == "hand-written" else pytest.param(n, marks=pytest.mark.zoo) for n in NETS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # its own
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, inputs = made(NETS[name])
    program = torch.onnx.export(
        net, (inputs(2),), dynamo=True, dynamic_shapes=({0: Dim.DYNAMIC},), optimize=False, verbose=False
    )
    program.save(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = inputs(batch)
        found, *_ = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_near(torch.from_numpy(found), output(net, x))


@pytest.mark.zoo  # compiles C++ for minutes
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # its own
def test_ahead_of_time(name, tmp_path):
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no C++ compiler: {error}")
    net, inputs = made(NETS[name])
    path = torch._inductor.aoti_compile_and_package(exported(net, inputs(2)), package_path=str(tmp_path / "net.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (2, 5):
        assert_near(output(compiled, inputs(batch)), output(net, inputs(batch)))
