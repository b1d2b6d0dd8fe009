"""prepare -> track -> fit -> evaluate -> export, over one run folder.

The stage contract: a stage is a plain function

    stage(run: Run, config: Config, report: Progress) -> None

that reads what the stages before it left in the run folder and writes its own files there, and nothing else. It

- reads only its own slice of the configuration, plus `seed`, `device` and `method` (what it reads must be in its
  `settings` below, or a change would not make it run again);
- is deterministic: the same inputs, settings and seed give the same bytes (numpy, random and torch are seeded before
  it);
- says how far it is with `report(fraction, text, loss=...)`, what it assumed with `report.note("...")`, and what its
  result lacks with `report.partial("...")`; notes and reasons are kept in the stage's stamp, so a skipped stage still
  tells them;
- raises a `handhold.errors` class with one clear sentence when there is nothing to go on with.

When it returns, `run` stamps it. What a stage was given and made is hashed, so a stage runs again exactly when its
settings, its input files or the outputs of the stage before have changed (see runs.py). `fit` is resumable: its
folder survives a kill with the same key, and it must validate the checkpoints it finds there.

Files by which stages meet: `stages.prepare.load_prepared(run) -> Sequence`; `2_track/` is between track and fit; fit
writes `scene.npz` with `Scene.save` and, for splats and new views, `3_fit/<body>_gaussians.npz` (docs/formats.md).
"""

from __future__ import annotations

import errno
import importlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import __version__
from .config import BadConfig, Config, absolute, is_sam, to_dict
from .errors import HandholdError, UnusableInput
from .files import digest
from .progress import Progress
from .runs import Run, Stamp, is_run, make_key
from .scene import load_npz

StageFunction = Callable[[Run, Config, Progress], None]


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    function: str | StageFunction  # "module:function" is imported only when it runs
    outputs: tuple[str, ...]  # files and folders in the run folder; removed before the stage starts
    settings: tuple[str, ...]  # dotted names in Config that decide the result; a Path counts by its content
    resumable: bool = False  # its folders survive an interrupted attempt with the same key
    seeds_torch: bool = True

    def load(self) -> StageFunction:
        if not isinstance(self.function, str):
            return self.function
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)


STAGES: tuple[Stage, ...] = (
    Stage("prepare", "handhold.stages.prepare:prepare", ("1_prepare",), ("prepare", "seed", "device")),
    Stage("track", "handhold.stages.track:track", ("2_track",), ("track", "seed", "device")),
    Stage(
        "fit",
        "handhold.stages.fit:fit",
        ("3_fit", "scene.npz"),
        ("fit", "bigs", "hold", "track.without", "method", "seed", "device"),
        resumable=True,
    ),
    Stage("evaluate", "handhold.stages.evaluate:evaluate", ("metrics.json",), ("evaluate",)),
    Stage(
        "export",
        "handhold.stages.export:export",
        (
            *(f"{body}{kind}.ply" for body in ("object", "right", "left") for kind in ("", "_splat")),
            *("scene.glb", "preview.mp4", "report.html"),
        ),
        ("export",),
    ),
)


@dataclass(frozen=True)
class Result:
    """What a run has come to."""

    run: Run
    notes: tuple[str, ...]
    reasons: tuple[str, ...]  # why the result is partial; empty when it is not
    seconds: dict[str, float]  # by stage, of the time it was last run
    kept: tuple[str, ...]  # stages that were skipped because nothing had changed
    peak_mb: float  # largest resident memory of this process or of one child, so far
    stages: tuple[str, ...] = field(default=())  # all finished stages

    @property
    def partial(self) -> bool:
        return bool(self.reasons)


def run(
    video: str | Path | None,
    out: str | Path,
    config: Config | None = None,
    report: Progress | None = None,
    *,
    first: str | None = None,
    last: str | None = None,
    fresh: bool = False,
    stages: tuple[Stage, ...] = STAGES,
) -> Result:
    """Run the stages from `first` to `last` (names; all by default) of the run folder `out`, skipping what is up to
    date.

    video: the input; None means the one the run folder was made from.
    fresh: run every chosen stage again, even if nothing has changed.
    Raises `UnusableInput` and its kin with one sentence, and lets `KeyboardInterrupt` through; in every case finished
    stages stay, and the same call goes on from there.
    """
    target = Run(Path(out).absolute())
    config = absolute(config if config is not None else Config())
    names = [s.name for s in stages]
    chosen = stages[names.index(first) if first else 0 : (names.index(last) if last else len(names)) + 1]
    report = report if report is not None else Progress()
    stage_name, kept = "", []
    try:
        if chosen[0] is stages[0]:
            source = _check_video(target.video if video is None else Path(video))
            _check_folder(target.root)
        else:
            target.info()  # complain before anything is written
        for stage in chosen:
            _settings(config, stage)  # a given file that is missing is told now, not minutes later
        if config.evaluate.truth is not None and any(s.name == "evaluate" for s in chosen):
            load_npz(config.evaluate.truth)
        if config.track.features == "xfeat" and any(s.name == "track" for s in chosen):
            from .tracking._sfm_learned import require_packages

            require_packages()
        with target.lock():
            if report.events is None:
                report.events = target.events_path
            previous: Stamp | None = None
            if chosen[0] is stages[0]:
                source_digest = digest(source)
                target.save_info(config, source, source_digest)
                given = {"input": source_digest}
            else:
                target.save_info(config, target.video, target.info()["input"]["sha256"])
                before = names[names.index(chosen[0].name) - 1]
                previous = target.stamp(before)
                if previous is None:
                    raise UnusableInput(
                        f"{target.root} has no finished `{before}` stage; run `handhold {before}` on it first."
                    )
                given = {}
            for stage in chosen:
                stage_name = stage.name
                if previous is not None:
                    given = {"previous": _inputs(target, stages, stage)}
                key = make_key(stage=stage.name, version=__version__, settings=_settings(config, stage), **given)
                if fresh:
                    target.forget(stage.name)
                stamp = target.stamp(stage.name)
                report.begin(stage.name)
                if stamp is not None and stamp.key == key:
                    kept.append(stage.name)
                    report.notes, report.reasons = list(stamp.notes), list(stamp.reasons)
                    report.end("kept")
                else:
                    stamp = _run_stage(target, config, report, stage, key)
                previous = stamp
    except OSError as e:
        if e.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
            where = f"with the {stage_name} stage" if stage_name else "where it stopped"
            raise UnusableInput(
                f"The disk is full: free some space for {target.root} and give the same command again, "
                f"which goes on {where}."
            ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UnusableInput(
                f"{e.filename or target.root} cannot be used ({e.strerror}); choose another path."
            ) from e
        raise
    finally:
        report.close()
    return result(target, stages, tuple(kept))


def result(target: Run, stages: tuple[Stage, ...] = STAGES, kept: tuple[str, ...] = ()) -> Result:
    """What the run folder holds now."""
    stamps = {s.name: stamp for s in stages if (stamp := target.stamp(s.name)) is not None}
    unique = lambda lists: tuple(dict.fromkeys(text for texts in lists for text in texts))  # noqa: E731
    return Result(
        run=target,
        notes=unique(s.notes for s in stamps.values()),
        reasons=unique(s.reasons for s in stamps.values()),
        seconds={name: s.seconds for name, s in stamps.items()},
        kept=kept,
        peak_mb=_peak_mb(),
        stages=tuple(stamps),
    )


def _run_stage(target: Run, config: Config, report: Progress, stage: Stage, key: str) -> Stamp:
    started = time.monotonic()
    state = "failed"
    try:
        if config.device != "cpu":
            _check_device(config.device)
        target.begin(stage.name, key, stage.outputs, stage.resumable)
        function = stage.load()
        _seed_everything(config.seed, stage.seeds_torch)
        function(target, config, report)
        seconds = time.monotonic() - started
        stamp = target.finish(stage.name, key, stage.outputs, seconds, report.notes, report.reasons)
        state = "done"
        return stamp
    except KeyboardInterrupt:
        state = "stopped"
        raise
    except HandholdError as e:
        report.event("error", text=str(e))
        raise
    except MemoryError as e:
        raise UnusableInput(
            f"There is not enough memory for the {stage.name} stage; "
            "use --max-side, --stride, --start or --end to make the clip smaller."
        ) from e
    finally:
        report.end(state)


def _inputs(target: Run, stages: tuple[Stage, ...], stage: Stage) -> dict[str, str]:
    """Hash of what each earlier stage made: a stage may read from any of them."""
    earlier = stages[: [s.name for s in stages].index(stage.name)]
    stamps = {s.name: target.stamp(s.name) for s in earlier}
    return {
        name: stamp.outputs + make_key(notes=stamp.notes, reasons=stamp.reasons)
        for name, stamp in stamps.items()
        if stamp
    }


def _settings(config: Config, stage: Stage) -> dict[str, Any]:
    out = {}
    for name in stage.settings:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        out[name] = _by_content(value)
    return out


def _by_content(value: Any) -> Any:
    """A setting as JSON, with paths replaced by the digest of what they hold."""
    if isinstance(value, Path):
        if is_sam(value):
            folder = Path(str(value).partition(":")[2])
            return f"{str(value)[:5]}{digest(folder)}" if folder.is_dir() else str(value)
        if not value.exists():
            raise UnusableInput(f"{value} does not exist.")
        return digest(value)
    if hasattr(value, "__dataclass_fields__"):
        plain = to_dict(value)
        return {
            k: _by_content(getattr(value, k)) if isinstance(getattr(value, k), Path) else v for k, v in plain.items()
        }
    return value


def _check_video(video: Path) -> Path:
    if not video.exists():
        raise UnusableInput(f"{video} does not exist; give the path of a video or of a folder of images.")
    if video.is_file() and video.stat().st_size == 0:
        raise UnusableInput(f"{video} is empty; give the path of a video or of a folder of images.")
    return video


def _check_folder(root: Path) -> None:
    """A stage removes what it is going to write, so a folder with someone's own files must not become a run folder."""
    if root.is_dir() and not is_run(root) and any(not p.name.startswith(".") for p in root.iterdir()):
        raise UnusableInput(f"{root} holds other files and is not a run folder; give a new or empty folder as --out.")


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise BadConfig(f"There is no torch device {name!r}; use cpu or, with a GPU, cuda.") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadConfig(f"Torch sees no GPU here, so device {name!r} cannot be used; use --device cpu.")


def _seed_everything(seed: int, torch_too: bool) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)
    if torch_too:  # always, not only if it is loaded already: a resumed run must draw what the whole run drew
        import torch

        torch.manual_seed(seed)


def _peak_mb() -> float:
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return float("nan")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / unit
