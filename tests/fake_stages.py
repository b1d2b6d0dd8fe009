"""A pipeline of small arithmetic with the shape of the real one; also a program, so that tests can kill it.

python fake_stages.py VIDEO OUT [STAGE:HOW]   HOW: kill (SIGKILL itself half way), interrupt, full (disk)
"""

from __future__ import annotations

import errno
import os
import signal
import sys

import numpy as np

from handhold.config import Config
from handhold.files import digest, write_atomically
from handhold.pipeline import Stage, run
from handhold.scene import load_npz, save_npz

TROUBLE = ""  # STAGE:HOW
RAN: list[str] = []


def trouble(stage: str) -> None:
    name, _, how = TROUBLE.partition(":")
    if name != stage:
        return
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "full":
        raise OSError(errno.ENOSPC, "No space left on device")


def prepare(run, config, report):
    RAN.append("prepare")
    value = int(digest(run.video)[:6], 16) + config.prepare.stride
    run.prepare_dir.mkdir(exist_ok=True)
    (run.prepare_dir / "half.bin").write_bytes(b"x")  # a half-written file, if killed now
    trouble("prepare")
    report.note("the camera was assumed")
    (run.prepare_dir / "half.bin").write_bytes(b"x" * 100)
    save_npz(run.prepare_dir / "evidence.npz", {"value": np.float64(value)})


def track(run, config, report):
    RAN.append("track")
    value = load_npz(run.prepare_dir / "evidence.npz")["value"]
    noise = np.random.random()  # seeded by the pipeline
    save_npz(run.track_dir / "tracks.npz", {"value": value + noise})
    trouble("track")
    report.partial("half of the frames")


def fit(run, config, report):
    RAN.append("fit")
    value = load_npz(run.track_dir / "tracks.npz")["value"]
    checkpoint = run.fit_dir / "checkpoint.npz"
    state = load_npz(checkpoint) if checkpoint.is_file() else {"step": np.int64(0), "x": np.float64(0)}
    step, x = int(state["step"]), float(state["x"])
    for i in range(step, 10):
        x = 0.5 * x + value
        report(i / 10, "fitting", loss=1 / (i + 1))
        save_npz(checkpoint, {"step": np.int64(i + 1), "x": np.float64(x)})
        if i == 5 and step == 0:
            trouble("fit")
    save_npz(run.scene_path, {"x": np.float64(x)})


def evaluate(run, config, report):
    RAN.append("evaluate")
    trouble("evaluate")
    write_atomically(run.metrics_path, f'{{"metrics": {{"x": {float(load_npz(run.scene_path)["x"])!r}}}}}')


def export(run, config, report):
    RAN.append("export")
    trouble("export")
    write_atomically(run.root / "report.html", "report")


STAGES = (
    Stage("prepare", prepare, ("1_prepare",), ("prepare", "seed"), seeds_torch=False),
    Stage("track", track, ("2_track",), ("track", "seed"), seeds_torch=False),
    Stage("fit", fit, ("3_fit", "scene.npz"), ("fit", "seed"), resumable=True, seeds_torch=False),
    Stage("evaluate", evaluate, ("metrics.json",), ("evaluate",), seeds_torch=False),
    Stage("export", export, ("report.html",), ("export",), seeds_torch=False),
)

if __name__ == "__main__":
    TROUBLE = sys.argv[3] if len(sys.argv) > 3 else ""
    run(sys.argv[1], sys.argv[2], Config(), stages=STAGES)
