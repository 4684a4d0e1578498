"""The benchmark for GPUs, on a CPU: what it measures there, and that nothing takes it down."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from examples.benchmarks import gpu
from examples.benchmarks.command import read_rows
from examples.benchmarks.on_gpu import fits, jobs, machine, roofline
from examples.benchmarks.on_gpu.jobs import Job, Row, Section, Setting
from examples.benchmarks.on_gpu.methods import CHECKPOINT, EAGER, EXACT, FLOAT, GAMMA_0, PLAIN, Training, made
from examples.benchmarks.on_gpu.models import models, small_models
from mfx.engine.arithmetic.gradients import UpdateGradients
from mfx.options.gamma import Gamma

ROOT = Path(__file__).parents[2]
SETTING = Setting("cpu", True, 1, 2**20)


def test_a_smoke_run_measures_everything(capsys, tmp_path):
    file = tmp_path / "rows.json"
    rows = gpu.main(["--tiny", "--one-process", "--device", "cpu", "--json", str(file)])
    assert [row.error for row in rows if row.error] == []
    assert [*dict.fromkeys(row.section for row in rows)] == [section.name for section in gpu.SECTIONS]
    assert read_rows(json.loads(file.read_text()), Row) == rows
    nets = [row for row in rows if row.case == "nets" and "left out" not in row.values]
    assert len(nets) > 3
    assert all(row.values["right"] for row in nets)
    speed = {row.method: row.values for row in rows if row.section == "speed"}
    assert {*speed} == {*EAGER}
    assert speed[PLAIN]["time, to plain"] == speed[PLAIN]["peak, to plain"] == 1
    assert all(values["peak, to plain"] < 1 for method, values in speed.items() if method != PLAIN)
    assert 1 < speed[CHECKPOINT]["roofline, to plain"] < speed[FLOAT]["roofline, to plain"]
    fitting = {row.method: row.values["fits"] for row in rows if row.section == "fits"}
    assert fitting[CHECKPOINT] > fitting[PLAIN]
    printed = capsys.readouterr().out
    assert all(f"| {section.name} |" in printed for section in gpu.SECTIONS)
    assert all(len({line.count("|") for line in part.splitlines()}) == 1 for part in printed.split("\n\n"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they run as they are")
def test_the_kernels_are_compared_in_the_interpreter(tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MFX_KERNELS": "triton"}
    script = (
        "from examples.benchmarks import gpu\n"
        "from tests.mfx.engine.arithmetic.kernels.rounding import as_on_a_device\n"
        "with as_on_a_device():\n"
        "    gpu.main(['--tiny', '--one-process', '--only', 'correctness', '--json', sys.argv[1]])"
    )
    command = [sys.executable, "-c", f"import sys\n{script}", str(tmp_path / "rows.json")]
    subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, check=True)
    rows = read_rows(json.loads((tmp_path / "rows.json").read_text()), Row)
    assert [(row.method, row.error) for row in rows if row.error] == []
    assert all(row.values["right"] for row in rows if "left out" not in row.values)
    assert [row.method for row in rows if "left out" in row.values] == ["a captured graph = the step"]


# --- nothing takes it down --------------------------------------------------------------------------------------------


def _fill(found, value):
    found["value"] = value


def _fail(found):
    found["before"] = 1
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def _end(found):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(found):
    time.sleep(600)


def _dangerous(setting):
    return [
        Job("a", "", partial(_fill, value=1)),
        Job("fails", "", _fail),
        Job("ends", "", _end),
        Job("hangs", "", _hang, limit=1),
        Job("b", "", partial(_fill, value=2)),
    ]


def test_what_fails_ends_or_hangs_is_a_row_and_the_rest_goes_on():
    rows = list(jobs.run([Section("s", 1.0, _dangerous)], SETTING, 300, apart=True))
    assert [row.case for row in rows] == ["a", "fails", "ends", "hangs", "b"]
    assert [row.values.get("value") for row in rows] == [1, None, None, None, 2]
    assert [row.error for row in rows] == [
        None, "out of memory", "its process ended with code -9", "took longer than 1 s", None,
    ]  # fmt: skip
    assert rows[1].values == {"before": 1}


def _slow(setting):
    return [Job(str(i), "m", lambda found: time.sleep(0.4)) for i in range(9)]


def _broken(setting):
    raise ValueError("no jobs")


def test_sections_share_the_time_and_say_what_they_leave_out():
    sections = [Section("broken", 1.0, _broken), Section("slow", 1.0, _slow), Section("next", 0.1, _dangerous)]
    rows = list(jobs.run([*sections[:2], Section("next", 1.0, _slow)], SETTING, 3.0, apart=False))
    assert rows[0].error == "ValueError: no jobs"
    for name in ("slow", "next"):
        of_section = [row for row in rows if row.section == name]
        assert of_section[-1].case == "no time left for"
        assert of_section[-1].error.endswith("7 m, 8 m")
        assert len(of_section) > 1


def test_a_bisection_finds_the_largest_that_fits():
    for limit in (1, 7, 8, 37, 1000):
        tried, found = [], {}
        fits.largest(lambda n, limit=limit, tried=tried: tried.append(n) or n <= limit, 8, 1, found, close=0.0)
        assert found == {"fits": limit, "does not fit": limit + 1}
        assert len(tried) < 25
    found = {}
    fits.largest(lambda n: False, 8, 1, found)
    assert found == {"does not fit": 1}
    fits.largest(lambda n: n <= 1000, 64, 64, found)
    assert found["fits"] == 960


def test_out_of_memory_is_told_from_other_errors():
    assert machine.is_out_of_memory(torch.OutOfMemoryError("x"))
    assert machine.is_out_of_memory(RuntimeError("XPU out of memory."))
    assert not machine.is_out_of_memory(RuntimeError("shapes"))


def test_sections_can_be_sent_to_processes_and_name_their_jobs_without_a_device():
    assert [section.name for section in pickle.loads(pickle.dumps(gpu.SECTIONS))] == [s.name for s in gpu.SECTIONS]
    for section in gpu.SECTIONS:
        found = section.jobs(Setting("no such device", False, 1, 2**30))
        assert len({(job.case, job.method) for job in found}) == len(found) > 0


# --- models, methods, the roofline ------------------------------------------------------------------------------------


def test_models_have_the_sizes_of_those_they_are_named_after():
    named = {model.name: model for model in models()}
    assert len(named) == len(models()) == 10
    counts = {
        name: sum(p.numel() for p in named[name].built("meta").parameters()) / 1e6 for name in ("ViT-L/16", "ResNet-50")
    }
    assert counts["ViT-L/16"] == pytest.approx(304.3, abs=1)
    assert counts["ResNet-50"] == pytest.approx(25.6, abs=0.1)


def test_models_without_torchvision_are_the_same_but_for_details(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    for model, millions in zip(models()[1:3], (304.3, 25.6), strict=True):
        own = model.built("meta")
        assert "torchvision" not in type(own).__module__
        assert sum(p.numel() for p in own.parameters()) / 1e6 == pytest.approx(millions, abs=1)


def test_methods_share_parameters_and_checkpoints_wrap_blocks():
    model = small_models()[3]
    net = model.built("cpu")
    own = {id(p) for p in net.parameters()}
    for method in EAGER:
        assert {id(p) for p in made(method, net).parameters()} == own
    again = made(CHECKPOINT, net)
    assert sum(type(module).__name__ == "_Checkpointed" for module in again.modules()) == 5
    gradients = []
    for method in (PLAIN, CHECKPOINT, GAMMA_0):
        net.zero_grad()
        Training(made(method, net), model.input("cpu"))()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(all(map(torch.equal, gradients[0], other)) for other in gradients[1:])


def test_the_bytes_of_the_roofline_are_those_of_the_kernels(monkeypatch):
    """Every tensor that a kernel is given it reads or writes once; what it changes in place it is given twice."""
    pytest.importorskip("triton")
    from mfx.engine.arithmetic import triton_states

    moved = []

    def count(kernel, first, *args, **constants):
        moved.append(sum(t.itemsize for t in args if isinstance(t, torch.Tensor) and t.numel() == first.numel()))

    monkeypatch.setattr(triton_states, "_launch", count)
    gamma, size = Gamma(9, 10), 64
    for (method, dtype), (forward, back, gradients) in roofline.BYTES.items():
        cls = triton_states.TritonExactState if method == EXACT else triton_states.TritonFloatState
        x = torch.empty(size, dtype=dtype)
        state = cls.start(x, None, reversible=True)
        for _ in range(20):
            state.advance(x, "residual", gamma)
        assert moved[-1] == forward
        frozen = state.freeze()
        state = frozen.thaw(frozen.tensors)
        for _ in range(2):  # the first one writes to memory of its own
            state.retreat_x()
            state.retreat_v(x, "residual", gamma)
        assert moved[-1] == back
        update = UpdateGradients("residual", gamma, gamma, True, (dtype, torch.float32, dtype), torch.float32, True)
        with torch.no_grad():
            cls.gradients(update, x, torch.empty(size))
        assert moved[-1] == gradients
        assert forward + back + gradients <= (130 if dtype is torch.float32 else 120)


def test_a_roofline_adds_what_the_kernels_move():
    model = small_models(torch.bfloat16)[3]  # five blocks: a chain of 10 steps, whose inputs exact arithmetic keeps
    found = roofline.predict(model)
    elements = model.input("cpu").numel()
    each = elements * 10 / (roofline.BANDWIDTH * roofline.H100.bandwidth)
    assert found.seconds[EXACT] - found.seconds[CHECKPOINT] == pytest.approx((20 + 12) * each)
    assert found.seconds[FLOAT] - found.seconds[CHECKPOINT] == pytest.approx((20 + 20 + 12) * each)
    assert found.ratio("compiled") is None
    assert "| GPT-2-like, H100 |" in roofline.table({"GPT-2-like": found})
    assert roofline.chip("NVIDIA H200") is not roofline.H100 is roofline.chip("something else")
