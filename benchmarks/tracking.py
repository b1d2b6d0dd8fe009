#!/usr/bin/env python3
"""Track a folder of clips and score the tracks themselves, then the fit; writes benchmarks/results/tracking.json.

    python benchmarks/tracking.py FOLDER [CLIP ...] [--out runs/tracking] [--fresh] [--tracking-only]
    python benchmarks/tracking.py FOLDER CLIP --without loops windows     each of these steps left out, in turn
    python benchmarks/tracking.py FOLDER CLIP --without all
    python benchmarks/tracking.py FOLDER CLIP --corrupt 0                 spoilt landmarks, masks and frames

FOLDER (or $HANDHOLD_BENCH) holds one folder per clip with video.mp4, and K.txt and gt.npz where known. A run reads the
video and K only. Results are kept by clip and by configuration: `default`, `corrupt` (`corrupt+learned` where
handhold[xfeat] is installed), `without:NAME` (`a+b` leaves out both). Where there is a finished `1_prepare` of the clip
(--from-prepared DIR holds run folders by clip; or the default's of an earlier call) it is not made again. Every stage
runs in a process of its own, whose seconds and peak memory count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from bench import measure
from tracking_scores import rungs, score_tracks

import handhold
from handhold.config import TrackingStep
from handhold.datasets.synthetic import corrupt
from handhold.files import write_atomically
from handhold.runs import Run, make_key
from handhold.scene import HandEstimates, Sequence, load_npz
from handhold.stages.prepare import load_prepared, save_prepared
from handhold.stages.track import load_tracked
from handhold.tracking._sfm_learned import missing_packages

RESULTS = Path(__file__).parent / "results" / "tracking.json"
CORRUPTION = corrupt.Corruption(
    corrupt.LandmarkCorruption(drop=0.3, swap=0.1),
    corrupt.MaskCorruption(iou=0.75),
    corrupt.FrameCorruption(drop=0.1),
)


class Failed(Exception):
    """A stage that ended with an error, which it names."""


def stage(name: str, target: Path, *options: str) -> dict[str, Any]:
    """Run one stage in a process of its own: what it printed with --json, with peak_mb of that process."""
    command = [sys.executable, "-m", "handhold.cli", name, str(target), "--json", *options]
    code, stdout, stderr, _, peak = measure(command)
    try:
        told = json.loads(stdout)
    except ValueError:
        told = {"ok": False, "error": (stderr.strip().splitlines() or ["nothing was printed"])[-1]}
    if not told.get("ok"):
        raise Failed(f"{name} (exit {code}): {told.get('error', '')}")
    return told | {"peak_mb": round(peak)}


def spoilt(sequence: Sequence, seed: int) -> Sequence:
    """What `--corrupt` does: 30 % of the landmarks lost, 10 % of the sides swapped, masks of IoU 0.75, 10 % of the
    frames missing. A regressor looks where landmarks are, so its estimates go where these have changed."""
    out = corrupt.corrupt_sequence(sequence, CORRUPTION, seed)
    kept = np.searchsorted(sequence.indices, out.indices)
    regressed = {}
    for side, seen in out.regressed.items():
        before, after = sequence.landmarks[side].points[kept], out.landmarks[side].points
        same = np.isclose(before, after, equal_nan=True).all((1, 2))
        regressed[side] = _only(seen, same)
    return replace(out, regressed=regressed)


def _only(seen: HandEstimates, frames: np.ndarray) -> HandEstimates:
    """Estimates of the frames (F,) bool alone."""
    blank = lambda x: np.where(frames.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan).astype(np.float32)  # noqa: E731
    kept = {k: blank(getattr(seen, k)) for k in ("pose", "betas", "joints", "points")}
    return HandEstimates(confidence=np.where(frames[:, None], seen.confidence, 0).astype(np.float32), **kept)


def take_prepared(source: Run, target: Run, seed: int | None = None, fresh: bool = False) -> None:
    """Make `target` a run with the prepared clip of `source`, spoilt if a seed is given; nothing if it is, unless
    `fresh`."""
    stamp = source.stamp("prepare")
    key = make_key(of=stamp.outputs, corrupt=seed, how=repr(CORRUPTION))
    have = target.stamp("prepare")
    if have is not None and have.key == key and not fresh:
        return
    shutil.rmtree(target.root, ignore_errors=True)
    target.root.mkdir(parents=True)
    shutil.copy(source.root / "run.json", target.root / "run.json")
    if seed is None:
        shutil.copytree(source.prepare_dir, target.prepare_dir)
    else:
        save_prepared(target, spoilt(load_prepared(source), seed))
    target.finish("prepare", key, ("1_prepare",), stamp.seconds, stamp.notes, stamp.reasons)


def run_clip(
    clip: Path, source: Path, root: Path, fresh: bool, without: tuple[str, ...], seed: int | None, only_tracks: bool
) -> dict[str, Any]:
    """One clip in one configuration. source: run folder with the prepared clip, made when it is not there."""
    row: dict[str, Any] = {"peak_mb": {}, "seconds": {}}
    again = ["--fresh"] * fresh
    if Run(source).stamp("prepare") is None or (fresh and source == root):
        K = ["--K", str(clip / "K.txt")] if (clip / "K.txt").is_file() else []
        told = stage("prepare", clip / "video.mp4", "--out", str(source), *K, *again)
        row["peak_mb"]["prepare"] = told["peak_mb"]
    if source != root:
        take_prepared(Run(source), Run(root), seed, fresh)
    told = stage("track", root, *again, *(("--track.without", *without) if without else ()))
    row["seconds"] = {k: told["seconds"][k] for k in ("prepare", "track")}
    row["peak_mb"] |= {} if "track" in told["kept"] else {"track": told["peak_mb"]}
    run = Run(root)
    sequence, tracks = load_tracked(run)
    row["frames"] = len(sequence)
    row["rungs"] = {"object": rungs(tracks.reason)} | {s: rungs(h.reason) for s, h in tracks.hands.items()}
    row["reasons"], row["notes"] = told["reasons"], told["notes"]
    truth = clip / "gt.npz"
    if truth.is_file():
        row["tracks"] = plain(score_tracks(sequence, tracks, load_npz(truth)))
    if not only_tracks:
        try:
            score_fit(clip, root, again, row)
        except Failed as e:
            row["error"] = str(e)
    return row


def score_fit(clip: Path, root: Path, again: list[str], row: dict[str, Any]) -> None:
    """Run `fit` and `evaluate`, and add their figures to the row."""
    truth = clip / "gt.npz"
    for name in ("fit", "evaluate"):
        given = ("--truth", str(truth)) if name == "evaluate" and truth.is_file() else ()
        told = stage(name, root, *again, *given)
        row["seconds"][name] = told["seconds"][name]
        row["peak_mb"] |= {} if name in told["kept"] else {name: told["peak_mb"]}
    row["reasons"], row["notes"] = told["reasons"], told["notes"]
    row["fit"] = dict(told["metrics"])
    if row["fit"].get("frames") is not None:  # of the frames that were given: what is missing cannot be found
        row["fit"]["frames_given"] = row["fit"]["frames"] * len(load_npz(truth)["object_poses"]) / row["frames"]
    row["rungs"]["object after the fit"] = told["bodies"].get("object", {}).get("how", {})


def plain(figures: dict[str, float]) -> dict[str, float | None]:
    """Numbers that JSON has; None for what is not finite."""
    return {k: float(v) if np.isfinite(v) else None for k, v in figures.items()}


def keep(path: Path, clip: str, configuration: str, row: dict[str, Any]) -> None:
    """Merge one row into the file. Peaks of stages that were up to date stay; figures of a fit not run go."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = {}
    rows = results.setdefault("clips", {}).setdefault(clip, {})
    before = rows.get(configuration, {})
    if "peak_mb" in row:
        row = {**row, "peak_mb": before.get("peak_mb", {}) | row["peak_mb"]}
    rows[configuration] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1, allow_nan=False) + "\n")


def configurations(without: list[str], seed: int | None) -> dict[str, tuple[tuple[str, ...], int | None]]:
    """Name -> (steps left out, seed of the corruption)."""
    names = list(get_args(TrackingStep)) if without == ["all"] else without
    out = {f"without:{name}": (tuple(name.split("+")), None) for name in names}
    if seed is not None:
        learned = not missing_packages()  # used where the object would halt at missing frames
        out["corrupt+learned" if learned else "corrupt"] = ((), seed)
    return out or {"default": ((), None)}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", nargs="?", default=os.environ.get("HANDHOLD_BENCH"))
    ap.add_argument("clips", nargs="*", help="names of clips; all by default")
    ap.add_argument("--out", type=Path, default=Path("runs/tracking"))
    ap.add_argument("--corrupt", type=int, metavar="SEED", help="spoil the evidence, as the module's head says")
    ap.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help=f"{', '.join(get_args(TrackingStep))}, all"
    )
    ap.add_argument(
        "--from-prepared", type=Path, metavar="DIR", help="folder of runs by clip with a finished 1_prepare"
    )
    ap.add_argument("--tracking-only", action="store_true", help="no fit")
    ap.add_argument("--fresh", action="store_true", help="run again what is up to date: code is not part of that")
    ap.add_argument("--results", type=Path, default=RESULTS)
    args = ap.parse_args()
    if not args.folder or not Path(args.folder).is_dir():
        ap.error("give the folder of clips, or set HANDHOLD_BENCH")
    wrong = [n for name in args.without for n in name.split("+") if n not in (*get_args(TrackingStep), "all")]
    if wrong:
        ap.error(f"there is no step {wrong[0]!r}; there are {', '.join(get_args(TrackingStep))}")
    clips = sorted(p.parent for p in Path(args.folder).glob("*/video.mp4"))
    clips = [c for c in clips if not args.clips or c.name in args.clips]
    if not clips:
        ap.error(f"{args.folder} has no such clips; each is a folder with a video.mp4")
    for clip in clips:
        for name, (without, seed) in configurations(args.without, args.corrupt).items():
            print(f"{clip.name}, {name} ...", flush=True)
            root = args.out / clip.name / name.replace(":", "-")
            source = args.out / clip.name / "default"
            if args.from_prepared is not None:
                source = args.from_prepared / clip.name
                if Run(source).stamp("prepare") is None:
                    ap.error(f"{source} has no finished `prepare` stage")
            begun = time.monotonic()
            try:
                row = run_clip(clip, source, root, args.fresh, without, seed, args.tracking_only)
            except Failed as e:
                row = {"error": str(e)}
            row |= {"seed": seed} if seed is not None else {}
            row["date"], row["handhold"] = time.strftime("%Y-%m-%d"), handhold.__version__
            row["machine"] = f"{os.cpu_count()} cores, {platform.machine()}"
            keep(args.results, clip.name, name, row)
            figures = {
                k: v if v is None else round(v, 3) for k, v in (row.get("tracks", {}) | row.get("fit", {})).items()
            }
            print(f"  {time.monotonic() - begun:.0f} s {row.get('error', figures)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
