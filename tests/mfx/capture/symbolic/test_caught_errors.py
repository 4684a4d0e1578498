"""A model that catches the error of an operation takes the same path in a net, in calls of every shape."""

import contextlib
import inspect
from contextlib import suppress

import pytest
import torch
from einops import EinopsError, rearrange
from torch import Tensor, nn

import mfx

ERRORS = (IndexError, ValueError)
# Matrices of 2 to 4 rows and one batch of them: what fails for one of them is right for another.
INPUTS = [
    torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in [(2, 4), (3, 4), (2, 3, 4), (4, 4)]
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x).tanh()


class Model(nn.Module):
    def __init__(self, prepare):
        super().__init__()
        torch.manual_seed(0)
        self.prepare = prepare
        self.wide, self.narrow = nn.Linear(4, 4), nn.Linear(3, 4)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x):
        return self.blocks(self.prepare(self, x))


def _item_of_shape(model, x):
    try:
        return x * x.shape[2]
    except IndexError:
        return x


def _size(model, x):
    try:
        count = x.size(2)
    except IndexError:
        count = 1
    return x * count


def _unpacked_shape(model, x):
    try:
        _, rows, _ = x.shape
    except ValueError:
        rows, _ = x.shape
    return x * rows


def _unpacked_tensor(model, x):
    try:
        first, second = x
    except ValueError:
        first = second = x[0]
    return x * first * second


def _view(model, x):
    try:
        return x * x.view(3, -1).sum()
    except RuntimeError:
        return x


def _layer(model, x):
    try:
        return model.narrow(x.mT)
    except RuntimeError:
        return model.wide(x)


def _all_errors(model, x):
    try:
        y = model.narrow(x.mT)
    except:  # noqa: E722
        y = model.wide(x)
    return y


def _else(model, x):
    try:
        y = model.narrow(x.mT)
    except Exception:
        y = model.wide(x)
    else:
        y = y * 2
    return y


def _classes(model, x):
    try:
        count = x.shape[2]
    except (KeyError, ERRORS[0]):
        count = 1
    return x * count


def _named_classes(model, x):
    try:
        count = x.shape[2]
    except ERRORS:
        count = 1
    return x * count


def _suppressed(model, x):
    count = 1
    with suppress(IndexError):
        count = x.shape[2]
    return x * count


def _suppressed_classes(model, x):
    count = 1
    with contextlib.suppress(*ERRORS):
        count = x.shape[2]
    return x * count


def _farther_out(model, x):
    try:
        try:
            count = x.shape[2]
        except KeyError:
            count = 5
    except LookupError:
        count = 2
    return x * count


def _last(x):
    return x.shape[2]


def _in_a_function(model, x):
    try:
        count = _last(x)
    except IndexError:
        count = 2
    return x * count


def _concatenated(model, x):
    try:
        return torch.cat([x, x[:, 0]])
    except RuntimeError:
        return x


def _division(model, x):
    try:
        count = 6 // (x.shape[0] - 2)
    except ZeroDivisionError:
        count = 1
    return x * count


def _assertion(model, x):
    try:
        assert x.shape[0] == 3
        count = 2
    except AssertionError:
        count = 3
    return x * count


def _loop(model, x):
    count = 0
    while True:
        try:
            count += x.shape[count] * 0 + 1
        except IndexError:  # noqa: PERF203
            return x * count


def _argument(model, x):
    try:
        return x + None
    except TypeError:
        return x * 2


def _finally(model, x):
    try:
        return x.view(2, -1, 4)
    finally:
        model.wide(x)


CAUGHT = [
    value
    for value in list(globals().values())
    if inspect.isfunction(value) and "model" in inspect.signature(value).parameters
]


def _all_in_turn(model, x):
    for prepare in CAUGHT:
        x = prepare(model, x) if prepare is not _finally else x
    return x / x.abs().amax()


def _results(model):
    """Return what calls return, or the classes of the errors that they raise."""
    results = []
    for x in INPUTS:
        try:
            results.append(model(x))
        except Exception as error:  # noqa: PERF203
            results.append(type(error))
    return results


def _check(prepare, capture, first):
    model = Model(prepare)
    net = mfx.momentumize(model, gamma=0.0, capture=capture)
    with suppress(Exception):
        net(INPUTS[first])
    for result, expected in zip(_results(net), _results(model), strict=True):
        assert torch.equal(result, expected) if isinstance(expected, Tensor) else result is expected


def _raised_again(model, x):
    try:
        return model.wide(x.view(2, -1, 4))
    except RuntimeError as error:
        raise ValueError("not two") from error


def test_an_error_that_is_raised_as_another_is_an_error_of_the_net():
    """It may be the first of the two; what raises in any case catches nothing, and costs no chain."""
    model = Model(_raised_again)
    net = mfx.momentumize(model, gamma=0.0)
    assert [len(chain.steps) for chain in mfx.explain(net).chains] == [3]
    for result, expected in zip(_results(net), _results(model), strict=True):
        assert torch.equal(result, expected) if isinstance(expected, Tensor) else result is RuntimeError


def _of_einops(model, x):
    try:
        return x * rearrange(x, "... (b c) -> ... b c", b=3).sum()
    except EinopsError:
        return x


def test_an_error_of_a_library_is_caught():
    _check(_of_einops, "auto", 0)


@pytest.mark.parametrize("first", [0, 2], ids=["matrix first", "batch first"])
@pytest.mark.parametrize("prepare", [_all_in_turn, _finally], ids=lambda function: function.__name__[1:])
def test_what_is_caught_is_caught_in_a_net(prepare, first):
    _check(prepare, "symbolic", first)


@pytest.mark.zoo
@pytest.mark.parametrize("first", [0, 2], ids=["matrix first", "batch first"])
@pytest.mark.parametrize("capture", ["auto", "symbolic"])
@pytest.mark.parametrize("prepare", CAUGHT, ids=lambda function: function.__name__[1:])
def test_each_by_itself(prepare, capture, first):
    _check(prepare, capture, first)


def _two_of_shape(model, x):
    rows, _ = x.shape
    return x * rows


def _two_of_size(model, x):
    rows, _ = x.size()
    return x * rows


def _two_rows(model, x):
    first, second = x
    return x * first * second


def _two_of_unbind(model, x):
    first, second = x.unbind(0)
    return x * first * second


def _two_of_split(model, x):
    first, second = x.split(1)
    return x * first * second


def _three_or_more(model, x):
    *_, rows, columns = x.shape[1:]
    return x * rows * columns


def _one_more(model, x):
    first, second, third = *x.shape, 1
    return x * first * second * third


@pytest.mark.parametrize(
    "prepare",
    [_two_of_shape, _two_of_size, _two_rows, _two_of_unbind, _two_of_split, _three_or_more, _one_more],
    ids=lambda function: function.__name__[1:],
)
def test_a_value_of_another_length_is_not_unpacked(prepare):
    """Neither are values beyond those that the code names passed over, nor are missing ones another error."""
    model = Model(prepare)
    expected = _results(model)
    assert ValueError in expected
    net = mfx.momentumize(model, gamma=0.0)
    for result, wanted in zip(_results(net), expected, strict=True):
        assert torch.equal(result, wanted) if isinstance(wanted, Tensor) else result is wanted
