"""Where batches come from: the protocol of a stream, worker processes, and reuse of what was expensive to make."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch


class Stream(Protocol):
    """Batches by number: the same arguments give the same batch, whatever was asked before.

    A stream needs no state to be saved, so a training that resumes asks for the next number and goes on.
    """

    def batch(self, step: int, n: int, split: str = "train") -> Any:
        """Batch number `step` of `n` pictures (a `SynthBatch`); `split` "val" shares nothing with "train"."""
        ...


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^31) that depends on all parts; the same on every machine."""
    return zlib.crc32("\0".join(map(str, parts)).encode()) & 0x7FFF_FFFF


def reused(step: int, repeats: int, spacing: int) -> tuple[int, int]:
    """Which batch step `step` trains on, and for the how many-th time: (index, use).

    A new batch is made every `repeats` steps. Its uses lie `spacing` batches apart; the first steps, whose earlier
    batch does not exist, fall back on those there are.
    """
    newest, use = divmod(step, repeats)
    return (newest - use * spacing) % (newest + 1), use


class Reuse:
    """A stream's training batches by optimizer step, each used `repeats` times. Holds the few batches still needed.

    Stateless from the outside: a batch that is needed and not held (after a resume) is made again.
    """

    def __init__(self, make: Callable[[int], Any], repeats: int = 1, spacing: int = 4):
        if repeats < 1 or spacing < 1:
            raise ValueError("repeats and spacing must be 1 or more")
        self.make, self.repeats, self.spacing = make, repeats, spacing
        self._held: dict[int, Any] = {}

    def at(self, step: int) -> Any:
        index, _ = reused(step, self.repeats, self.spacing)
        newest = step // self.repeats
        oldest = max(newest - (self.repeats - 1) * self.spacing, 0)
        for old in [i for i in self._held if not oldest <= i <= newest]:
            del self._held[old]
        for i in range(oldest, newest + 1):  # all of them have uses left
            if i not in self._held:
                self._held[i] = self.make(i)
        return self._held[index]


class _Numbered(torch.utils.data.Dataset):
    """A stream as a map-style data set, made in the worker that uses it."""

    def __init__(self, factory: Callable[[], Stream], n: int, rank: int, world: int):
        self.factory, self.n, self.rank, self.world = factory, n, rank, world
        self._stream: Stream | None = None

    def __getitem__(self, index: int) -> Any:
        if self._stream is None:
            self._stream = self.factory()
            torch.set_num_threads(1)
        return self._stream.batch(index * self.world + self.rank, self.n, "train")


class Ahead:
    """Batches made ahead of time by worker processes, in order: call with the next number.

    factory: makes the stream; it is pickled, so a module-level function or a `functools.partial` of one. A call out of
    order (a resume) starts the processes anew from that number.
    """

    def __init__(
        self, factory: Callable[[], Stream], n: int, workers: int, prefetch: int = 2, rank: int = 0, world: int = 1
    ):
        self.data = _Numbered(factory, n, rank, world)
        self.workers, self.prefetch = workers, prefetch
        self._next, self._batches = -1, iter(())

    def __call__(self, index: int) -> Any:
        if index != self._next:
            self._next, self._batches = index, self._from(index)
        self._next += 1
        return next(self._batches)

    def _from(self, index: int) -> Iterator[Any]:
        return iter(
            torch.utils.data.DataLoader(
                self.data,
                batch_size=None,
                sampler=range(index, 2**40),
                num_workers=self.workers,
                prefetch_factor=self.prefetch,
                multiprocessing_context="spawn",
                collate_fn=_same,
            )
        )


def _same(x: Any) -> Any:
    return x
