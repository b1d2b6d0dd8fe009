"""Where batches come from: the protocol of a stream, worker processes, and reuse of what was expensive to make."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any, Protocol

import torch

from ...datasets.synthetic.sample import SynthBatch


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


@dataclass(frozen=True)
class Slim:
    """A batch on its way between processes: 8-bit pictures, and without what no task reads (depth, amodal masks, the
    object's vertices)."""

    batch: SynthBatch

    @staticmethod
    def of(batch: SynthBatch) -> Slim:
        """On the CPU, in one go."""
        small = replace(
            batch,
            image=(255 * batch.image).round().clamp(0, 255).to(torch.uint8),
            amodal=batch.amodal[:, :, :0],
            depth=batch.depth[:, :0],
            object=replace(batch.object, vertices=batch.object.vertices[:, :0]),
        )
        return Slim(small.to("cpu"))

    def to(self, device: str | torch.device) -> SynthBatch:
        batch = self.batch.to(device)
        return replace(batch, image=batch.image.float() / 255)


class SlimStream:
    """A stream of pictures whose batches are `Slim`; for worker processes, which may draw on a GPU of their own accord
    and hand over through the CPU's memory."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def batch(self, step: int, n: int, split: str = "train") -> Slim:
        out = Slim.of(self.stream.batch(step, n, split))
        if torch.cuda.is_initialized():  # the copies are asynchronous
            torch.cuda.synchronize()
        return out


class _Numbered(torch.utils.data.Dataset):
    """A stream as a map-style data set, made in the worker that uses it: (split, number) -> batch."""

    def __init__(self, factory: Callable[[], Stream], n: int):
        self.factory, self.n = factory, n
        self._stream: Stream | None = None

    def __getitem__(self, key: tuple[str, int]) -> Any:
        if self._stream is None:
            workers = torch.utils.data.get_worker_info()
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // (1 + (workers.num_workers if workers else 0))))
            self._stream = self.factory()
        split, index = key
        return self._stream.batch(index, self.n, split)


class Ahead:
    """Batches made ahead of time by worker processes, in order: call with the next number.

    factory: makes the stream; it is pickled, so a module-level function or a `functools.partial` of one. A call out of
    order (a resume) starts the processes anew from that number. The first `held_out` batches that come are of the split
    "val" and are kept in `self.held_out` from the first call on. rank, world: number of this process among how many
    that share the stream.
    """

    def __init__(
        self,
        factory: Callable[[], Stream],
        n: int,
        workers: int,
        prefetch: int = 2,
        rank: int = 0,
        world: int = 1,
        held_out: int = 0,
    ):
        self.data = _Numbered(factory, n)
        self.workers, self.prefetch, self.rank, self.world, self.wanted = workers, prefetch, rank, world, held_out
        self.held_out: list[Any] = []
        self._next, self._batches = -1, iter(())

    def __call__(self, index: int) -> Any:
        if index != self._next:
            self._next, self._batches = index, self._from(index)
            while len(self.held_out) < self.wanted:
                self.held_out.append(next(self._batches))
        self._next += 1
        return next(self._batches)

    def _from(self, index: int) -> Iterator[Any]:
        keys = chain(
            (("val", i) for i in range(len(self.held_out), self.wanted)),
            (("train", i * self.world + self.rank) for i in count(index)),
        )
        return iter(
            torch.utils.data.DataLoader(
                self.data,
                batch_size=None,
                sampler=_Keys(keys),
                num_workers=self.workers,
                prefetch_factor=self.prefetch,
                multiprocessing_context="spawn",
                collate_fn=_same,
            )
        )


class _Keys(torch.utils.data.Sampler):
    def __init__(self, keys: Iterator[Any]):
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return self.keys


def _same(x: Any) -> Any:
    return x
