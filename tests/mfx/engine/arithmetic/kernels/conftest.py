"""Tests of the Triton kernels: on a GPU as they are; on a CPU in Triton's interpreter, in a process of its own.

That process sets TRITON_INTERPRET=1, which must be there before anything imports triton: ``test_triton`` starts it.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available()
collect_ignore_glob = [] if INTERPRETED or ON_GPU else ["test_*.py"]

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _as_on_a_device():
    """Make the interpreter round a multiply-add once (it rounds twice in Triton 3.8), and be silent about overflows."""
    if not INTERPRETED:
        yield
        return
    from tests.mfx.engine.arithmetic.kernels.rounding import as_on_a_device

    with as_on_a_device():
        yield


@pytest.fixture
def device():
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _triton_everywhere(monkeypatch):
    monkeypatch.setenv("MFX_KERNELS", "triton")
