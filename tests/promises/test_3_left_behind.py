"""At γ = 0 a net leaves behind in Python what the model does, call after call; no trace leaves anything of its own."""

import contextlib
import copy
import functools
import logging
import math
import warnings
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mfx
from tests.promises import left_behind as places
from tests.promises.left_behind import WIDTH, Net
from tests.sampling import grid, sampled


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))


def told(net: nn.Module) -> list[object]:
    """Return outputs, gradients, and all that is left behind in Python by calls in training and in evaluation."""
    results: list[object] = []
    for seed, training in enumerate((True, True, False, True)):
        net.train(training)
        y = net(inputs(seed))
        y.sum().backward()
        results += [y.detach(), *places.left(net)]
    return [*results, *(p.grad for p in net.parameters())]


def assert_same(found: list[object], expected: list[object]) -> None:
    assert [type(value) for value in found] == [type(value) for value in expected]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def compare(note, by: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = Net(note, by)
    places.forget()
    expected = told(copy.deepcopy(model))
    places.forget()
    net = mfx.momentumize(model, gamma=0.0, **options)
    assert_same(told(net), expected)
    return net


def by_name(functions) -> dict[str, object]:
    return {function.__name__: function for function in functions}


OWN = by_name(note for note in places.OWN if note is not places.to_parameter_list)


@grid(5, note=OWN, options=[{}, {"arithmetic": "float"}, {"memory_budget": 1.0}])
def test_a_branch_notes_in_its_own_places(note, options):
    net = compare(note, "branch", **options)
    assert mfx.explain(net).chains


@grid(2, note=by_name([places.to_dict, places.to_attribute]), by=["block", "net"])
def test_a_module_that_holds_the_sums_notes_in_its_own_places(note, by):
    net = compare(note, by)
    assert mfx.explain(net).chains


@sampled("note", by_name([places.to_global_dict, places.to_global_number, places.to_thread_local]), 1)
def test_a_branch_notes_in_everybodys_places(note):
    net = compare(note, "branch")
    assert mfx.explain(net).chains


@grid(12, note=by_name([*places.OWN, *places.SHARED]), by=["net", "block", "branch"])
def test_a_trace_leaves_nothing_behind(note, by):
    places.forget()
    model = Net(note, by)
    before = places.left(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.suppress(mfx.MfxError):
            mfx.momentumize(model, capture="symbolic")
        net = mfx.momentumize(model)
    assert_same(places.left(net), before)
    assert_same(places.left(model), before)


# --- errors of a trace, caught by the model ---------------------------------------------------------------------------


class Checked(nn.Module):
    def __init__(self, check) -> None:
        super().__init__()
        self.check = check
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.check(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def value_error(x):
    try:
        if x.isnan().any():
            raise ValueError("not a number")
    except ValueError:
        x = torch.zeros_like(x)
    return x


def any_exception(x):
    try:
        n = int(x.sum() * 0 + 2)
    except Exception:
        return torch.zeros_like(x)
    return x * n


def bare(x):
    try:
        n = float(x[0, 0])
    except:  # noqa: E722
        return torch.zeros_like(x)
    return x + n


def suppressed(x):
    with contextlib.suppress(Exception):
        for row in x:
            return x + row
    return torch.zeros_like(x)


def returned_in_finally(x):
    y = torch.zeros_like(x)
    try:
        y = x * len(x)
    finally:
        return y  # noqa: B012


def has_attribute(x):
    return torch.zeros_like(x) if hasattr(x, "tensors") else x


def attribute_with_default(x):
    return x * getattr(x, "scale", 2)


def tried_attribute(x):
    try:
        return x.tensors
    except AttributeError:
        return 2 * x


def range_of(x):
    try:
        n = sum(1 for _ in range(x.shape[0]))
    except TypeError:
        n = 0
    return x * n


def root_of(x):
    try:
        n = math.floor(x.abs().max() + 2)
    except TypeError:
        n = 0
    return x * n


def as_array(x):
    try:
        n = float(np.asarray(x.detach()).max())
    except Exception:
        n = 0.0
    return x * n


def looked_up(x):
    return x * {torch.float32: 2.0}.get(x.dtype, 0.0)


def written(x):
    return torch.zeros_like(x) if "Proxy" in f"{x}" else x


def set_entry(x):
    x = x.clone()
    try:
        x[0, 0] = 0
    except TypeError:
        return torch.zeros_like(x)
    return x


def new_sizes(x):
    try:
        return x + torch.zeros(x.shape[0], WIDTH)
    except TypeError:
        return torch.zeros_like(x)


def is_tensor(x):
    return x if isinstance(x, Tensor) else torch.zeros_like(x)


def is_tensor_by_torch(x):
    return x if torch.is_tensor(x) else torch.zeros_like(x)


def is_list_or_tensor(x):
    return torch.zeros_like(x) if isinstance(x, list | tuple | dict) else x * (2 if isinstance(x, (int, Tensor)) else 3)


def is_tensor_of_a_list(x):
    return x if all(isinstance(part, Tensor) for part in [x, x + 1, torch.cat([x, x]), x.view(-1)]) else x * 3


def is_iterable(x):
    return x if isinstance(x, Iterable) else torch.zeros_like(x)


def is_int(x):
    return x * (2 if isinstance(x.shape[0], int) else 3)


def is_size(x):
    return x * (2 if isinstance(x.shape, torch.Size) and isinstance(x.size(), tuple) else 3)


def is_of_type(x):
    return x if type(x) is Tensor else torch.zeros_like(x)


def is_of_types(x):
    return x if type(x) in (Tensor, nn.Parameter) and issubclass(type(x), Tensor) else torch.zeros_like(x)


def is_of_class(x):
    return x if x.__class__ == Tensor else torch.zeros_like(x)


def is_parameter(x):
    weight = nn.Parameter(torch.ones(WIDTH))
    return x if isinstance(weight, nn.Parameter) and not isinstance(x, nn.Parameter) else torch.zeros_like(x)


def matched(x):
    match x:
        case Tensor():
            return x * 2
    return x * 3


@functools.singledispatch
def dispatched(x):
    return torch.zeros_like(x)


@dispatched.register
def _(x: Tensor):
    return x * 2


CHECKS = [
    is_tensor, is_tensor_by_torch, is_list_or_tensor, is_tensor_of_a_list, is_iterable, is_int, is_size, is_of_type,
    is_of_types, is_of_class, is_parameter, matched, dispatched,
    value_error, any_exception, bare, suppressed, returned_in_finally, has_attribute, attribute_with_default,
    tried_attribute, range_of, root_of, as_array, looked_up, written, set_entry, new_sizes,
]  # fmt: skip


@sampled("check", by_name(CHECKS), 7)
def test_an_error_of_a_trace_is_not_taken_for_one_of_the_model(check):
    torch.manual_seed(0)
    model = Checked(check)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some are rewritten module by module, and nothing is left to rewrite
        net = mfx.momentumize(model, gamma=0.0)
        for seed in range(2):
            assert torch.equal(net(inputs(seed)), model(inputs(seed)))


def test_a_caught_error_of_a_trace_is_told():
    with pytest.raises(mfx.MfxError, match=r"control flow.*test_3_left_behind.*and the error is caught"):
        mfx.momentumize(Checked(bare_check), capture="symbolic")


def bare_check(x):
    is_positive, double = x.sum() > 0, 2 * x
    try:
        return double if is_positive else x
    except:  # noqa: E722
        return x


# --- prints and logs --------------------------------------------------------------------------------------------------


def prints(x):
    print("mean", x.mean())
    return x


def prints_text(x):
    print("called")
    return x


def formats(x):
    print(f"mean {x.mean()}")
    return x


def logs(x):
    logging.getLogger("model").warning("mean %s", x.mean())
    return x


def logs_text(x):
    logging.getLogger("model").warning(f"sum {x.sum()}")
    return x


@sampled("output", by_name([prints, prints_text, formats, logs, logs_text]), 2)
def test_prints_and_logs_are_the_models(output, capsys, caplog):
    model = Checked(output)
    with torch.no_grad():
        model(inputs(0))
        model(inputs(1))
    expected = capsys.readouterr(), messages(caplog)
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = mfx.momentumize(model, gamma=0.0)
        with torch.no_grad():
            net(inputs(0))
            net(inputs(1))
    assert (capsys.readouterr(), messages(caplog)) == expected


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "model"]
