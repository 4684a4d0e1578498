"""The processes that the tests in here share."""

import pytest

from tests.distributed.world import World


@pytest.fixture(scope="session")
def world():
    made = World()
    yield made
    made.close()
