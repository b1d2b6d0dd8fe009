#!/usr/bin/env python3
"""Fit clips that are tracked already by each method, and score them; writes benchmarks/results/methods.json.

    python benchmarks/methods.py FOLDER RUNS [CLIP ...] --method bigs [hold rigid] [--out runs/methods] [--fresh]
    python benchmarks/methods.py FOLDER RUNS CLIP --method bigs --set bigs.contact=False --as no-contact

FOLDER (or $HANDHOLD_BENCH) holds one folder per clip with gt.npz where known; RUNS one finished run per clip, of which
`1_prepare` and `2_track` are taken, so that methods start alike. Results are kept by method and clip, those of --set
under METHOD:NAME. Seconds and peak memory are of `fit` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from bench import measure

import handhold
from handhold.files import write_atomically
from handhold.runs import Run

RESULTS = Path(__file__).parent / "results" / "methods.json"


def take_tracked(source: Run, target: Run) -> None:
    """Make `target` a run with the prepared and tracked clip of `source`, unless it is one already."""
    if all(target.stamp(s) is not None and target.stamp(s).key == source.stamp(s).key for s in ("prepare", "track")):
        return
    shutil.rmtree(target.root, ignore_errors=True)
    target.root.mkdir(parents=True)
    shutil.copy(source.root / "run.json", target.root / "run.json")
    for name, folder in (("prepare", source.prepare_dir), ("track", source.track_dir)):
        shutil.copytree(folder, target.root / folder.name)
        stamp = source.stamp(name)
        target.finish(name, stamp.key, (folder.name,), stamp.seconds, stamp.notes, stamp.reasons)


def option(name: str, value: str) -> list[str]:
    """A setting as the command line has it; switches have no value there."""
    if value not in ("True", "False"):
        return [f"--{name}", value]
    table, _, switch = name.rpartition(".")
    return [f"--{table}.{'' if value == 'True' else 'no-'}{switch.replace('_', '-')}"]


def run_clip(clip: Path, source: Path, root: Path, method: str, given: list[str], fresh: bool) -> dict[str, Any]:
    """Fit and score one clip by one method."""
    take_tracked(Run(source), Run(root))
    options = [part for s in given for part in option(*s.split("=", 1))]
    truth = clip / "gt.npz"
    row: dict[str, Any] = {}
    for name in ("fit", "evaluate"):
        more = ["--truth", str(truth)] if name == "evaluate" and truth.is_file() else []
        command = [sys.executable, "-m", "handhold.cli", name, str(root), "--json", "--method", method, *options, *more]
        code, stdout, stderr, _, peak = measure(command + ["--fresh"] * fresh)
        try:
            told = json.loads(stdout)
        except ValueError:
            told = {"ok": False, "error": (stderr.strip().splitlines() or ["nothing was printed"])[-1]}
        if not told.get("ok"):
            return row | {"error": f"{name} (exit {code}): {told.get('error', '')}"}
        row |= {f"{name}_s": round(told["seconds"][name], 1)}
        row |= {"fit_peak_mb": round(peak)} if name == "fit" and "fit" not in told["kept"] else {}
    return row | {k: told[k] for k in ("metrics", "notes", "reasons")}


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("folder", type=Path)
    ap.add_argument("runs", type=Path, help="folder of finished runs, one per clip")
    ap.add_argument("clips", nargs="*", help="names of clips; all by default")
    ap.add_argument("--method", nargs="+", default=["bigs"])
    ap.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that differ")
    ap.add_argument("--as", dest="name", help="under which name the results of --set are kept")
    ap.add_argument("--out", type=Path, default=Path("runs/methods"))
    ap.add_argument("--fresh", action="store_true")
    args = ap.parse_args()
    if args.set and not args.name:
        ap.error("--set needs --as NAME")
    clips = sorted(p.parent for p in args.runs.glob("*/run.json") if not args.clips or p.parent.name in args.clips)
    if not clips:
        ap.error(f"{args.runs} has no such runs")
    try:
        results = json.loads(RESULTS.read_text())
    except (OSError, ValueError):
        results = {"methods": {}}
    results |= {"handhold": handhold.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    for method in args.method:
        name = f"{method}:{args.name}" if args.name else method
        for source in clips:
            root = args.out / name.replace(":", "-") / source.name
            row = run_clip(args.folder / source.name, source, root, method, args.set, args.fresh)
            row["when"] = time.strftime("%Y-%m-%d")
            results["methods"].setdefault(name, {})[source.name] = row
            write_atomically(RESULTS, json.dumps(results, indent=1, sort_keys=True) + "\n")
            m = row.get("metrics", {})
            shown = {k: m[k] for k in ("cd", "f5", "f10", "cd_right", "cd_left", "mpjpe_right", "mpjpe_left") if k in m}
            print(name, source.name, row.get("error") or shown, row.get("fit_s"), row.get("fit_peak_mb"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
