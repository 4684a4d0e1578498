"""Two processes that run functions of the tests together, over gloo."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZE = 2
_TIMEOUT = timedelta(seconds=120)  # for a process whose partner has died


class World:
    """Starts its processes once; every ``run`` after that costs little."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        store = str(Path(self._directory.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return what ``function(*args)`` returns in each process; it must be found by name in its module."""
        for pipe in self._pipes:
            pipe.send((function, args))
        replies = [pipe.recv() for pipe in self._pipes]
        errors = [error for error, _ in replies if error]
        assert not errors, "\n".join(errors)
        return [value for _, value in replies]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()
        self._directory.cleanup()


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=_TIMEOUT)
    while (task := pipe.recv()) is not None:
        function, args = task
        try:
            pipe.send((None, function(*args)))
        except Exception:
            pipe.send((f"process {rank}: {traceback.format_exc()}", None))
    dist.destroy_process_group()
