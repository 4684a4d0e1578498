"""The checks of the benchmark for GPUs, on the device."""

import pytest

from examples.benchmarks.on_gpu import correctness
from examples.benchmarks.on_gpu.jobs import Setting
from tests.accelerator import device as fake

SETTING = Setting(fake.NAME, True, 1, 2**20)
CHECKS = {check.name: check for check in correctness.checks(Setting(fake.NAME, False, 1, 2**20))}


@pytest.mark.parametrize("name", ["exact = kept: dropout", "γ = 0 = plain: dropout", "float ≈ kept: dropout"])
def test_nets_are_right(name):
    found = {}
    CHECKS[name].run(found, SETTING)
    assert found["right"]
    assert SETTING.where.index == 0


def test_kernels_that_do_not_compile_for_it_are_left_out():
    found = {}
    CHECKS["kernels = operations: dropout"].run(found, SETTING)
    assert "does not compile for fake:0" in found["left out"]
