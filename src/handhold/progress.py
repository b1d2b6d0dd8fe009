"""How stages tell the world where they are: `report(fraction, text, **metrics)`, and where it is shown and kept.

Lower layers need no import: whatever they call `report` is any callable with that signature. `Progress` also appends
every event to the run's `events.jsonl`, and collects `note`s (what was assumed) and `partial` reasons (what is
missing).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Progress:
    """Quiet progress: shows nothing, keeps events, notes and reasons. Base of what the terminal shows."""

    def __init__(self, events: Path | None = None):
        self.events = events
        self.stage = ""
        self.notes: list[str] = []
        self.reasons: list[str] = []
        self._started = time.monotonic()
        self._logged = 0.0

    def __call__(self, fraction: float, text: str = "", **metrics: float) -> None:
        """Say how far the stage is.

        fraction: 0 to 1; text: what is being done, a few words; metrics: live figures, e.g. `loss=0.01`.
        Cheap enough for an inner loop: events are kept at most four times a second.
        """
        fraction = min(max(float(fraction), 0.0), 1.0)
        now = time.monotonic()
        if now - self._logged >= 0.25 or fraction >= 1:
            self._logged = now
            self.event(
                "progress", fraction=round(fraction, 4), text=text, **{k: _number(v) for k, v in metrics.items()}
            )
        self.show(fraction, text, metrics)

    def each(
        self, items: Iterable[T], total: int, text: str = "", first: float = 0.0, last: float = 1.0
    ) -> Iterator[T]:
        """Go through `items` while the fraction moves from `first` to `last`."""
        for i, item in enumerate(items):
            yield item
            self(first + (last - first) * min(i + 1, total) / max(total, 1), text)

    def note(self, text: str) -> None:
        """Keep a sentence about what was assumed or could not be had; it is shown in the report."""
        if text not in self.notes:
            self.notes.append(text)
            self.event("note", text=text)

    def partial(self, reason: str) -> None:
        """Mark the result as partial, with the reason; the run goes on and still exits 0."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            self.event("partial", text=reason)

    def begin(self, stage: str) -> None:
        self.stage, self.notes, self.reasons, self._started = stage, [], [], time.monotonic()
        self.event("begin")
        self.show_begin()

    def end(self, state: str) -> None:
        """state: "done", "kept" (nothing had changed), "failed" or "stopped"."""
        self.event(state, seconds=round(time.monotonic() - self._started, 3))
        self.show_end(state)

    def event(self, kind: str, **values: Any) -> None:
        if self.events is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "stage": self.stage, "event": kind, **values})
        with self.events.open("a", encoding="utf-8") as f:
            f.write(line + "\n")

    # what a terminal shows; nothing here
    def show(self, fraction: float, text: str, metrics: dict[str, float]) -> None: ...
    def show_begin(self) -> None: ...
    def show_end(self, state: str) -> None: ...
    def close(self) -> None: ...


def _number(value: float) -> float | None:
    """A figure that JSON has; None for what is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None


class PlainProgress(Progress):
    """One line per stage on stderr, for logs and pipes."""

    def show_begin(self) -> None:
        print(f"{self.stage} ...", file=sys.stderr, flush=True)

    def show_end(self, state: str) -> None:
        seconds = time.monotonic() - self._started
        print(f"{self.stage} {state}, {seconds:.1f} s", file=sys.stderr, flush=True)
        for text in self.notes:
            print(f"  note: {text}", file=sys.stderr, flush=True)
        for text in self.reasons:
            print(f"  partial: {text}", file=sys.stderr, flush=True)


class TerminalProgress(Progress):
    """A bar per stage with the time left and a live metric, on stderr."""

    def __init__(self, events: Path | None = None):
        super().__init__(events)
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            SpinnerColumn,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._console = Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[live]}"),
            console=self._console,
        )
        self._bars.start()
        self._task = None

    def show_begin(self) -> None:
        self._task = self._bars.add_task(self.stage, total=1.0, live="")

    def show(self, fraction: float, text: str, metrics: dict[str, float]) -> None:
        if self._task is not None:
            live = "  ".join([text] * bool(text) + [f"{k} {v:.4g}" for k, v in metrics.items()])
            self._bars.update(self._task, completed=fraction, live=live)

    def show_end(self, state: str) -> None:
        if self._task is None:
            return
        ok = state in ("done", "kept")
        words = {"kept": "nothing changed, kept", "done": ""}.get(state, state)
        if ok:
            self._bars.update(self._task, completed=1.0, live=words)
        else:
            self._bars.update(self._task, live=words)
        self._bars.stop_task(self._task)
        for text in self.notes:
            self._bars.console.print(f"  [dim]note[/dim] {text}", highlight=False)
        for text in self.reasons:
            self._bars.console.print(f"  [yellow]partial[/yellow] {text}", highlight=False)
        self._task = None

    def close(self) -> None:
        self._bars.stop()


def make_progress(events: Path | None, quiet: bool) -> Progress:
    """Progress that suits where stderr goes."""
    if quiet:
        return Progress(events)
    return TerminalProgress(events) if sys.stderr.isatty() else PlainProgress(events)
