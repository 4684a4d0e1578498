"""Hugging Face's transformers, random weights, default settings: every family judged by every verdict.

By default some families, others every day; all of them with ``-m zoo``.
"""

import copy
import inspect
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping

import pytest
import torch
import transformers
from torch import nn

import mfx
from tests import sampling
from tests.models.huggingface import DEPTH, FAMILIES, Family, tokens
from tests.models.step import Outcome, assert_bit_equal, deterministic, loss_of, tensors_in
from tests.oracles import assert_close_grads

GAMMA = 0.9

# Where transformers computes the same function in another way: T <= 6 layers of sums of at most 2·32 products, each of
# relative error eps/2 and all of one sign in the worst case, forward and backward: 6·64·eps, times a condition number
# of these networks of up to 10.
ROUNDING = 6 * 64 * 10


# A value that steps capture and somebody else reads has its gradients summed in another order: T <= 9 terms of relative
# error 2⁻²⁴ each, carried through as many layers: 9·9·2⁻²⁴ = 5e-6.
SUMMED_ANOTHER_WAY = 5e-6


# --- one call -----------------------------------------------------------------------------------------------------


def call(net: nn.Module, inputs, *, seed: int = 2, **more):
    torch.manual_seed(seed)
    with deterministic():
        return net(**inputs, **more)


def train(net: nn.Module, inputs, **more) -> Outcome:
    """One forward and backward pass through everything that the model returns, its caches included."""
    before = copy.deepcopy(net.state_dict())
    outputs = numbers(call(net, inputs, **more))
    with deterministic():
        loss_of([x for x in outputs if x.requires_grad]).backward()
    rng = torch.get_rng_state()
    grads = {name: p.grad for name, p in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(before)
    for p in net.parameters():
        p.grad = None
    return Outcome([x.detach() for x in outputs], grads, state, rng)


def numbers(outputs) -> list[torch.Tensor]:
    """Every tensor of floating point numbers in a model's output, those in caches too."""
    if not isinstance(outputs, Mapping):
        return tensors_in(outputs)
    plain = {name: value for name, value in outputs.items() if not isinstance(value, transformers.Cache)}
    caches = [value for value in outputs.values() if isinstance(value, transformers.Cache)]
    return tensors_in(plain) + [x for cache in caches for x in cached(cache)]


def cached(cache) -> list[torch.Tensor]:
    if isinstance(cache, transformers.EncoderDecoderCache):
        return cached(cache.self_attention_cache) + cached(cache.cross_attention_cache)
    names = ("keys", "values", "conv_states", "recurrent_states")
    values = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return tensors_in(values)


def momentum(model: nn.Module, **options) -> nn.Module:
    return mfx.momentumize(model, gamma=GAMMA, verify="raise", **options)


def reference(model: nn.Module) -> nn.Module:
    """The same momentum network by ordinary backpropagation."""
    return mfx.momentumize(model, gamma=GAMMA, memory_budget=1.0)


def assert_equal(family: Family, actual: Outcome, expected: Outcome) -> None:
    """Bit for bit, unless the model computes something else while it is captured."""
    if family.compiles_alike:
        return assert_bit_equal(actual, expected)
    assert torch.equal(actual.rng, expected.rng)
    for a, b in zip(actual.outputs, expected.outputs, strict=True):
        assert float((a - b).norm()) <= rounding(family) * float(b.norm())
    assert_close_grads(actual.grads, expected.grads, rounding(family), noise=1e-3)
    return None


def rounding(family: Family) -> float:
    """Return the relative distance that two ways to compute the model may have."""
    return 0.0 if family.compiles_alike else ROUNDING * torch.finfo(family.dtype).eps


# --- the verdicts -------------------------------------------------------------------------------------------------


def assert_chains(family: Family) -> None:
    """Names and lengths, and a net that is in everything but its function the model."""
    model = family.make()
    keys = list(model.state_dict())
    net = momentum(model)
    found = mfx.explain(net, **family.inputs())
    assert {chain.name: len(chain.steps) for chain in found.chains} == dict(family.chains)
    assert type(net) is type(model)
    assert net.config.to_dict() == model.config.to_dict()
    assert inspect.signature(net.forward) == inspect.signature(model.forward)
    assert list(net.state_dict()) == keys == list(model.state_dict())
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))
    assert_tied_alike(net, model)
    expected, actual = call(model, family.inputs()), call(net, family.inputs())
    assert type(actual) is type(expected)
    assert list(actual) == list(expected)
    assert [type(value) for value in actual.values()] == [type(value) for value in expected.values()]
    assert not all(map(torch.equal, numbers(actual), numbers(expected))), "γ changes nothing"


def assert_tied_alike(net: nn.Module, model: nn.Module) -> None:
    """The same names for the same tensors: what is tied in the model is tied in the net."""
    assert names_of_tensors(net) == names_of_tensors(model)


def names_of_tensors(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return list(names.values())


def assert_gamma_zero_is_the_model(family: Family) -> None:
    model, inputs = family.make(), family.inputs()
    net = mfx.momentumize(model, gamma=0.0)
    assert_equal(family, train(net, inputs), train(model, inputs))


def assert_exact_gradients(family: Family) -> None:
    model, inputs = family.make(), family.inputs()
    assert_bit_equal(train(momentum(model), inputs), train(reference(model), inputs))


def assert_any_call(family: Family) -> None:
    """Other sizes, masks and modes in turn: at γ = 0 the model, above it a net that was made for the call."""
    model = family.make()
    at_zero, net = mfx.momentumize(model, gamma=0.0), momentum(model)
    for number, inputs in enumerate(calls_of(family)):
        for module in (model, at_zero, net):
            module.train(number != 1)
        assert_equal(family, train(at_zero, inputs), train(model, inputs))
        if number == 2:
            with torch.no_grad():
                assert_near(family, numbers(call(at_zero.forward, inputs)), numbers(call(model, inputs)))
        if number in (1, 3):
            assert_bit_equal(train(net, inputs), train(reference(model), inputs))


def calls_of(family: Family) -> Iterator[dict]:
    yield family.inputs()
    yield family.inputs(3, 7 if family.is_text else 10)
    inputs = family.inputs(2, 9)
    if family.is_text:
        mask = torch.ones_like(inputs["input_ids"])
        yield {**inputs, "attention_mask": mask}
        yield {**inputs, "attention_mask": mask.index_fill(1, torch.tensor([7, 8]), 0)}
    yield (
        {key: None if key == "labels" else value for key, value in family.inputs(1, 9).items()}
        if not family.is_coder
        else inputs
    )


def signature(family: Family) -> Mapping:
    return inspect.signature(getattr(transformers, family.model).forward).parameters


def assert_near(family: Family, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    bound = rounding(family)
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm()) <= bound * float(b.norm())


def assert_copies(family: Family) -> None:
    """deepcopy, pickle and a round trip through the disk compute what the net does."""
    model, inputs = family.make(), family.inputs()
    net = momentum(model)
    expected = train(net, inputs)
    copies = [copy.deepcopy(net)]
    if not family.hooks_itself:
        copies.append(pickle.loads(pickle.dumps(net)))
    for copied in copies:
        assert not {id(p) for p in copied.parameters()} & {id(p) for p in net.parameters()}
        assert_tied_alike(copied, model)
        assert_bit_equal(train(copied, inputs), expected)


def assert_saved(family: Family) -> None:
    """save_pretrained, from_pretrained and load_state_dict, from and to the net."""
    model, inputs = family.make(), family.inputs()
    net = momentum(model)
    expected = train(net, inputs)
    with tempfile.TemporaryDirectory() as path:
        net.save_pretrained(path)
        loaded = type(model).from_pretrained(path, dtype=model.dtype).train()
    for name, p in model.named_parameters():  # which transformers does not keep
        loaded.get_parameter(name).requires_grad_(p.requires_grad)
    assert_tied_alike(loaded, model)
    assert_bit_equal(train(momentum(loaded), inputs), expected)
    other = momentum(family.make())
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(net.state_dict())
    assert_bit_equal(train(other, inputs), expected)


def assert_generates(family: Family) -> None:
    """Greedy search before, beam search after the first call: the tokens and the scores."""
    model = family.make().eval()
    at_zero, net, kept = mfx.momentumize(model, gamma=0.0), momentum(model), reference(model)
    assert_near_generated(family, generated(at_zero, family, beams=1), generated(model, family, beams=1))
    assert_same_generated(generated(net, family, beams=1), generated(kept, family, beams=1))
    call(net, family.inputs())
    assert_same_generated(generated(net, family, beams=3), generated(kept, family, beams=3))


def generated(net: nn.Module, family: Family, beams: int):
    inputs = {key: value for key, value in family.inputs().items() if key != "labels"}
    more = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "min_new_tokens": 5}
    torch.manual_seed(0)
    return net.generate(**inputs, **more, return_dict_in_generate=True, output_scores=True)


def assert_same_generated(actual, expected) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(map(torch.equal, actual.scores, expected.scores))


def assert_near_generated(family: Family, actual, expected) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    assert_near(family, [x.clamp(min=-1e9) for x in actual.scores], [x.clamp(min=-1e9) for x in expected.scores])


def assert_taps(family: Family) -> None:
    """Hidden states and attention weights, with gradients through all of them."""
    attends = family.name not in ("convnextv2", "mamba")
    model = family.make(**{"attn_implementation": "eager"} if attends else {})
    inputs = family.inputs()
    asked = {"output_hidden_states": True, **({"output_attentions": True} if attends else {})}
    net0, net, kept = mfx.momentumize(model, gamma=0.0), momentum(model), reference(model)
    expected, actual = train(model, inputs, **asked), train(net0, inputs, **asked)
    assert len(expected.outputs) > DEPTH, "no taps"
    assert_near(family, actual.outputs, expected.outputs)
    assert_close_grads(actual.grads, expected.grads, max(SUMMED_ANOTHER_WAY, rounding(family)), noise=1e-3)
    assert_bit_equal(train(net, inputs, **asked), train(kept, inputs, **asked))


def assert_checkpointed(family: Family) -> None:
    """The model's own checkpointing, switched on before or after: the same gradients."""
    model, inputs = family.make(), family.inputs()
    if not model.supports_gradient_checkpointing:
        pytest.skip("the model has no checkpointing")
    quiet = {"use_cache": False} if "use_cache" in signature(family) else {}
    expected = train(reference(model), inputs, **quiet)
    net = momentum(model)
    checkpoint(net)
    warnings.filterwarnings("ignore", message="mfx: gradient checkpointing is switched on")
    assert_bit_equal(train(net, inputs, **quiet), expected)
    checkpoint(model)
    assert_bit_equal(train(momentum(model), inputs, **quiet), expected)
    assert_equal(family, train(mfx.momentumize(model, gamma=0.0), inputs, **quiet), train(model, inputs, **quiet))


def checkpoint(model: nn.Module) -> None:
    """Under its name in transformers 5, and before."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def assert_cached(family: Family) -> None:
    """A cache returned by one call and given to the next, with gradients through both."""
    model = family.make()
    for net, same in ((mfx.momentumize(model, gamma=0.0), model), (momentum(model), reference(model))):
        assert_same_in_two_calls(family, net, same)


def assert_same_in_two_calls(family: Family, net: nn.Module, same: nn.Module) -> None:
    actual, expected = two_calls(family, net), two_calls(family, same)
    bound = rounding(family)
    for a, b in zip(actual[0], expected[0], strict=True):
        assert float((a - b).norm()) <= bound * float(b.norm())
    assert_close_grads(actual[1], expected[1], max(SUMMED_ANOTHER_WAY, rounding(family)), noise=1e-3)


def two_calls(family: Family, net: nn.Module):
    prompt = {key: value for key, value in family.inputs().items() if key != "labels"}
    net.eval()
    if net.config.is_encoder_decoder:
        start = {**prompt, "decoder_input_ids": tokens_like(2, 4)}
        first = call(net, start, use_cache=True)
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
        more = {"encoder_outputs": encoded, "decoder_input_ids": tokens_like(2, 1)}
    else:
        first = call(net, prompt, use_cache=True)
        more = {"input_ids": tokens_like(2, 2)}
    before = numbers(first)
    second = call(net, more, past_key_values=first.past_key_values, use_cache=True)
    outputs = [*before, *numbers(second)]
    loss_of(outputs).backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = None
    return [x.detach() for x in outputs], found


def tokens_like(batch: int, length: int) -> torch.Tensor:
    return tokens(batch, length, generator=torch.Generator().manual_seed(7))


VERDICTS = {
    "chains": assert_chains,
    "gamma0": assert_gamma_zero_is_the_model,
    "exact": assert_exact_gradients,
    "calls": assert_any_call,
    "copies": assert_copies,
    "saved": assert_saved,
    "generate": assert_generates,
    "taps": assert_taps,
    "cache": assert_cached,
    "checkpointing": assert_checkpointed,
}
SAMPLE = 1  # families a day
DAILY = ("chains", "gamma0", "exact")  # of the other verdicts, one
OTHERS = tuple(name for name in VERDICTS if name not in DAILY)


def params() -> Iterator:
    chosen, (other,) = sampling.sample(FAMILIES, SAMPLE), sampling.sample(OTHERS, 1)
    for family in FAMILIES:
        for name, verdict in VERDICTS.items():
            if name == "generate" and not family.generates:
                continue
            if name == "cache" and not family.has_cache:
                continue
            always = name == "exact" and family.name in ALWAYS
            sampled = family in chosen and (name in DAILY or name == other)
            marks = () if always or sampled else pytest.mark.zoo
            suffix = f"-sample{sampling.number()}" if sampled and not always else ""
            yield pytest.param(family, verdict, id=f"{family.name}-{name}{suffix}", marks=marks)


ALWAYS = ("llama", "t5")


# Older versions of transformers know no other name.
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
# Mamba asks cached functions which packages are there.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
@pytest.mark.parametrize("family, verdict", list(params()))
def test_huggingface(family, verdict):
    verdict(family)


# One for the first sizes, one for all others, and one where the batch has a single row, which Dynamo sets apart;
# each with a mask and without.
GRAPHS_OF_ANY_SIZE = 3 * 2


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
@sampling.sampled("family", {family.name: family for family in FAMILIES}, 1)
def test_twenty_shapes_in_a_row(family):
    """Batch sizes, lengths, masks and their absence: always the model, by a few graphs."""
    model = family.make()
    net = mfx.momentumize(model, gamma=0.0)
    for number, inputs in enumerate(shapes_of(family)):
        found, expected = ([x.detach() for x in numbers(call(each, inputs))] for each in (net, model))
        assert_near(family, found, expected)
        if number % 8 == 7:
            assert_equal(family, train(net, inputs), train(model, inputs))
    assert number == 19
    if not family.unrolls:
        assert len(mfx.graphs(net)) <= GRAPHS_OF_ANY_SIZE


def shapes_of(family: Family) -> Iterator[dict]:
    masks = family.is_text and "attention_mask" in signature(family)
    for number in range(20):
        inputs = family.inputs(1 + number * 3 % 5, 6 + number * 5 % 11)
        if masks and number % 3:
            ones = torch.ones_like(inputs["input_ids"])
            inputs["attention_mask"] = (
                ones.index_fill(1, torch.arange(5, ones.shape[1]), 0) if number % 3 == 1 else ones
            )
        elif masks:
            inputs["attention_mask"] = None
        yield inputs
