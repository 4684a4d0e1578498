import json

from examples.benchmarks import arithmetic, memory, overhead


def test_the_memory_benchmark_measures_every_method(capsys):
    rows = memory.main(["--tiny"])
    found = {row.method: row for row in rows}
    assert found["plain"].flops == 1
    # A second forward pass on top of a forward and a backward pass, which is twice a forward: 4/3.
    assert abs(found["mfx, exact"].flops - 4 / 3) < 0.01
    assert found["mfx, float"].after_forward < found["plain"].after_forward
    assert capsys.readouterr().out.count("| mfx, exact |") == 1


def test_the_overhead_benchmark_times_every_method(capsys):
    rows = overhead.main(["--tiny"])
    assert [row.method for row in rows][:3] == ["plain", "torch.utils.checkpoint", "mfx, exact"]
    assert all(row.forward > 0 and row.backward > 0 for row in rows)
    assert capsys.readouterr().out.count("| mfx, float |") == 1


def test_the_arithmetic_benchmark_measures_every_method(capsys, tmp_path):
    file = tmp_path / "rows.json"
    steps, recurrences, store = arithmetic.main(["--tiny", "--json", str(file)])
    assert [row.method for row in steps if row.to_float == 1] == ["mfx, float"]
    assert all(row.seconds > 0 and row.bound > 0 for row in recurrences)
    deep = [row for row in store if row.per_step is not None]
    assert deep
    assert all(abs(row.per_step / row.ideal - 1) <= 0.05 for row in deep)
    assert len(json.loads(file.read_text())["training"]) == len(steps)
    assert capsys.readouterr().out.count("| mfx, exact |") == 1
