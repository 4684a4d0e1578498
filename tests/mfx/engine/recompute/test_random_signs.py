import random

import numpy as np
import pytest

from mfx.compat import sign_of_numpy, sign_of_python


@pytest.mark.parametrize("seed, sign", [(random.seed, sign_of_python), (np.random.seed, sign_of_numpy)])
def test_a_sign_tells_seeds_apart(seed, sign):
    signs = set()
    for number in range(50):
        seed(number)
        signs.add(sign())
    assert len(signs) == 50
