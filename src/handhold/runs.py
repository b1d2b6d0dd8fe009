"""The run folder: where stages meet on disk, what is finished, and who may write.

A finished stage has a stamp, `stamps/<stage>.json`, written last and atomically. It holds the stage's *key* (a hash
of all that decides its result: its own settings, the content of its input files, the outputs of the stage before, the
version) and the size and SHA-256 of every file it made. A stage with a matching stamp is skipped. One without starts
clean: its stamp and files are removed first, so no half-written file is ever trusted, and `kill -9` at any time costs
only the stage it hit.

    runs/<name>/
      run.json  events.jsonl  stamps/  1_prepare/  2_track/  3_fit/
      scene.npz  scene.glb  <body>.ply  <body>_splat.ply  metrics.json  report.html  preview.mp4  render/
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import Config, from_dict, to_dict
from .errors import UnusableInput
from .files import digest, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass(frozen=True)
class Stamp:
    """What a finished stage left behind."""

    key: str
    seconds: float
    notes: tuple[str, ...]
    reasons: tuple[str, ...]  # why the result is partial; empty when it is not
    files: dict[str, tuple[int, str]]  # path in the run folder -> size in bytes, SHA-256

    @property
    def outputs(self) -> str:
        """One hash of all that the stage made; a part of the next stage's key."""
        return hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Run:
    """One run folder. Holds no state: everything is on disk."""

    root: Path

    @property
    def prepare_dir(self) -> Path:
        return self.root / "1_prepare"

    @property
    def track_dir(self) -> Path:
        return self.root / "2_track"

    @property
    def fit_dir(self) -> Path:
        return self.root / "3_fit"

    @property
    def scene_path(self) -> Path:
        return self.root / "scene.npz"

    @property
    def metrics_path(self) -> Path:
        return self.root / "metrics.json"

    @property
    def events_path(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def video(self) -> Path:
        """The video (or folder of images) this run is of."""
        return Path(self.info()["input"]["path"])

    def info(self) -> dict[str, Any]:
        """run.json. Raises `UnusableInput` when this is not a run folder."""
        return _read_json(self.root / "run.json") or _not_a_run(self.root)

    def config(self) -> Config:
        """The configuration the run was last started with."""
        return from_dict(self.info()["config"])

    def save_info(self, config: Config, video: Path, video_digest: str) -> None:
        """Write run.json: configuration, input and its hash, seed, device, versions."""
        import platform

        from . import __version__

        info = {
            "handhold": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "input": {"path": str(Path(video).absolute()), "sha256": video_digest},
            "seed": config.seed,
            "device": config.device,
            "config": to_dict(config),
        }
        write_atomically(self.root / "run.json", json.dumps(info, indent=1) + "\n")

    def stamp(self, stage: str) -> Stamp | None:
        """The stamp of a finished stage whose files are all there with their sizes; None otherwise."""
        data = _read_json(self.root / "stamps" / f"{stage}.json")
        try:
            files = {k: (int(v[0]), str(v[1])) for k, v in data["files"].items()}
            stamp = Stamp(data["key"], float(data["seconds"]), tuple(data["notes"]), tuple(data["reasons"]), files)
            return stamp if all((self.root / k).stat().st_size == size for k, (size, _) in files.items()) else None
        except (TypeError, KeyError, ValueError, AttributeError, OSError):
            return None

    def begin(self, stage: str, key: str, outputs: tuple[str, ...], resumable: bool) -> None:
        """Remove what an earlier or interrupted attempt left of this stage.

        A resumable stage keeps its *folders* (its own checkpoints, which it must validate) if the interrupted attempt
        had the same key; single files always go.
        """
        stamps = self.root / "stamps"
        stamps.mkdir(parents=True, exist_ok=True)
        (stamps / f"{stage}.json").unlink(missing_ok=True)
        started = stamps / f"{stage}.started"
        keep = resumable and started.is_file() and started.read_text(encoding="utf-8").strip() == key
        for path in (self.root / o for o in outputs):
            if path.is_dir() and not path.is_symlink():
                if not keep:
                    _remove_folder(path)
            else:
                path.unlink(missing_ok=True)
                for half in path.parent.glob(f".{path.name}.*"):  # of an attempt that was killed
                    half.unlink(missing_ok=True)
        write_atomically(started, key + "\n")

    def finish(
        self,
        stage: str,
        key: str,
        outputs: tuple[str, ...],
        seconds: float,
        notes: tuple[str, ...] | list[str],
        reasons: tuple[str, ...] | list[str],
    ) -> Stamp:
        """Write the stamp, last of all."""
        files = {}
        for path in (self.root / o for o in outputs):
            for p in sorted(path.rglob("*")) if path.is_dir() else [path] * path.is_file():
                if p.is_file() and p.name.startswith("."):
                    p.unlink()  # a temporary file of an attempt that was killed
                elif p.is_file():
                    files[p.relative_to(self.root).as_posix()] = (p.stat().st_size, digest(p))
        stamp = Stamp(key, seconds, tuple(notes), tuple(reasons), files)
        data = {
            "stage": stage,
            "key": key,
            "seconds": round(seconds, 3),
            "notes": stamp.notes,
            "reasons": stamp.reasons,
        }
        data["files"] = files
        write_atomically(self.root / "stamps" / f"{stage}.json", json.dumps(data, indent=1) + "\n")
        (self.root / "stamps" / f"{stage}.started").unlink(missing_ok=True)
        return stamp

    def forget(self, stage: str) -> None:
        """Make the stage run again, from nothing."""
        for suffix in ("json", "started"):
            (self.root / "stamps" / f"{stage}.{suffix}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from writing this run. The lock of a process that has died does not count."""
        self.root.mkdir(parents=True, exist_ok=True)
        path = self.root / ".lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holder = os.read(fd, 32).decode("ascii", "ignore").strip()
            if not _take(fd, holder):
                who = f"process {holder}" if holder else "another process"
                raise UnusableInput(f"{self.root} is being written by {who}; wait for it, or choose another --out.")
            os.lseek(fd, 0, os.SEEK_SET)
            os.ftruncate(fd, 0)
            os.write(fd, str(os.getpid()).encode())
            yield
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)


def open_run(root: str | os.PathLike) -> Run:
    """An existing run folder. Raises `UnusableInput` when `root` is not one."""
    run = Run(Path(root).absolute())
    run.info()
    return run


def is_run(root: str | os.PathLike) -> bool:
    return (Path(root) / "run.json").is_file()


def make_key(**parts: Any) -> str:
    """Hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _remove_folder(path: Path) -> None:
    # moved away first: a child of a killed run that still writes there must not get in the way of the new one
    away = path.parent / f".old-{path.name}-{os.getpid()}"
    shutil.rmtree(away, ignore_errors=True)
    path.rename(away)
    for old in path.parent.glob(f".old-{path.name}-*"):
        shutil.rmtree(old, ignore_errors=True)


def _take(fd: int, holder: str) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel drops it when the process dies
            return True
        except OSError:
            return False
    if not holder.isdigit() or int(holder) == os.getpid():
        return True
    try:
        os.kill(int(holder), 0)
        return False
    except OSError:
        return True


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _not_a_run(root: Path) -> Any:
    raise UnusableInput(f"{root} is not a run folder; make one with `handhold run VIDEO --out {root}`.")
