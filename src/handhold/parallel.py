"""Independent pieces of work on all cores, with the same results as one after the other.

Threads, as all that is heavy here (arrays, images, networks) works outside Python's lock. A piece must depend on its
argument alone and draw no random numbers that others draw.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def cores() -> int:
    """How many threads this process can keep busy."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def each(
    job: Callable[[Any], T],
    items: Iterable[Any],
    workers: int | None = None,
    tick: Callable[[int], None] = lambda count: None,
) -> list[T]:
    """[job(x) for x in items], on `workers` threads (default: all cores); torch runs one thread in each.

    tick: called with how many are done, in the caller's thread.
    """
    out: list[T] = []
    with one_thread(), ThreadPoolExecutor(workers or cores(), initializer=_one_torch_thread) as pool:
        try:
            for result in pool.map(job, items):
                out.append(result)
                tick(len(out))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return out


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """[job() for job in jobs], all at once where there are cores; torch runs one thread in each."""
    return each(lambda job: job(), jobs, min(len(jobs), cores()))


@contextlib.contextmanager
def one_thread():
    """Torch on one thread. For tiny matrices a second one costs more than it brings, and its waiting more still."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _one_torch_thread() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
