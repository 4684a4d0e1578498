from examples.benchmarks import memory, overhead


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
