"""One model of the zoo is put to the test, and a row comes out."""

from __future__ import annotations

import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

import mfx
from mfx.capture.binding import ByName
from mfx.engine import run_chain
from mfx.net.forward import forward_of
from mfx.program import chain_call
from tests.models.step import Outcome, assert_bit_equal, graph_of, is_identity, train_step, weigh
from tests.oracles import assert_close_grads, chained_adds, residual_adds
from tests.zoo.entry import Call, Entry
from tests.zoo.row import AGREE, EQUAL, REDRAWN, ROUNDED, SUMMED, Row

# Where a library computes the same function in another way: sums of at most 2^10 products in at most 2^4 layers,
# forward and backward, each product with an error of eps/2; rounding errors of different signs grow with the root of
# their number: sqrt(2^10 · 2^5)·eps = 2^7.5·eps, times a condition number of these networks of up to 20.
ROUNDING = 20 * 2**7.5

# Gradients of a value that steps capture and that others read are added up in another order: at most 2^4 terms, each
# of a relative error of eps/2, in at most 2^5 layers in a row.
SUMMING = 2**4 * 2**5 / 2


def judge(entry: Entry) -> Row:
    """Whatever happens, a row."""
    start = time.process_time()
    row = _Bench(entry)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            row.fill()
        except Exception as error:
            row.note(failure=_where(error))
    says = dict.fromkeys(_brief(str(w.message)) for w in caught if str(w.message).startswith("mfx: "))
    seconds = round(time.process_time() - start, 1)
    return replace(row.row, says=tuple(says), seconds=seconds, day=date.today().isoformat(), versions=entry.versions)


class _Bench:
    """The row of an entry, filled bit by bit so that a failure leaves what was found before."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.row = Row(entry.library, entry.name, entry.note)

    def note(self, **found: Any) -> None:
        self.row = replace(self.row, **found)

    def fill(self) -> None:
        model, (args, kwargs) = made(self.entry)
        self.note(parameters=sum(p.numel() for p in model.parameters()))
        with fresh_draws():
            graph = graph_of(model, args, kwargs)
        self.note(adds=len(residual_adds(graph)), chained=len(chained_adds(graph)))
        del graph
        keys = list(model.state_dict())
        start = time.process_time()
        net = mfx.momentumize(model, verify="raise")
        self.note(captured=round(time.process_time() - start, 1))
        if net is not model:  # else there is nothing to compare
            self.compare(model, (args, kwargs), net)
        self.describe(net, (args, kwargs), keys)
        if self.row.rewritten:
            plain, momentum = weigh(model, args, kwargs), weigh(net, args, kwargs)
            self.note(kept=round(momentum.kept / plain.kept, 4), peak=round(momentum.peak / plain.peak, 4))

    def compare(self, model: nn.Module, call: Call, net: nn.Module) -> None:
        start = time.process_time()
        plain = train_step(model, *call)
        once = time.process_time() - start
        assert all(x.isfinite().all() for x in plain.outputs), "the model's own outputs are not finite"
        self.compare_at_zero(model, call, plain)
        start = time.process_time()
        reversible = train_step(net, *call)
        longer = max(0.0, time.process_time() - start - once)
        self.note(captured=round(self.row.captured + longer, 1))
        self.note(exact=differences(reversible, train_step(mfx.momentumize(model, memory_budget=1.0), *call)))
        is_same = all(map(torch.equal, reversible.outputs, plain.outputs))
        assert is_same is not bool(mfx.explain(net).chains), "γ = 0.9 is another function where there are chains"

    def compare_at_zero(self, model: nn.Module, call: Call, plain: Outcome) -> None:
        at_zero = train_step(mfx.momentumize(model, gamma=0.0), *call)
        found = differences(at_zero, plain)
        if found != EQUAL:
            found = differences_but_for_order(at_zero, plain)
        if found not in AGREE and not self.entry.compiles_alike:
            found = differences_but_for_rounding(at_zero, plain)
        if found not in AGREE and differences(train_step(model, *call), plain) != EQUAL:
            found = f"the model itself does not compute the same twice: {found}"
        elif found not in AGREE and agrees_without_dropout(self.entry):
            found = REDRAWN
        self.note(gamma0=found)

    def describe(self, net: nn.Module, call: Call, keys: Sequence[str]) -> None:
        """After the first call, which captures where tracing could not."""
        forward = forward_of(net)
        explanation = mfx.explain(net, *call[0], **call[1]) if forward is None else mfx.explain(net)
        refused = Counter(generic(r.reason) for r in explanation.rejections if is_identity(r))
        rewritten = updates_run(net, call)
        self.note(
            capture=capture_of(net),
            rewritten=0 if rewritten and is_refused(net, call) else rewritten,
            chains=tuple(len(chain.steps) for chain in explanation.chains),
            refused=dict(refused.most_common()),
            keys=list(net.state_dict()) == keys,
        )


def made(entry: Entry) -> tuple[nn.Module, Call]:
    """The model in training mode, and the arguments of a call.

    Heads that begin at 0 and layer scales at 1e-6 would hide what is behind them, so they begin elsewhere.
    """
    torch.manual_seed(0)
    model = entry.make()
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() and p.abs().max() < 1e-3:
                p.normal_(std=0.1)
    torch.manual_seed(1)
    return model.train(), entry.call()


def agrees_without_dropout(entry: Entry) -> bool:
    """True if at γ = 0 an entry's net is the model if no dropout masks are drawn, which two chains do by turns."""
    model, call = made(entry)
    dropouts = [module for module in model.modules() if isinstance(module, _DropoutNd)]
    for module in dropouts:
        module.p = 0.0
    at_zero, plain = train_step(mfx.momentumize(model, gamma=0.0), *call), train_step(model, *call)
    return bool(dropouts) and differences_but_for_order(at_zero, plain) == SUMMED


def differences(actual: Outcome, expected: Outcome) -> str:
    """`EQUAL` if they are, bit for bit; else what is not."""
    return _verdict(lambda: assert_bit_equal(actual, expected), EQUAL)


def differences_but_for_order(actual: Outcome, expected: Outcome) -> str:
    """`SUMMED` if all is equal bit for bit but gradients, and these are but for the order of sums; else what is not."""

    def compare() -> None:
        assert_bit_equal(replace(actual, grads=expected.grads), expected)
        eps = max(torch.finfo(x.dtype).eps for x in expected.outputs)
        assert_close_grads(actual.grads, expected.grads, SUMMING * eps, noise=1e-3)

    return _verdict(compare, SUMMED)


def differences_but_for_rounding(actual: Outcome, expected: Outcome) -> str:
    """`ROUNDED`, or what differs by more."""

    def compare() -> None:
        for a, b in zip(actual.outputs, expected.outputs, strict=True):
            bound = ROUNDING * torch.finfo(b.dtype).eps
            assert float((a - b).norm()) <= bound * float(b.norm()), "outputs differ by more than rounding"
        assert_close_grads(actual.grads, expected.grads, bound, noise=1e-3)
        assert torch.equal(actual.rng, expected.rng), "the random state differs after the step"

    return _verdict(compare, ROUNDED)


def _verdict(compare: Callable[[], None], good: str) -> str:
    try:
        compare()
    except AssertionError as error:
        return _brief(str(error)) or _where(error)
    return good


@contextmanager
def fresh_draws(seed: int = 2) -> Iterator[None]:
    """Random numbers begin anew: layers that are dropped at random are the same ones each time."""
    random.seed(seed)
    torch.manual_seed(seed)
    yield


def updates_run(net: nn.Module, call: Call) -> int:
    """Return the number of updates by momentum chains in one forward pass: of sums that became part of a chain."""
    with counted() as calls, fresh_draws():
        net(*call[0], **call[1])
    return sum(calls)


def is_refused(net: nn.Module, call: Call) -> bool:
    """True if a net that has run refuses calls that differ in random numbers, which it warns of."""
    try:
        for seed in range(3, 7):
            with fresh_draws(seed), torch.no_grad():
                net(*call[0], **call[1])
    except mfx.MfxError as error:
        warnings.warn(f"mfx: {error}", stacklevel=2)
        return True
    return False


@contextmanager
def counted() -> Iterator[Sequence[int]]:
    """The number of updates of each chain that is run inside of the block; a step may move several streams on."""
    calls: list[int] = []

    def counting(name: str, steps: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(sum(len(step.writes) for step in steps))
        return run_chain(name, steps, *args, **kwargs)

    with mock.patch.object(chain_call, "run_chain", counting):  # a rewritten graph keeps the modules' own forwards
        yield calls


def capture_of(net: nn.Module) -> str:
    """Return the way in which its graphs were captured."""
    forward = forward_of(net)
    if forward is None:
        return "symbolic"  # only such a graph says at once that there is nothing to rewrite
    if forward.per_module:
        return "module by module"
    assert forward.active is not None
    return "symbolic" if isinstance(forward.active.captured.binding, ByName) else "dynamo"


_NAME, _SHAPE = re.compile(r"^\w+ (?=changes)"), re.compile(r"\([\d, ]+\)")


def generic(reason: str) -> str:
    """A reason without the names and shapes of one model."""
    return _SHAPE.sub("(…)", _NAME.sub("an operation ", reason))


def _where(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f for f in reversed(frames) if "/torch/" not in f.filename), frames[-1])
    file = "/".join(place.filename.split("/")[-2:])
    return f"{type(error).__name__} in {file}:{place.lineno}: {_brief(str(error))}"


_PACKAGES = re.compile(r"/\S*site-packages/")


def _brief(text: str) -> str:
    line = _PACKAGES.sub("", " ".join(text.split()))
    return line if len(line) < 300 else f"{line[:297]}..."
