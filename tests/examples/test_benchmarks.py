import json
import re

import pytest
import torch

import mfx
from examples.benchmarks import arithmetic, contenders, depth, memory, overhead, passes, plans, results, speed
from examples.benchmarks.blocks import Residual
from examples.benchmarks.command import read_rows


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # memcnn, where it is installed
@pytest.mark.filterwarnings("ignore:`torch.cuda.amp:FutureWarning")  # revlib
def test_the_memory_benchmark_measures_every_method(capsys, tmp_path):
    file, png = tmp_path / "rows.json", tmp_path / "a.png"
    rows = memory.main(["--tiny", "--json", str(file), "--plot", str(png)])
    found = {row.method: row for row in rows}
    assert found["plain"].flops == found["plain"].to_plain == 1
    assert min(row.to_peer for row in rows if "mfx" not in row.method) == 1
    # Four blocks keep their inputs, as a checkpoint does: a second pass stops before the last of two equal products. A
    # whole second pass, on top of a forward pass and a backward pass which is twice that, makes 4/3; a third, 5/3.
    assert found["mfx, exact"].flops == found["checkpoint, every block"].flops == pytest.approx(7 / 6)
    assert all(row.flops == pytest.approx(5 / 3) for row in rows if row.method == "memcnn")
    shares = [found[f"mfx, exact, memory_budget={share}"] for share in (0.75, 0.5, 0.25)]
    assert [row.flops for row in shares] == sorted(row.flops for row in shares)
    assert [row.after_forward for row in shares] == sorted((row.after_forward for row in shares), reverse=True)
    assert found["mfx, float"].after_forward < found["plain"].after_forward
    assert read_rows(json.loads(file.read_text()), type(rows[0])) == rows
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| mfx, exact |") == 1


def test_the_memory_benchmark_counts_what_the_meter_counts_and_the_flops_of_compiled_code():
    model, x = Residual(3, contenders.WIDTH), torch.randn(16, contenders.WIDTH, requires_grad=True)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(memory._free)
    after, peak = memory.memory(model, x, [])
    x.grad = None
    with mfx.ActivationMeter(exclude=[x, *model.parameters()]) as meter:
        y = model(x)
        assert after == meter.live / x.nbytes
        y.sum().backward()
    # On top comes scratch inside an operation: less than four units, where the state, its gradient and the widest
    # activation's are six. The allocator counts gradients of parameters while they are there, the meter apart.
    assert 0 <= peak - meter.peak_with_grads / x.nbytes < 4
    assert memory.compiled_flops(model, x) == memory.flops(model, x)


def test_the_memory_benchmark_says_which_package_it_leaves_out(capsys, monkeypatch):
    def missing(branches):
        raise ModuleNotFoundError("No module named 'peer'")

    monkeypatch.setattr(contenders, "PEERS", {"peer": missing})
    assert contenders.peers(Residual(2, contenders.WIDTH), torch.randn(2, contenders.WIDTH, requires_grad=True)) == {}
    assert capsys.readouterr().err == "left out: peer: ModuleNotFoundError: No module named 'peer'\n"


def test_the_compiled_benchmark_measures_a_method_and_prints_ratios():
    pytest.importorskip("torchvision")
    from examples.benchmarks import compiled

    size = compiled.SIZES["tiny"]
    found = compiled.measure_compile("momentumize, exact, not compiled", size, size.depths[0])
    tokens = size.batch * ((size.image // 8) ** 2 + 1)
    assert found["bytes"] > tokens * size.width * 4  # at least the state
    rows = [
        compiled.Row(compiled.BASE, size.depths, 0.5),
        compiled.Row("other", size.depths, 1.0, (1.0, 1.5), (2**20, 3 * 2**20)),
    ]
    *_, base, other = compiled.table(rows).splitlines()
    assert base == f"| {compiled.BASE} | 1.00 |"
    assert other == "| other | 2.00 | 1.0 s | 1.5 s | 1.50 | 1.00 MiB | 3.00 MiB | 3.00 |"


def test_the_overhead_benchmark_times_every_method(capsys):
    rows = overhead.main(["--tiny"])
    assert [row.method for row in rows][:4] == ["plain", "torch.utils.checkpoint", "recurrence", "mfx, exact"]
    assert all(row.forward > 0 and row.backward > 0 and row.inference > 0 for row in rows)
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


def test_the_depth_benchmark_shows_what_a_block_costs(capsys, tmp_path):
    file, png = tmp_path / "rows.json", tmp_path / "a.png"
    rows = depth.main(["--tiny", "--json", str(file), "--plot", str(png)])
    assert {(row.method, row.depth) for row in rows} == {(m, d) for m in depth.METHODS for d in (4, 8, 16)}
    units = {method: per_block for method, (per_block, _) in depth.slopes(rows).items()}
    # Its input, the normalised input, the four times wider input and output of GELU; means and deviations on top.
    assert units["plain"] == pytest.approx(10 + 2 / depth.WIDTH)
    assert units["checkpoint"] == 1  # the input
    assert units["mfx, gamma=0"] == pytest.approx(1, abs=0.01)  # and a few bytes of notes
    assert units["mfx, float"] < 0.5
    assert read_rows(json.loads(file.read_text()), type(rows[0])) == rows
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| mfx, exact |") == 4


def test_the_depth_benchmark_leaves_plain_out_where_it_does_not_fit(monkeypatch):
    asked = {}

    def compare(blocks, batch, rounds, device, *, with_plain):
        asked[blocks] = with_plain  # ten units of 1 KiB per block
        return [depth.Row("plain", blocks, 0.0, 10.0 * blocks, 1.0, 1.0, 1.0)] if with_plain else []

    monkeypatch.setattr(depth, "compare", compare)
    depth.measure([4, 8, 16], 4, 1, torch.device("cpu"), limit=100 / 2**20)
    assert asked == {4: True, 8: True, 16: False}


def test_the_speed_benchmark_measures_every_method(capsys, tmp_path):
    pytest.importorskip("torchvision")
    file, png = tmp_path / "rows.json", tmp_path / "a.png"
    rows = speed.main(["--tiny", "--models", "ResNet-18", "--json", str(file), "--plot", str(png)])
    assert [row.method for row in rows] == list(speed.METHODS)
    assert rows[0].time == rows[0].peak == rows[0].flops == rows[1].to_checkpoint == 1
    assert all(1 < row.flops <= 4 / 3 for row in rows[1:])
    assert read_rows(json.loads(file.read_text()), type(rows[0])) == rows
    assert png.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("| ResNet-18 |") == 4


def test_the_speed_benchmark_refuses_models_it_does_not_have(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--tiny", "--models", "ResNet-50"])
    assert "of ResNet-18, GPT-2-like, 2 x 64" in capsys.readouterr().err


def test_the_passes_benchmark_measures_stacks_and_resnets(capsys, tmp_path):
    pytest.importorskip("torchvision")
    file, png = tmp_path / "rows.json", tmp_path / "a.png"
    rows = passes.main(["--tiny", "--json", str(file), "--plot", str(png)])
    # Five nodes a block, the input and the output.
    assert [(row.model, row.blocks, row.nodes) for row in rows[:2]] == [("stack", 4, 22), ("stack", 8, 42)]
    assert rows[2].blocks == 8
    assert all(row.momentumize > 0 for row in rows)
    assert read_rows(json.loads(file.read_text()), type(rows[0])) == rows
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "Ratio of resnet18" in capsys.readouterr().out


def test_an_exponent_is_that_of_a_power():
    rows = [passes.Row("stack", 0, nodes, 0.0, 0.0, 3e-6 * nodes**1.5) for nodes in (10, 100, 3000)]
    assert passes.exponent(rows, "momentumize") == pytest.approx(1.5)


@pytest.mark.parametrize("page", results.PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    text = page.read_text()
    assert "<!-- results: " in text
    assert results.filled(text) == text


def test_all_results_are_shown():
    named = {name for page in results.PAGES for name in re.findall(r"<!-- results: (\w+) -->", page.read_text())}
    assert named - {"compared", "refusals"} == {file.stem for file in (results.FOLDER / "results").glob("*.json")}


def test_the_plans_benchmark_says_what_loses(capsys, tmp_path):
    file = tmp_path / "rows.json"
    rows = plans.main(["--tiny", "--json", str(file)])
    found = {(row.model, row.method): row for row in rows}
    assert {model for model, _ in found} == set(plans.TINY)
    for model in plans.TINY:
        plain, by_block = found[model, "plain"], found[model, "checkpoint, every block"]
        assert plain.to_plain == plain.flops == 1
        assert by_block.to_plain < 1 < by_block.flops <= 4 / 3
        assert sum("torch.compile" in method for name, method in found if name == model) == 1
        unchanged = found[model, "mfx, gamma=0"]
        assert ("peak" in unchanged.loses) == (unchanged.peak > 1.005 * by_block.peak)
        assert ("FLOPs" in unchanged.loses) == (unchanged.flops > 1.005 * by_block.flops)
    # A stack of blocks keeps the same inputs as a checkpoint, with a few bytes of notes beside each.
    assert found["MLP", "mfx, gamma=0"].loses == ""
    assert found["MLP", "mfx, gamma=0"].flops == found["MLP", "checkpoint, every block"].flops
    assert read_rows(json.loads(file.read_text()), plans.Row) == rows
    assert capsys.readouterr().out.count("| mfx, exact |") == len(plans.TINY)


def test_a_cost_exceeds_what_it_is_above():
    cost = plans.Cost(peak=10, flops=5)
    assert [plans.exceeded(cost, *bounds) for bounds in ((10, 5), (9, 5), (10, 4), (9, 4))] == [
        "",
        "peak",
        "FLOPs",
        "peak and FLOPs",
    ]


@pytest.mark.parametrize("make, shape", plans.FULL.values(), ids=plans.FULL)
def test_networks_of_the_plans_benchmark_are_rewritten_whole(make, shape):
    explanation = mfx.explain(make())
    projections = {"ResNet": 2}  # blocks that change the shape
    steps = sum(len(chain.steps) for chain in explanation.chains)
    blocks = sum(isinstance(module, plans.nets.Block) for module in make().modules())
    name = next(name for name, made in plans.FULL.items() if made == (make, shape))
    assert steps == blocks - projections.get(name, 0)
