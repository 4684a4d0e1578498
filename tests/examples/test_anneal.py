import json
from dataclasses import replace

import pytest
import torch
from tqdm import tqdm

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import mfx
from examples import anneal


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anneal")
    png, file = folder / "a.png", folder / "a.json"
    runs = anneal.main(["--quick", "--seeds", "1", "--png", str(png), "--json", str(file)])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(file.read_text())) == len(runs)
    return {run.variant: run for run in runs}


def test_annealing_starts_from_the_trained_function_and_ends_at_the_same_gamma(runs):
    assert runs["annealed"].accuracy[0] == runs["annealed"].start == runs["plain"].accuracy[0]
    assert runs["annealed"].gammas[0] == 0
    assert runs["annealed"].gammas[-1] == runs["fixed"].gammas[-1] == 0.9


def test_gamma_at_once_is_another_function(runs):
    """In a chain of four steps the branches then count 0.34, 0.27, 0.19 and 0.10 of what they did."""
    assert runs["fixed"].accuracy[0] < runs["fixed"].start - 0.1


def test_annealing_ends_where_plain_fine_tuning_does(runs):
    """Of 360 test images at 97 %, two independent networks differ by √(2·0.97·0.03/360) = 1.3 %: three times that."""
    assert anneal.last_third(runs["annealed"]) > anneal.last_third(runs["plain"]) - 0.04


def test_the_pretrained_network_stays_as_it_is():
    torch.manual_seed(0)
    setting = replace(anneal.QUICK, finetuning=2, annealing=1, every=1)
    model = anneal.resnet(setting.blocks)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with tqdm(disable=True) as bar:
        run = anneal.finetune(model, "annealed", 0, setting, bar)
    assert run.steps == (0, 1, 2)
    assert run.gammas == (0.0, 0.9, 0.9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_network_is_nearly_all_chains():
    found = mfx.explain(anneal.resnet((8, 4)))
    assert {chain.name: len(chain.steps) for chain in found.chains} == {"layer1": 8, "layer2": 3}
