import copy
import pickle
import threading
import time

import pytest
import torch

from mfx.modules.recomputing import RUNNING
from mfx.modules.state_lock import StateLock


class Thread(threading.Thread):
    """A thread that enters a section, says so, and leaves it when told."""

    def __init__(self, make, *, recomputes: bool = False) -> None:
        super().__init__(daemon=True)
        self.make, self.recomputes = make, recomputes
        self.inside, self.leave = threading.Event(), threading.Event()
        self.start()

    def run(self) -> None:
        RUNNING.again = self.recomputes
        with self.make():
            self.inside.set()
            self.leave.wait(30)

    def is_inside(self, within: float = 10.0) -> bool:
        return self.inside.wait(within)

    def end(self) -> None:
        self.leave.set()
        self.join(30)
        assert not self.is_alive()


def test_readers_at_once():
    lock = StateLock()
    threads = [Thread(lock.reading) for _ in range(3)]
    assert all(thread.is_inside() for thread in threads)
    for thread in threads:
        thread.end()


@pytest.mark.parametrize("first, second", [("reading", "writing"), ("writing", "reading"), ("writing", "writing")])
def test_a_writer_alone(first, second):
    lock = StateLock()
    one = Thread(getattr(lock, first))
    assert one.is_inside()
    other = Thread(getattr(lock, second), recomputes=True)
    assert not other.is_inside(0.05)
    one.end()
    assert other.is_inside()
    other.end()


def test_the_lock_of_another_net():
    one = Thread(StateLock().writing)
    other = Thread(StateLock().writing)
    assert one.is_inside()
    assert other.is_inside()
    one.end()
    other.end()


def test_sections_in_sections_of_a_thread():
    lock = StateLock()
    with lock.reading(), lock.writing(), lock.reading(), lock.writing():
        pass
    assert not lock.sections
    assert not lock.writers


def test_an_error_ends_a_section():
    lock = StateLock()
    with pytest.raises(ZeroDivisionError), lock.writing():
        1 / 0  # noqa: B018
    assert not lock.sections
    assert not lock.writers


class Waiting(torch.autograd.Function):
    """Something whose backward pass waits for a recomputation in another thread."""

    @staticmethod
    def forward(ctx, x, other, made):
        ctx.other, ctx.made = other, made
        return x * 2

    @staticmethod
    def backward(ctx, g):
        ctx.made.append(thread := Thread(ctx.other, recomputes=True))
        assert thread.is_inside()
        return g * 2, None, None


@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_a_thread_that_waits_for_autograd_lends_its_section(kind):
    lock, made = StateLock(), []
    x = torch.ones(2, requires_grad=True)
    with getattr(lock, kind)():
        y = Waiting.apply(x, lock.writing, made).sum()

        def end_later() -> None:
            while not made:
                time.sleep(0.001)
            time.sleep(0.05)
            ended.append(True)
            made[0].end()

        ended = []
        ender = threading.Thread(target=end_later, daemon=True)
        ender.start()
        y.backward()
        assert ended  # the backward pass has returned once the recomputation left everything as it was
        outsider = Thread(lock.writing)
        assert not outsider.is_inside(0.05)
    assert outsider.is_inside()
    outsider.end()


def test_a_section_is_lent_to_recomputations_only():
    lock, tried = StateLock(), []

    class Trying(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            tried.append(thread := Thread(lock.writing))
            assert not thread.is_inside(0.05)
            return g

    with lock.writing():
        Trying.apply(torch.ones(2, requires_grad=True)).sum().backward()
    assert tried[0].is_inside()
    tried[0].end()


def test_copies():
    lock = StateLock()
    one, other = copy.deepcopy([lock, lock])
    assert one is other is not lock
    assert isinstance(pickle.loads(pickle.dumps(lock)), StateLock)
