"""The integrations without the packages that they are for."""

import subprocess
import sys

import pytest

import mfx

SCRIPT = """
import sys
sys.modules["transformers"] = sys.modules["lightning"] = None  # what import statements take as not installed
import mfx
assert not [name for name in sys.modules if name.startswith("mfx.integrations.")]
for module in mfx.integrations.transformers, mfx.integrations.lightning:
    try:
        module.MomentumCallback()
    except mfx.MfxError as error:
        print(error)
"""


def test_importable_and_an_error_when_used():
    run = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [
        f"this MomentumCallback is for the Trainer of {package}: pip install {package}."
        for package in ("transformers", "lightning")
    ]


def test_other_names():
    with pytest.raises(AttributeError, match="no attribute 'keras'"):
        _ = mfx.integrations.keras
