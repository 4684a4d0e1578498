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


WAYS = {
    "copied": [],
    "sharded": ["--shard"],
    "blocks sharded": ["--blocks"],
    "blocks sharded and compiled": ["--blocks", "--compile", "aot_eager"],
}


@pytest.mark.parametrize("extra", WAYS.values(), ids=WAYS)
def test_two_processes_see_the_losses_of_one(world, extra, tmp_path):
    # The same sums, added up in another order; four steps of AdamW, whose first are as long as its learning rate.
    png = ["--png", str(tmp_path / "a.png")]
    first, second = world.run(distributed.main, [*TINY, *extra, *png])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert first == second
    assert first == pytest.approx(distributed.main([*TINY, *png]), rel=1e-4)


@pytest.mark.parametrize("extra", [["--shard"], ["--blocks"]], ids=["sharded", "blocks sharded"])
def test_a_checkpoint_goes_on_where_it_was_saved(world, extra, tmp_path):
    """By torch.distributed.checkpoint, from two processes to one, too."""
    common = [*TINY, "--png", str(tmp_path / "a.png")]
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    first, _ = world.run(distributed.main, [*common, *extra, "--save", two])
    assert first == pytest.approx(distributed.main([*common, "--save", one]), rel=1e-4)
    expected = pytest.approx(distributed.main([*common, "--load", one]), rel=1e-4)
    again, _ = world.run(distributed.main, [*common, *extra, "--load", two])
    assert again == expected
    assert again[0] < first[0]  # the same batch
    assert distributed.main([*common, "--load", two]) == expected


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
