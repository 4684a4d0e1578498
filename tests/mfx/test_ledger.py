"""Gradients of parameters are not activations: however large a parameter, the peak of activations is the same.

In each case the parameter is a table of V rows, of which the forward pass reads a few; every activation has the size of
what is read. So whatever in the peak grows with V is the gradient, or a part of it.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mfx import ActivationMeter

WIDTH = 8
INDEX = torch.tensor([1, 2, 2, 5])


def looked_up(table, **kwargs):
    return F.embedding(INDEX, table, **kwargs).tanh().sum()


def tied(table):
    hidden = F.embedding(INDEX, table).tanh()
    return (hidden[:, None, :] * table[:1]).sum() + looked_up(table)


CASES = {
    "an embedding": looked_up,
    "a sparse embedding": lambda table: looked_up(table, sparse=True),
    "two sparse embeddings": lambda table: looked_up(table, sparse=True) + looked_up(table, sparse=True),
    "sparse and dense": lambda table: looked_up(table, sparse=True) + looked_up(table),
    "a bag": lambda table: F.embedding_bag(INDEX, table, torch.tensor([0, 2])).tanh().sum(),
    "used three times": lambda table: looked_up(table) + looked_up(table) + looked_up(table),
    "tied": tied,
    "an index": lambda table: table[INDEX].tanh().sum(),
    "a slice": lambda table: table[2:5].tanh().sum(),
    "a row": lambda table: table[2].tanh().sum(),
    "rows selected": lambda table: table.index_select(0, INDEX).tanh().sum(),
    "rows gathered": lambda table: table.gather(0, INDEX[:, None].expand(-1, WIDTH)).tanh().sum(),
    "rows masked": lambda table: table.narrow(0, 1, 3)[torch.tensor([True, False, True])].tanh().sum(),
    "transposed": lambda table: table.t()[:, :3].tanh().sum(),
    "cut into pieces": lambda table: sum(piece[:2].tanh().sum() for piece in table.chunk(2)),
    "expanded": lambda table: table.sum() + looked_up(table),
    "expanded alone": lambda table: table.sum(),
}


def measured(loss, rows, *, calls=1, hooks=(), count_grads=False):
    table = nn.Parameter(torch.linspace(-1, 1, rows * WIDTH).reshape(rows, WIDTH))
    for hook in hooks:
        table.register_post_accumulate_grad_hook(hook)
    with ActivationMeter([table], timeline=True, count_grads=count_grads) as meter:
        for _ in range(calls):
            loss(table).backward()
    assert max(meter.timeline) == meter.peak
    return meter, table


def freeing(table):
    table.grad = None


@pytest.mark.parametrize("hooks", [(), (freeing,)], ids=["kept", "freed in the backward pass"])
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_peak_does_not_grow_with_a_parameter(case, calls, hooks):
    (small, _), (large, table) = (measured(CASES[case], rows, calls=calls, hooks=hooks) for rows in (64, 4096))
    assert large.peak == small.peak > 0
    assert list(large.timeline) == list(small.timeline)
    if "sparse" not in case:
        assert large.peak_with_grads >= table.nbytes
    assert large.live == 0


@pytest.mark.parametrize("case", ["an embedding", "an index", "expanded alone"])
def test_gradients_that_were_asked_for_count(case):
    meter, table = measured(CASES[case], 4096, count_grads=True)
    assert meter.peak >= table.nbytes
    assert meter.peak == meter.peak_with_grads


def test_a_gradient_that_is_cast_does_not_count_but_the_cast_parameter_does():
    def cast(table):
        return (torch.ones(1, len(table), dtype=torch.bfloat16) @ table.to(torch.bfloat16)).sum()

    (small, _), (large, _) = (measured(cast, rows) for rows in (64, 4096))
    assert large.peak - small.peak == 2 * (4096 - 64) * (1 + WIDTH)  # in the forward pass: both factors


def test_a_gradient_that_others_still_need_counts():
    """Autograd clones it for the parameter; it is the gradient of an activation, too, until that has been computed."""
    x, table = torch.ones(1, 256, requires_grad=True), nn.Parameter(torch.ones(1, 256))
    with ActivationMeter([x, table], timeline=True) as meter:
        y = x.tanh()  # 1 KiB, kept
        z = y + table  # 1 KiB, not kept
        z = z * 2
        z.sum().backward()
    backward = list(meter.timeline)[4:]
    assert max(backward) >= 3 * 1024  # y, z, and the gradient of the sum


def test_other_hooks_stay_in_order():
    calls = []
    table = nn.Parameter(torch.ones(4, WIDTH))
    handles = [table.register_post_accumulate_grad_hook(lambda _, n=n: calls.append(n)) for n in range(3)]
    handles[1].remove()
    for _ in range(2):
        with ActivationMeter([table]):
            table.sum().backward()
    table.sum().backward()
    assert calls == [0, 2] * 3
    for handle in handles:
        handle.remove()
    table.sum().backward()
    assert calls == [0, 2] * 3
