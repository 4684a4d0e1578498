import json

import pytest

pytest.importorskip("matplotlib")

from examples import compile_pipeline


def test_the_backend_is_the_momentumized_network_and_keeps_as_little(tmp_path, capsys):
    png, file = tmp_path / "a.png", tmp_path / "a.json"
    pipelines = ["eager", "momentumize", "mfx, eager inside"]
    arguments = ["--depths", "8", "16", "--batch", "1", "--steps", "1", "--png", str(png), "--json", str(file)]
    rows = compile_pipeline.main([*arguments, "--pipelines", *pipelines])
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(file.read_text())) == len(rows) == 6
    assert capsys.readouterr().out.count("\n| eager |") == 2
    plain, net, compiled = ({row.depth: row for row in rows if row.pipeline == name} for name in pipelines)
    for depth in (8, 16):
        assert compiled[depth].loss == net[depth].loss != plain[depth].loss
        assert compiled[depth].kept <= net[depth].kept
    # Eight more blocks: ten numbers an element each, at least (two hidden layers of four, norm, sum); or digits of v.
    stream = compile_pipeline.TOKENS * compile_pipeline.WIDTH * 4
    assert plain[16].kept - plain[8].kept >= 8 * 10 * stream
    # At most 0.16 bits an element and step, and a step's bookkeeping.
    assert net[16].kept - net[8].kept <= stream
