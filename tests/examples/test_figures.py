"""The figures of the README; `tests/test_pages.py` draws them anew."""

import xml.etree.ElementTree as ET

from examples.figures import depth, how_it_works


def test_everything_is_on_the_paper_and_large_enough_to_read():
    svg = ET.fromstring(how_it_works.figure())
    words = [node for node in svg.iter() if node.tag.endswith("text")]
    assert {"f₀", "f₁", "f₂", "x₃", "v₃"} <= {node.text for node in words}
    for node in words:
        assert 0 < float(node.get("x")) < how_it_works.WIDTH
        assert 0 < float(node.get("y")) < how_it_works.HEIGHT
    sizes = [line.split("font-size: ")[1].split("px")[0] for line in how_it_works.STYLE.splitlines() if "px" in line]
    assert min(map(int, sizes)) >= 14


def test_the_figure_of_depths_has_a_line_for_each_method():
    svg = depth.FILE.read_text(encoding="utf-8")
    assert svg.count('class="line"') == len(depth.WAYS) == 5
    assert all(words in svg for words, *_ in depth.WAYS.values())
