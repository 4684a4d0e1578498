"""The figure of the README."""

import xml.etree.ElementTree as ET
from pathlib import Path

from examples.figures import how_it_works

README = Path(__file__).parents[2] / "README.md"


def test_the_kept_figure_is_what_the_script_draws(tmp_path):
    drawn = how_it_works.main(["--svg", str(tmp_path / "a.svg")])
    assert drawn.read_text(encoding="utf-8") == how_it_works.FILE.read_text(encoding="utf-8")
    assert f"({how_it_works.FILE.relative_to(README.parent)})" in README.read_text(encoding="utf-8")


def test_everything_is_on_the_paper_and_large_enough_to_read():
    svg = ET.fromstring(how_it_works.figure())
    words = [node for node in svg.iter() if node.tag.endswith("text")]
    assert {"f₀", "f₁", "f₂", "x₃", "v₃"} <= {node.text for node in words}
    for node in words:
        assert 0 < float(node.get("x")) < how_it_works.WIDTH
        assert 0 < float(node.get("y")) < how_it_works.HEIGHT
    sizes = [line.split("font-size: ")[1].split("px")[0] for line in how_it_works.STYLE.splitlines() if "px" in line]
    assert min(map(int, sizes)) >= 14
