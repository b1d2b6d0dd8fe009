"""Training from a TOML file: `handhold train ...`, and `python -m handhold.train ...` where only numpy, scipy, torch,
safetensors and OpenCV are installed (a rented GPU).

    python -m handhold.train frontend --config configs/frontend.toml --out runs/frontend --device cuda
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .config import BadConfig, read_toml, to_dict
from .datasets.synthetic.scenes import SynthConfig
from .errors import HandholdError
from .regressors.training.config import LoopConfig
from .regressors.training.loop import Trained, train
from .regressors.training.streams import SlimStream, Stream
from .regressors.training.tasks import DirectSettings, ParametricSettings, SegmenterSettings, make_tasks

STARTED = time.monotonic()  # a time budget includes the imports
KINDS = {
    "regressor": ("parametric", "direct"),
    "segmenter": ("segmenter",),
    "frontend": ("parametric", "direct", "segmenter"),
}


@dataclass(frozen=True)
class FrontendConfig:
    """Everything that decides a training of the front end: hand regressors and the segmenter."""

    tasks: tuple[str, ...] = ("parametric", "segmenter")
    """What is trained, of parametric, direct and segmenter; all learn from the same generated pictures."""
    shards: Path | None = None
    """Folder of pictures made by `handhold synth`; without it they are generated while training."""
    loop: LoopConfig = field(default_factory=LoopConfig)
    synth: SynthConfig = field(default_factory=SynthConfig)
    parametric: ParametricSettings = field(default_factory=ParametricSettings)
    direct: DirectSettings = field(default_factory=DirectSettings)
    segmenter: SegmenterSettings = field(default_factory=SegmenterSettings)

    def __post_init__(self) -> None:
        unknown = [t for t in self.tasks if t not in KINDS["frontend"]]
        if unknown or not self.tasks:
            raise BadConfig(f"Bad setting: tasks must name {', '.join(KINDS['frontend'])}, not {unknown or 'nothing'}.")


def read_config(path: Path | None) -> FrontendConfig:
    """A training's settings from TOML, or the defaults. Raises `BadConfig`."""
    return FrontendConfig() if path is None else read_toml(path, FrontendConfig())


def make_stream(config: FrontendConfig, device: Any) -> Stream:
    """The generator, or the pictures it has left on disk."""
    if config.shards is not None:
        from .datasets.synthetic.shards import Shards

        return Shards(config.shards, device=device)
    from .datasets.synthetic.scenes import Synth

    return Synth(config.synth, device)


def make_worker_stream(config: FrontendConfig, device: Any) -> Stream:
    """The same for worker processes, whose batches travel between processes."""
    return SlimStream(make_stream(config, device))


def run(
    kind: Literal["regressor", "segmenter", "frontend"],
    config: FrontendConfig,
    out: Path,
    export: Path | None = None,
    report: Callable[..., None] = lambda *a, **k: None,
    started: float | None = None,
) -> Trained:
    """Train those of `config.tasks` that belong to `kind`, into the folder `out`; an interrupted training goes on."""
    tasks = [t for t in config.tasks if t in KINDS[kind]]
    if not tasks:
        raise BadConfig(f"The settings train {', '.join(config.tasks)}: none of them is a {kind}.")
    chosen = replace(config, tasks=tuple(tasks))
    return train(
        make_tasks({name: getattr(chosen, name) for name in tasks}),
        partial(make_stream, chosen),
        chosen.loop,
        out,
        worker_stream=partial(make_worker_stream, chosen),
        export=export,
        settings={k: v for k, v in to_dict(chosen).items() if k not in KINDS["frontend"] or k in tasks},
        report=report,
        started=started,
    )


class Lines:
    """Progress as lines on stderr, at most one in `every` seconds; held-out figures always."""

    def __init__(self, every: float = 5.0):
        self.every, self.last = every, -1e9

    def __call__(self, fraction: float, text: str = "", **metrics: float) -> None:
        now = time.monotonic()
        if "held-out" in text or fraction >= 1 or now - self.last >= self.every:
            self.last = now
            figures = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if "-" not in k)
            print(f"{100 * fraction:5.1f} %  {now - STARTED:6.0f} s  {text}  {figures}", file=sys.stderr, flush=True)


def with_options(
    config: FrontendConfig, device: str | None, steps: int | None, budget_seconds: float | None
) -> FrontendConfig:
    """The settings with those of the command line on top."""
    given = {"device": device, "steps": steps, "budget_seconds": budget_seconds}
    return replace(config, loop=replace(config.loop, **{k: v for k, v in given.items() if v is not None}))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m handhold.train`; exit codes as of `handhold`."""
    parser = argparse.ArgumentParser("handhold.train", description="Train the hand regressors and the segmenter.")
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--config", type=Path, help="TOML file with the settings")
    parser.add_argument("--out", type=Path, required=True, help="folder of the training; the same command goes on")
    parser.add_argument("--export", type=Path, help="folder of the weights; OUT/export by default")
    parser.add_argument("--device", help="cpu or cuda, over the settings")
    parser.add_argument("--steps", type=int, help="optimizer steps, over the settings")
    parser.add_argument("--budget-seconds", type=float, help="wall time, over the settings")
    args = parser.parse_args(argv)
    try:
        config = with_options(read_config(args.config), args.device, args.steps, args.budget_seconds)
        done = run(args.kind, config, args.out, args.export, Lines(), STARTED)
    except HandholdError as e:
        print(f"handhold: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps({"steps": done.steps, "seconds": round(done.seconds, 1), "metrics": done.metrics}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
