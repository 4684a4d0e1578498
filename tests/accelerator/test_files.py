"""The tests in the ``on_*.py`` beside this, in a process of their own: a device type is registered for good."""

import subprocess
import sys
from pathlib import Path


def test_on_a_fake_accelerator():
    files = sorted(Path(__file__).parent.glob("on_*.py"))
    assert files
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
