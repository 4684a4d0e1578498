"""The distributed example, at tiny size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples import distributed

TINY = ["--depth", "5", "--width", "8", "--steps", "4"]
ROOT = Path(distributed.__file__).parents[1]


@pytest.mark.parametrize("extra", [[], ["--shard"]], ids=["copied", "sharded"])
def test_two_processes_see_the_losses_of_one(world, extra):
    # The same sums, added up in another order; four steps of AdamW, whose first are as long as its learning rate.
    first, second = world.run(distributed.main, [*TINY, *extra])
    assert first == second
    assert first == pytest.approx(distributed.main(TINY), rel=1e-4)


def test_it_learns():
    losses = distributed.main(["--depth", "3", "--width", "16", "--steps", "30"])
    assert losses[-1] < 0.5 * losses[0]


def test_torchrun(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "passes")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*command, "examples/distributed.py", *TINY, "--shard"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step   0: loss") == 1
