"""transformers.Trainer trains a momentumized model with no special code."""

import pytest
import torch
import transformers

import mfx
from tests.models.huggingface import FAMILIES

pytest.importorskip("accelerate")

# The trainer warns about its own surroundings: pinned memory without a GPU, deprecations of its dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

FAMILY = {family.name: family for family in FAMILIES}


class Rows(torch.utils.data.Dataset):
    """Single rows of one batch."""

    def __init__(self, family) -> None:
        self.batch = family.inputs(batch=8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int):
        return {name: values[index] for name, values in self.batch.items()}


def trained(net, family, path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=1,
        save_strategy="no",
        **options,
    )
    trainer = transformers.Trainer(model=net, args=arguments, train_dataset=Rows(family), eval_dataset=Rows(family))
    trainer.train()
    return trainer


def assert_same_weights(found, expected) -> None:
    assert list(found.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["gpt2", pytest.param("bert", marks=pytest.mark.zoo)])
def test_the_weights_of_ordinary_backpropagation(name, tmp_path):
    family = FAMILY[name]
    untouched = family.make()
    net = mfx.momentumize(family.make(), verify="raise")
    kept = mfx.momentumize(family.make(), memory_budget=1.0)
    found, expected = trained(net, family, tmp_path), trained(kept, family, tmp_path)
    assert_same_weights(net, kept)
    assert not torch.equal(next(net.parameters()), next(untouched.parameters())), "nothing was trained"
    assert found.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]
    found.save_model(str(tmp_path))
    assert_same_weights(type(net).from_pretrained(tmp_path), kept)


def test_gamma_zero_is_the_model(tmp_path):
    family = FAMILY["gpt2"]
    model, net = family.make(), mfx.momentumize(family.make(), gamma=0.0)
    trained(model, family, tmp_path)
    trained(net, family, tmp_path)
    assert_same_weights(net, model)


def test_accumulation_and_the_models_own_checkpointing(tmp_path):
    family = FAMILY["gpt2"]
    net, kept = mfx.momentumize(family.make()), mfx.momentumize(family.make(), memory_budget=1.0)
    with pytest.warns(UserWarning, match="gradient checkpointing is switched on in this"):
        trained(net, family, tmp_path, gradient_accumulation_steps=2, gradient_checkpointing=True)
    trained(kept, family, tmp_path, gradient_accumulation_steps=2)
    assert_same_weights(net, kept)
