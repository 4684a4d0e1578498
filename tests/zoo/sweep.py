"""Models are judged in processes of their own: what ends one of them becomes a row."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

from tests.zoo.catalogue import LIBRARIES, entry
from tests.zoo.row import Row

SECONDS = 900
"""How long a model may take."""


def sweep(keys: Iterable[tuple[str, str]], jobs: int = 1) -> Iterator[Row]:
    """The rows of models, as they come.

    Args:
        keys: library and name of each model.
        jobs: how many are judged at a time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.zoo.verdict", *(f"tests.zoo.{library}" for library in LIBRARIES)])
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(in_process, context, key, send_row) for key in keys]
        for future in as_completed(futures):
            yield future.result()


def send_row(library: str, name: str, to: Connection) -> None:
    """Judge a model and send its row. One thread: the order of sums is then always the same."""
    import torch

    from tests.zoo.verdict import judge

    torch.set_num_threads(1)
    to.send(judge(entry(library, name)).to_dict())


def in_process(context: Any, key: tuple[str, str], work: Callable[[str, str, Connection], None]) -> Row:
    """A model's row, or one that says how the process ended which was to send it.

    Args:
        context: of `multiprocessing`; how processes begin.
        key: library and name of the model.
        work: sends the row.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*key, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return Row.of(receiver.recv())
        return Row(*key, failure=f"it took more than {SECONDS} seconds")
    except EOFError:  # the process ended and sent nothing
        process.join()
        return Row(*key, failure=_ended(process.exitcode))
    finally:
        process.kill()
        process.join()


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"the process ended with exit status {code}"
