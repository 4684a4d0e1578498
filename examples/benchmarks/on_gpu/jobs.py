"""Measurements that cannot take each other down: each a row, each guarded, each with an end.

A section's jobs run in a process of its own. What a job raises becomes its row's error. If the process dies or a job
does not end, the job's row says so, and the next jobs run in a new process. Sections share the time there is.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from examples.benchmarks.on_gpu.machine import is_out_of_memory, release

START = 180.0  # seconds that a process may take until its first job begins
_LEAST = 0.5  # seconds left below which no further job is begun


@dataclass(frozen=True)
class Setting:
    """The settings of a run, for all sections.

    Attributes:
        device: its name, for `torch.device`.
        tiny: take the sizes of a test.
        rounds: steps to take a median of.
        memory: bytes that the largest step may take.
    """

    device: str
    tiny: bool
    rounds: int
    memory: int

    @property
    def where(self) -> torch.device:
        """The device, with an index if it has one."""
        device = torch.device(self.device)
        return device if device.type == "cpu" or device.index is not None else torch.device(device.type, 0)


@dataclass(frozen=True)
class Job:
    """One row to be: ``measure`` fills a dictionary in, so that what it found before it failed is kept."""

    case: str
    method: str
    measure: Callable[[dict[str, Any]], None]
    limit: float = 120.0


@dataclass(frozen=True)
class Section:
    """Jobs on one subject, by importance, and their share of the time."""

    name: str
    share: float
    jobs: Callable[[Setting], Sequence[Job]]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        section: its section's name.
        case: what was measured: a model, a check.
        method: how it was trained, where that matters.
        values: what was found, by column.
        error: why it ended early; None if it did not.
        seconds: what it took.
    """

    section: str
    case: str
    method: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0


def measured(section: str, job: Job, device: torch.device) -> Row:
    """Run a job; whatever it raises is its row's error."""
    start, found, error = time.monotonic(), {}, None
    gc.freeze()  # collections, of which a job makes many, look at what is new only
    try:
        job.measure(found)
    except Exception as raised:
        lines = str(raised).strip().splitlines() or [""]
        error = "out of memory" if is_out_of_memory(raised) else f"{type(raised).__name__}: {lines[0][:300]}"
    release(device)
    gc.unfreeze()
    return Row(section, job.case, job.method, found, error, round(time.monotonic() - start, 2))


def rows_here(section: Section, setting: Setting, seconds: float) -> Iterator[Row]:
    """Yield the rows of a section from jobs in this process, until its time is over."""
    end, jobs = time.monotonic() + seconds, section.jobs(setting)
    for index, job in enumerate(jobs):
        if end - time.monotonic() < _LEAST:
            yield _left_out(section, jobs[index:])
            return
        yield measured(section.name, job, setting.where)


def rows_apart(section: Section, setting: Setting, seconds: float) -> Iterator[Row]:
    """Yield the rows of a section from jobs in processes of their own, until its time is over."""
    end, jobs, first = time.monotonic() + seconds, section.jobs(setting), 0
    while first < len(jobs):
        if end - time.monotonic() < _LEAST:
            yield _left_out(section, jobs[first:])
            return
        for following, row in _attempt(section, setting, jobs, first, end):
            first = following
            yield row


def _attempt(
    section: Section, setting: Setting, jobs: Sequence[Job], first: int, end: float
) -> Iterator[tuple[int, Row]]:
    """Yield rows with the number of the next job, until one process has ended, by itself or not."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(section, setting, first, end - time.monotonic(), sender), daemon=True)
    process.start()
    sender.close()
    begun, limit = time.monotonic(), min(START, end - time.monotonic())
    running = False
    try:
        while True:
            if not receiver.poll(max(0.0, begun + limit - time.monotonic())):
                problem = f"took longer than {limit:.0f} s"
                break
            message = receiver.recv()
            if message is None:
                return
            if isinstance(message, Row):
                first, running = first + 1, False
                yield first, message
            else:
                running = True
            begun = time.monotonic()
            limit = max(_LEAST, min(jobs[first].limit if running else START, end - begun)) if first < len(jobs) else 30
    except EOFError:
        process.join(10)
        problem = f"its process ended with code {process.exitcode}"
    finally:
        if process.is_alive():
            process.kill()
        process.join(10)
    if running:
        job = jobs[first]
        row = Row(section.name, job.case, job.method, {}, problem, round(time.monotonic() - begun, 2))
        yield first + 1, row
    else:  # nor would the next one begin
        yield len(jobs), Row(section.name, "begin", "", {}, f"{problem} before the next of {len(jobs)} jobs began")


def _work(section: Section, setting: Setting, first: int, seconds: float, sender: Connection) -> None:
    end = time.monotonic() + seconds
    for job in section.jobs(setting)[first:]:
        if end - time.monotonic() < _LEAST:
            break
        sender.send(job.case)
        sender.send(measured(section.name, job, setting.where))
    sender.send(None)


def _left_out(section: Section, jobs: Sequence[Job]) -> Row:
    names = ", ".join(" ".join(filter(None, (job.case, job.method))) for job in jobs)
    return Row(section.name, "no time left for", "", {}, f"{len(jobs)}: {names}")


def run(sections: Sequence[Section], setting: Setting, seconds: float, *, apart: bool) -> Iterator[Row]:
    """Yield the rows of all sections within ``seconds``; what one leaves of its share, the next ones have.

    Args:
        sections: in the order of their importance.
        setting: what they are told.
        seconds: for all of them.
        apart: run them in processes of their own.
    """
    end = time.monotonic() + seconds
    for number, section in enumerate(sections):
        share = section.share / sum(other.share for other in sections[number:])
        left = max(0.0, end - time.monotonic())
        try:
            yield from (rows_apart if apart else rows_here)(section, setting, share * left)
        except Exception as error:  # the list of its jobs, or its process, could not be made
            yield Row(section.name, "begin", "", {}, f"{type(error).__name__}: {error}")
