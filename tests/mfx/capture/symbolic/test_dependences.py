"""A graph is for calls in which the model's code finds what it found: modes, dtypes, values of variables."""

import copy
import pickle
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mfx

WIDTH = 4
QUESTIONS = {
    "gradients": lambda model: not torch.is_grad_enabled(),
    "autocast": lambda model: torch.is_autocast_enabled("cpu"),
    "autocast's dtype": lambda model: torch.get_autocast_dtype("cpu") == torch.float16,
    "determinism": lambda model: torch.are_deterministic_algorithms_enabled(),
    "default dtype": lambda model: torch.get_default_dtype() == torch.float64,
    "dtype": lambda model: next(model.parameters()).dtype == torch.float64,
    "kind": lambda model: next(model.parameters()).element_size() == 8,
}


class Model(nn.Module):
    def __init__(self, question):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.question = question

    def forward(self, x):
        for fc in self.fc:
            x = x + fc(x).tanh() * (3.0 if QUESTIONS[self.question](self) else 1.0)
        return x


def change(question, models):
    if question in ("dtype", "kind"):
        for model in models:
            model.double()
        return
    {
        "gradients": lambda: torch.set_grad_enabled(False),
        "autocast": lambda: torch.set_autocast_enabled("cpu", True),
        "autocast's dtype": lambda: torch.set_autocast_dtype("cpu", torch.float16),
        "determinism": lambda: torch.use_deterministic_algorithms(True),
        "default dtype": lambda: torch.set_default_dtype(torch.float64),
    }[question]()


@pytest.fixture(autouse=True)
def switches_put_back():
    dtype = torch.get_autocast_dtype("cpu")
    yield
    torch.set_grad_enabled(True)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", dtype)
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("question", QUESTIONS)
def test_another_answer_is_another_graph(question):
    model = Model(question)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="symbolic")
    x = torch.randn(2, WIDTH)
    assert torch.equal(net(x), model(x))
    change(question, (model, net))
    x = x.to(next(model.parameters()).dtype)
    for _ in range(2):
        assert torch.equal(net(x), model(x))


# --- variables outside of the model ------------------------------------------------------------------------------

SCALE, TABLE, NUMBERS, TENSOR = 1.0, {"scale": 1.0}, [1.0], torch.ones(WIDTH)
VARIABLE = ContextVar("scale", default=1.0)


class Settings:
    scale = 1.0

    def __init__(self):
        self.own, self.inner = 1.0, SimpleNamespace(scale=1.0)


SETTINGS = Settings()


def scale():
    return SCALE


def other_scale():
    return 2.0


def set_global(name, value):
    globals()[name] = value


# What the forward reads, and how it is changed and put back.
READS = {
    "number": (lambda: SCALE, lambda value: set_global("SCALE", value)),
    "by a function": (lambda: scale(), lambda value: set_global("SCALE", value)),
    "function": (lambda: scale(), lambda value: set_global("scale", other_scale if value == 2.0 else scale_of_one)),
    "dictionary": (lambda: TABLE["scale"], lambda value: TABLE.update(scale=value)),
    "list": (lambda: NUMBERS[0], lambda value: NUMBERS.__setitem__(0, value)),
    "tensor": (lambda: TENSOR, lambda value: set_global("TENSOR", torch.full((WIDTH,), value))),
    "written tensor": (lambda: TENSOR * 2, lambda value: TENSOR.fill_(value)),
    "class": (lambda: Settings.scale, lambda value: setattr(Settings, "scale", value)),
    "object": (lambda: SETTINGS.own, lambda value: setattr(SETTINGS, "own", value)),
    "inner object": (lambda: SETTINGS.inner.scale, lambda value: setattr(SETTINGS.inner, "scale", value)),
    "context": (lambda: VARIABLE.get(), lambda value: VARIABLE.set(value)),
}
scale_of_one = scale


class Scaled(nn.Module):
    def __init__(self, read):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.read = read

    def forward(self, x):
        for fc in self.fc:
            x = x + fc(x).tanh() * READS[self.read][0]()
        return x


@pytest.mark.parametrize("read", READS)
def test_a_variable_that_is_changed_is_another_graph(read):
    model, (_, write) = Scaled(read), READS[read]
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    x = torch.randn(2, WIDTH)
    try:
        outputs = []
        for value in (1.0, 2.0, 2.0, 1.0):
            write(value)
            outputs.append(net(x))
            assert torch.equal(outputs[-1], model(x)), value
        assert not torch.equal(outputs[0], outputs[1])
    finally:
        write(1.0)


def test_a_copy_from_a_file_knows_the_values():
    net = mfx.momentumize(Scaled("number"), gamma=0.0)
    x = torch.randn(2, WIDTH)
    net(x)
    data = pickle.dumps(net)
    try:
        set_global("SCALE", 3.0)
        assert torch.equal(pickle.loads(data)(x), Scaled("number")(x))
    finally:
        set_global("SCALE", 1.0)


class Typed(nn.Module):
    """Makes a tensor of the dtype of a value inside, as caches do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.key = Scaled("number").fc, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if len(x) > 9:  # so that the trace is for shapes
            return x
        key = self.key(x)
        key = torch.cat([torch.tensor([], dtype=key.dtype), key.flatten()])
        for fc in self.fc:
            x = x + fc(x).tanh()
        return x, key


def test_a_dtype_that_was_used_is_that_of_each_call():
    model = Typed()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="symbolic")
    x = torch.randn(2, WIDTH)
    for is_half, dtype in ((False, torch.float32), (True, torch.float32), (False, torch.bfloat16)):
        for each in (model, net):
            each.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            found, expected = net(x.to(dtype)), model(x.to(dtype))
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
        assert all(map(torch.equal, found, expected))


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")
def test_what_requires_a_gradient_is_known_in_each_call():
    class Asks(Typed):
        def forward(self, x):
            for fc in self.fc:
                x = x + fc(x).tanh()
                if x.requires_grad:
                    x = x * 2
            return x

    model = Asks()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for with_gradients in (True, False, True):
        with torch.set_grad_enabled(with_gradients):
            x = torch.randn(2, WIDTH)
            assert torch.equal(net(x), model(x))


class Averages(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, mean = Scaled("number").fc, torch.ones(WIDTH)
        if kind == "buffer":
            self.register_buffer("mean", mean)
        else:
            self.mean = nn.Parameter(mean, requires_grad=False) if kind == "parameter" else mean

    def forward(self, x):
        self.mean.data = self.mean.data * 0.5
        for fc in self.fc:
            x = x + fc(x).tanh() * self.mean
        return x


@pytest.mark.filterwarnings("ignore:mfx:UserWarning")
@pytest.mark.parametrize("capture", ["auto", "dynamo"])
@pytest.mark.parametrize("kind", ["attribute", "buffer", "parameter"])
def test_data_that_a_forward_sets(kind, capture):
    model = Averages(kind)
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture=capture)
    for _ in range(3):
        x = torch.randn(2, WIDTH)
        assert torch.equal(net(x), model(x))
    assert torch.equal(net.mean, model.mean)
