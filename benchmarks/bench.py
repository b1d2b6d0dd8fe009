#!/usr/bin/env python3
"""Run handhold over a folder of clips, each in its own process, and write benchmarks/results/bench.json.

    python benchmarks/bench.py FOLDER [CLIP ...] [--out runs/bench] [--fresh]

FOLDER (or $HANDHOLD_BENCH) holds one folder per clip with video.mp4, and K.txt and gt.npz where known. A run reads
the video and K only; gt.npz goes to the `evaluate` stage. Wall time and peak memory are of the process and its
children, as the system counts them. Memory is the largest of any one process: add them up by eye where a stage runs
two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "bench.json"


def measure(command: list[str]) -> tuple[int, str, str, float, float]:
    """(exit code, stdout, stderr, wall seconds, peak resident MB) of a command, in a process of its own."""
    # a fresh parent per command, because the children's peak of a process never falls
    probe = (
        "import json, resource, subprocess, sys, time; t = time.monotonic(); "
        "p = subprocess.run(json.loads(sys.argv[1]), stdout=open(sys.argv[2], 'w'), stderr=open(sys.argv[3], 'w')); "
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
        "print(json.dumps([p.returncode, time.monotonic() - t, peak]))"
    )
    with tempfile.TemporaryDirectory() as tmp:
        out, err = Path(tmp, "out"), Path(tmp, "err")
        argv = [sys.executable, "-c", probe, json.dumps(command), str(out), str(err)]
        told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        code, seconds, peak = json.loads(told)
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return code, out.read_text(), err.read_text(), seconds, peak / unit


def run_clip(clip: Path, out: Path, fresh: bool) -> dict:
    """Reconstruct and score one clip."""
    command = [sys.executable, "-m", "handhold.cli", "run", str(clip / "video.mp4"), "--out", str(out), "--json"]
    for option, name in (("--K", "K.txt"), ("--truth", "gt.npz")):
        command += [option, str(clip / name)] if (clip / name).is_file() else []
    code, stdout, stderr, seconds, peak = measure(command + ["--fresh"] * fresh)
    try:
        told = json.loads(stdout)
    except ValueError:
        told = {"ok": False, "error": (stderr.strip().splitlines() or ["nothing was printed"])[-1]}
    row = {"exit_code": code, "wall_s": round(seconds, 1), "peak_mb": round(peak)}
    if not told.get("ok"):
        return row | {"error": told.get("error", "")}
    row |= {k: told[k] for k in ("partial", "reasons", "metrics", "seconds", "kept")}
    row["wall_s"] = round(seconds + sum(told["seconds"][k] for k in told["kept"]), 1)  # kept stages took theirs before
    return row


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", nargs="?", default=os.environ.get("HANDHOLD_BENCH"))
    ap.add_argument("clips", nargs="*", help="names of clips; all by default")
    ap.add_argument("--out", type=Path, default=Path("runs/bench"))
    ap.add_argument("--fresh", action="store_true", help="run again what is up to date (or its time is not measured)")
    args = ap.parse_args()
    if not args.folder or not Path(args.folder).is_dir():
        ap.error("give the folder of clips, or set HANDHOLD_BENCH")
    clips = sorted(p.parent for p in Path(args.folder).glob("*/video.mp4"))
    clips = [c for c in clips if not args.clips or c.name in args.clips]
    if not clips:
        ap.error(f"{args.folder} has no such clips; each is a folder with a video.mp4")
    import handhold

    try:
        results = json.loads(RESULTS.read_text())
    except (OSError, ValueError):
        results = {"clips": {}}
    for clip in clips:
        print(f"{clip.name} ...", flush=True)
        row = run_clip(clip, args.out / clip.name, args.fresh)
        row["date"] = time.strftime("%Y-%m-%d")
        row["handhold"] = handhold.__version__
        row["machine"] = f"{os.cpu_count()} cores, {platform.machine()}"
        results["clips"][clip.name] = row
        RESULTS.parent.mkdir(exist_ok=True)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(RESULTS)
        print(f"  exit {row['exit_code']}, {row['wall_s']} s, {row['peak_mb']} MB {row.get('error', '')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
