import json

from examples.benchmarks import paper
from examples.benchmarks.command import read_rows


def test_the_paper_benchmark_counts_every_method(capsys, tmp_path):
    file = tmp_path / "rows.json"
    rows = paper.main(["--tiny", "--json", str(file)])
    found = {row.method: row for row in rows}
    assert list(found) == list(paper.METHODS)
    assert found["plain"].less == found["plain"].less_each == 1
    assert all(row.less > 1 < row.less_each for row in rows[1:])
    for arithmetic in ("exact", "float"):
        everything, chains = found[f'mfx, {arithmetic}, recompute="all"'], found[f"mfx, {arithmetic}"]
        assert everything.each < chains.each
        assert everything.largest_batch > chains.largest_batch > found["plain"].largest_batch
    assert read_rows(json.loads(file.read_text()), paper.Row) == rows
    assert capsys.readouterr().out.count('| mfx, exact, recompute="all" |') == 1
