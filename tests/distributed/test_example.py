"""The distributed example, at tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from examples import distributed

TINY = ["--depth", "5", "--width", "8", "--steps", "4"]
ROOT = Path(distributed.__file__).parents[1]


@pytest.mark.parametrize("extra", [[], ["--shard"]], ids=["copied", "sharded"])
def test_two_processes_see_the_losses_of_one(world, extra, tmp_path):
    # The same sums, added up in another order; four steps of AdamW, whose first are as long as its learning rate.
    png = ["--png", str(tmp_path / "a.png")]
    first, second = world.run(distributed.main, [*TINY, *extra, *png])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert first == second
    assert first == pytest.approx(distributed.main([*TINY, *png]), rel=1e-4)


def test_it_learns(tmp_path):
    sizes = ["--depth", "3", "--width", "16", "--steps", "30"]
    losses = distributed.main([*sizes, "--png", str(tmp_path / "a.png")])
    assert losses[-1] < 0.5 * losses[0]


def test_torchrun(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "passes")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "examples/distributed.py", *TINY, "--shard", "--png", str(tmp_path / "a.png")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("at the first step") == 1
    assert "100%" in done.stderr  # the progress bar
