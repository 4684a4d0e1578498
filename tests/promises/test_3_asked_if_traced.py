"""At γ = 0 a model that asks whether it is traced, or a value is a proxy, is answered as in a plain call."""

import copy
import threading
from collections.abc import Callable
from functools import singledispatch
from typing import Any

import pytest
import torch
import transformers
import transformers.utils
from torch import Tensor, fx, nn
from torch.fx import Proxy, _symbolic_trace
from torch.fx._symbolic_trace import is_fx_tracing

import mfx
from tests.models.huggingface import DEPTH, FAMILIES, Family
from tests.models.step import Outcome, assert_bit_equal, train_step

WIDTH = 8


@singledispatch
def dispatched(x: object) -> bool:
    return False


@dispatched.register
def _(x: fx.Proxy) -> bool:
    return True


def matched(x: object) -> bool:
    match x:
        case fx.Proxy():
            return True
    return False


def caught(x: Any) -> bool:
    try:
        return x.tracer is not None
    except AttributeError:
        return False


# All of them are false in a plain call.
QUESTIONS: dict[str, Callable[[Any], bool]] = {
    "isinstance": lambda x: isinstance(x, torch.fx.Proxy),
    "imported": lambda x: isinstance(x, Proxy),
    "in_its_file": lambda x: isinstance(x, torch.fx.proxy.Proxy),
    "several": lambda x: isinstance(x, (fx.Proxy, fx.proxy.Attribute, int)),
    "union": lambda x: isinstance(x, fx.Proxy | int),
    "attribute": lambda x: isinstance(x.shape, fx.Proxy),
    "no_tensor": lambda x: not isinstance(x, Tensor) or not torch.is_tensor(x),
    "type": lambda x: issubclass(type(x), fx.Proxy),
    "class": lambda x: issubclass(x.__class__, fx.Proxy),
    "in_a_list": lambda x: any(isinstance(each, fx.Proxy) for each in (1, x)),
    "match": matched,
    "singledispatch": dispatched,
    "has_node": lambda x: hasattr(x, "node"),
    "has_tracer": lambda x: hasattr(x, "tracer") or getattr(x, "tracer", None) is not None,
    "has_keys": lambda x: hasattr(x, "keys") or hasattr(x + 1, "keys"),
    "has_jax": lambda x: hasattr(x, "jax") or hasattr(x * 2, "jax"),
    "fx": lambda x: _symbolic_trace.is_fx_tracing() or _symbolic_trace.is_fx_symbolic_tracing(),
    "fx_imported": lambda x: is_fx_tracing(),
    "jit": lambda x: torch.jit.is_tracing() or torch.jit.is_scripting(),
    "compiler": lambda x: torch.compiler.is_compiling() or torch.compiler.is_exporting(),
    "transformers": lambda x: transformers.utils.is_tracing(x) or transformers.utils.is_tracing(x + 1),
    "transformers_proxy": lambda x: transformers.utils.is_torch_fx_proxy(x),
}


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if QUESTIONS[self.name](x):
            return x + self.inner(x) * 2
        return x + self.inner(x).tanh()


def blocks(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(name) for _ in range(4)))


def inputs(seed: int = 1, batch: int = 3) -> Tensor:
    return torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_answer_is_the_one_of_a_plain_call(name: str) -> None:
    model = blocks(name)
    assert not QUESTIONS[name](inputs())
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0, capture="symbolic")
    for seed, batch in enumerate((3, 3, 5)):
        assert_bit_equal(train_step(net, [inputs(seed, batch)]), train_step(model, [inputs(seed, batch)]))
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [4]


@pytest.mark.parametrize("name", ["isinstance", "has_node", "fx", "transformers_proxy"])
def test_a_trace_by_torch_fx_itself_gets_its_own_answer(name: str) -> None:
    graph = fx.symbolic_trace(blocks(name)).graph
    assert any(node.target in (torch.mul, "mul") or "mul" in str(node.target) for node in graph.nodes)


def test_an_attribute_that_an_argument_has_is_seen() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks("jit")

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x) * (2 if hasattr(x, "mark") else 3)

    model, marked = Marked(), inputs()
    marked.mark = True  # type: ignore[attr-defined]
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for x in (inputs(), marked, inputs(), marked):
        assert_bit_equal(train_step(net, [x]), train_step(model, [x]))


def test_a_trace_in_another_thread_is_not_disturbed() -> None:
    """While mfx traces here, torch.fx traces there, and gets the answer of its own."""
    begun, done = threading.Event(), threading.Event()
    found: list[bool] = []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            begun.set()
            done.wait(20)
            return x + 1

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found.extend((isinstance(x, fx.Proxy), _symbolic_trace.is_fx_tracing()))
            return x + 1

    def trace() -> None:
        begun.wait(20)
        fx.Tracer().trace(Asks())
        done.set()

    other = threading.Thread(target=trace)
    other.start()
    mfx.momentumize(nn.Sequential(blocks("fx"), Waits()), gamma=0.0, capture="symbolic")
    other.join()
    assert found == [True, True]


# --- what depends on it in transformers -------------------------------------------------------------------------------

CAUSAL = {family.name: family for family in FAMILIES if family.name in ("llama", "mistral", "qwen3")}


def calls(family: Family, length: int, *, cached: bool) -> dict[str, dict[str, Any]]:
    given = {**family.inputs(2, length), "use_cache": cached}
    ones = torch.ones_like(given["input_ids"])
    padded = ones.clone()
    padded[-1, : length // 3] = 0
    return {
        "no mask": given,
        "a mask of ones": {**given, "attention_mask": ones},
        "padded": {**given, "attention_mask": padded},
    }


def step(net: nn.Module, given: dict[str, Any]) -> Outcome:
    return train_step(net, [], given)


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("llama", False),
        ("llama", True),
        ("mistral", False),
        ("qwen3", False),
        pytest.param("mistral", True, marks=pytest.mark.zoo),
        pytest.param("qwen3", True, marks=pytest.mark.zoo),
    ],
)
def test_attention_is_told_that_it_is_causal_as_in_the_model(name: str, cached: bool) -> None:
    family = CAUSAL[name]
    model = family.make()
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for length in (10, 7):
        both = calls(family, length, cached=cached), calls(family, length, cached=cached)
        for given in (given for each in both for given in each.values()):
            assert_bit_equal(step(net, given), step(model, given))
    explained = mfx.explain(net, **calls(family, 10, cached=cached)["no mask"])
    assert [len(chain.steps) for chain in explained.chains] == [2 * DEPTH]


def test_calls_with_and_without_a_mask_have_the_same_chains() -> None:
    """Another route would cut those of T5 at other places."""
    config = transformers.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config)
    ids = torch.randint(3, 99, (2, 9))
    given = {"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    net = mfx.momentumize(copy.deepcopy(model), gamma=0.0)
    for kwargs in given:
        assert_bit_equal(step(net, kwargs), step(model, kwargs))
    kept = mfx.momentumize(copy.deepcopy(model), gamma=0.9, memory_budget=1.0)
    expected = [step(kept, kwargs) for kwargs in given]
    for order in ([0, 1], [1, 0]):
        net = mfx.momentumize(copy.deepcopy(model), gamma=0.9)
        for at in order:
            assert_bit_equal(step(net, given[at]), expected[at])
