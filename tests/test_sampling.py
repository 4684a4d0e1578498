"""A part of a grid by default, and all of it in the end."""

import pytest

from tests import sampling

AXES = {"a": range(6), "b": "xy", "c": {"one": 1, "two": 2, "three": 3}}


def default(mark):
    return [param for param in mark.args[1] if not param.marks]


def test_every_value_of_every_argument_is_tested_by_default():
    mark = sampling.grid(6, **AXES)
    assert mark.args[0] == "a, b, c"
    assert len(mark.args[1]) == 6 * 2 * 3
    by_default = default(mark)
    assert len(by_default) == 6
    assert [len({param.values[axis] for param in by_default}) for axis in range(3)] == [6, 2, 3]


def test_the_rest_is_in_the_zoo_and_other_days_choose_others(monkeypatch):
    seen = set()
    for day in range(60):
        monkeypatch.setenv("MFX_ZOO_SAMPLE", str(day))
        mark = sampling.grid(6, **AXES)
        assert all(param.id.endswith(f"-sample{day}") for param in default(mark))
        seen |= {param.values for param in default(mark)}
    # A combination is missed on one day with probability 30/36 at most; all 60 times with 2e-5.
    assert len(seen) == 36


def test_ids_are_the_same_in_every_process():
    mark = sampling.grid(1, a=[default], b=[(ValueError, 1)])
    assert mark.args[1][0].id.startswith("default-ValueError-1")
    with pytest.raises(ValueError, match="address"):
        sampling.grid(1, a=[object()])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_have_their_turn(monkeypatch, count):
    items = list("abcde")
    seen = set()
    for day in range(5):
        monkeypatch.setenv("MFX_ZOO_SAMPLE", str(day))
        chosen = sampling.sample(items, count)
        assert len(set(chosen)) == count
        seen.update(chosen)
    assert seen == set(items)
