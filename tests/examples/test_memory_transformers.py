import json

import pytest

pytest.importorskip("vit_pytorch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from examples import memory_transformers


def test_momentum_keeps_the_same_at_any_depth_and_plain_training_does_not(tmp_path, capsys):
    png, file = tmp_path / "a.png", tmp_path / "a.json"
    arguments = ["--quick", "--models", "vit_pytorch ViT", "--png", str(png), "--json", str(file)]
    points = memory_transformers.main(arguments)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(file.read_text())) == len(points) == 2 * 4
    per_layer = {
        variant: memory_transformers.slope([point for point in points if point.variant == variant])
        for variant in memory_transformers.VARIANTS
    }
    state = 2 * 65 * memory_transformers.WIDTH * 4  # bytes, at this batch size
    assert per_layer["momentum, float"] == 0
    # Two steps per layer, log2(10/9) bits each, in words of 32 bits that fill up within 8 layers.
    assert per_layer["momentum, exact"] <= state
    assert per_layer["checkpoint"] >= state
    assert per_layer["plain"] > 10 * state
    assert capsys.readouterr().out.count("| vit_pytorch ViT |") == 4
