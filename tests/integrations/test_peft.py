"""Low-rank adapters of the package peft, put on a model before or after it is momentumized."""

import pytest
import torch
import transformers

import mfx
from tests.models.huggingface import FAMILIES
from tests.models.step import assert_bit_equal
from tests.models.test_huggingface import call, numbers, train

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FAMILY = {family.name: family for family in FAMILIES}
ONE_LAYER = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "t5": {"num_layers": 1}}
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v", "wi"]}


def make(name):
    """The model with one layer, which has two steps."""
    return FAMILY[name].make(**ONE_LAYER[name])


def adapted(model, name):
    """With adapters whose two factors are both drawn: one of them begins at 0, and hides the gradient of the other."""
    transformers.set_seed(3)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[name], lora_dropout=0.1, fan_in_fan_out=name == "gpt2")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, p in wrapped.named_parameters():
            if "lora_" in key:
                p.normal_(std=0.1)
    return wrapped


def before(name, **options):
    wrapped = adapted(make(name), name)
    return mfx.momentumize(wrapped, **options)


def inside(name, **options):
    """Adapters first; then the model inside of peft's wrapper."""
    wrapped = adapted(make(name), name)
    wrapped.base_model.model = mfx.momentumize(wrapped.base_model.model, **options)
    return wrapped


def after(name, **options):
    return adapted(mfx.momentumize(make(name), **options), name)


def after_a_call(name, **options):
    net = mfx.momentumize(make(name), **options)
    call(net, FAMILY[name].inputs())
    return adapted(net, name)


SLOW = pytest.mark.zoo
ORDERS = [
    pytest.param(before, marks=SLOW),
    pytest.param(inside, marks=SLOW),
    after,
    pytest.param(after_a_call, marks=SLOW),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name", ["llama", pytest.param("gpt2", marks=pytest.mark.zoo), pytest.param("t5", marks=pytest.mark.zoo)]
)
def test_adapters(order, name):
    inputs = FAMILY[name].inputs()
    net, kept = order(name, verify="raise"), order(name, memory_budget=1.0)
    actual = train(net, inputs)
    assert_bit_equal(actual, train(kept, inputs))
    for key, grad in actual.grads.items():
        assert (grad is not None) == ("lora_" in key), key
        assert grad is None or grad.any(), key
    plain = train(adapted(make(name), name), inputs)
    assert_bit_equal(train(order(name, gamma=0.0), inputs), plain)
    assert not torch.equal(actual.outputs[0], plain.outputs[0]), "γ changes nothing"


@torch.no_grad()  # loaded adapters are frozen; else only one of the two nets would run for a backward pass
@pytest.mark.parametrize("order", [pytest.param(inside, marks=SLOW), after])
def test_saved_adapters(order, tmp_path):
    family = FAMILY["llama"]
    net = order("llama").eval()
    expected = numbers(call(net, family.inputs()))
    net.save_pretrained(tmp_path)
    base = mfx.momentumize(make("llama"))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert all(map(torch.equal, numbers(call(loaded, family.inputs())), expected))
    with loaded.disable_adapter():
        without = numbers(call(loaded, family.inputs()))
    fresh = mfx.momentumize(make("llama")).eval()
    assert all(map(torch.equal, without, numbers(call(fresh, family.inputs()))))
    assert not torch.equal(without[0], expected[0])


@pytest.mark.parametrize("order", [pytest.param(inside, marks=SLOW), after])
def test_generate_and_merge(order):
    family = FAMILY["llama"]
    prompt = {"input_ids": family.inputs()["input_ids"]}
    options = {"max_new_tokens": 4, "do_sample": False}
    net, kept = order("llama").eval(), order("llama", memory_budget=1.0).eval()
    assert torch.equal(net.generate(**prompt, **options), kept.generate(**prompt, **options))
    found, expected = net.merge_and_unload(), kept.merge_and_unload()
    assert type(found) is type(make("llama"))
    assert all(map(torch.equal, numbers(call(found, prompt)), numbers(call(expected, prompt))))
