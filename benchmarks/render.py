#!/usr/bin/env python3
"""Speed of the rendering engines against their peers and against the machine: docs/benchmarks.md.

    python benchmarks/render.py [--quick] [--only NAME ...] [--peers FOLDER] [--out benchmarks/results/render.json]

CPU time of the process on one thread, ours and the peers in turn, medians and quartiles over rounds.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: its idle threads wait instead of spinning

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cases
import cases_shapes
import measure
import peers
import scenes
import torch
from measure import bar, figure, wall_ms

from handhold import kernels

# Useful operations, counted from the equations; a multiply-add is two.
# Per pair of a pixel and a Gaussian that adds to it. Forward: offset 2, exponent 7, exp 16, alpha 1, weight and
# transmittance 2, colour 6. Backward: the first 27 again, transmittance 3, weight 1, colour . gradient 6, to alpha 3,
# light behind 2, to colour 6, to opacity 2, to the exponent 1, its five moments 11.
PAIR_OPS = 34 + 62
GAUSSIAN_OPS = 1100  # projection, covariance, SH of degree 3 and their backward: counted roughly
PARAMETERS = 3 + 4 + 3 + 1 + 48  # floats of a Gaussian, read forward and backward, and as many gradients written
# Per value of an image: five means of 2 x 11 taps forward, three backward, about 60 for the formula and its gradient.
SSIM_OPS = (5 + 3) * 2 * 11 * 2 + 60
# Per point: cell and weights 20, eight corners x (four channels and three differences) x 2 forward; backward the same
# twice, since the normal depends on the weights' derivatives as well.
POINT_OPS = 3 * (20 + 8 * 7 * 2)


def table(quick: bool) -> dict:
    """Ours and the peers over numbers of Gaussians and image sizes."""
    sizes = [(n, px) for n in (5_000, 20_000, 50_000, 200_000) for px in (128, 256, 512)]
    rows = []
    for n, px in sizes[:1] if quick else sizes:
        case = cases.splat_case(quick, n, px, bars=False, twin=False)
        row = measure.run_case(case, rounds=1 if quick else 5, budget_s=10)
        s = scenes.raster_scene(scenes.bumpy_sphere(n, px)) if not quick else None
        rows.append({"gaussians": n, "px": px, "intersections": len(s.ids) if s else None} | row)
        _say(row)
    return {"rows": rows, "bars": []}


def threads(quick: bool) -> dict:
    """One and two threads in turn. On a loaded machine wall times say little, and two figures help: the ratio of the
    best walls, and how evenly the work is shared: CPU time of one thread over that of the busier one of two."""
    rows, bars = {}, []
    for name in ("splat", "iteration"):
        step = cases.CASES[name](quick).ours
        wall: dict[int, list[float]] = {1: [], 2: []}
        busier: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(3 if quick else 30):
            for n in wall:
                torch.set_num_threads(n)
                step()
                starts = time.perf_counter(), time.process_time(), time.thread_time()
                step()
                wall[n].append(1e3 * (time.perf_counter() - starts[0]))
                process, caller = time.process_time() - starts[1], time.thread_time() - starts[2]
                busier[n].append(1e3 * max(caller, process - caller))
        torch.set_num_threads(1)
        best, middle = (f(wall[1]) / f(wall[2]) for f in (min, statistics.median))
        rows[name] = {
            "wall_1": figure(wall[1], "ms"), "wall_2": figure(wall[2], "ms"), "load": measure.load(),
            "speedup_of_medians": round(middle, 2), "speedup_of_best": round(best, 2),
            "shared_cpu": round(statistics.median(busier[1]) / statistics.median(busier[2]), 2),
        }  # fmt: skip
        if name == "splat":
            bars.append(bar("splat, 2 threads over 1: wall, best of each", best, least=1.6))
    return {"rows": rows, "bars": bars}


def beside_busy(quick: bool) -> dict:
    """Wall time on all cores, alone and beside processes that never wait."""
    step, n = cases.splat_case(quick).ours, 3 if quick else 25
    torch.set_num_threads(measure.cores())
    step()
    alone = [wall_ms(step) for _ in range(n)]
    rows = {"alone": figure(alone, "ms")}
    for processes in sorted({1, measure.cores()}):
        with measure.busy(processes):
            rows[str(processes)] = figure([wall_ms(step) for _ in range(n)], "ms")
    alone += [wall_ms(step) for _ in range(n)]
    torch.set_num_threads(1)
    rows["alone"] = figure(alone, "ms")
    slower = rows["1"]["median"] / rows["alone"]["median"]
    return {"rows": rows, "bars": [bar("splat beside one busy process: times slower", slower, most=6)]}


def limits(quick: bool) -> dict:
    """Operations and bytes that the tasks cannot do without, against what one core of this machine can do."""
    fma = measure.fma_gflops(200_000 if quick else 20_000_000)
    mm = measure.mm_gflops(128 if quick else 1024)
    copy = measure.copy_gbs(8 if quick else 256)
    rows, tasks = {}, []  # title, counts, operations, bytes, step
    for n, px in [(300, 32)] if quick else [(20_000, 256), (200_000, 512)]:
        s = scenes.bumpy_sphere(n, px)
        work = scenes.count_work(scenes.raster_scene(s))
        operations, floats = PAIR_OPS * work["pairs"] + GAUSSIAN_OPS * n, 3 * PARAMETERS * n + 2 * 4 * px * px
        tasks.append((f"splat {n} @ {px}", work, operations, 4 * floats, partial(cases.splat_step, s)))
    values = 3 * (32 if quick else 256) ** 2
    tasks.append((f"SSIM of {values} values", {}, SSIM_OPS * values, 4 * 3 * values, cases.ssim_case(quick).ours))
    points, voxels = (256, 16**3) if quick else (32768, 64**3)  # the part of the grid that points touch: about a tenth
    floats = 17 * points + 4 * 3 * voxels / 10
    tasks.append((f"SDF grid, {points} points", {}, POINT_OPS * points, 4 * floats, cases.grid_case(quick).ours))
    for name, work, operations, nbytes, step in tasks:
        step()
        ms = statistics.median(measure.cpu_ms(step) for _ in range(3 if quick else 15))
        floor = {"operations": operations / 1e6 / max(fma or 0, mm), "bytes": nbytes / 1e6 / copy}
        rows[name] = work | {
            "mflop": round(operations / 1e6, 2), "mbytes": round(nbytes / 1e6, 2), "cpu_ms": round(ms, 2),
            "floor_ms": {k: round(v, 3) for k, v in floor.items()},
            "share_of_limit": round(max(floor.values()) / ms, 4),
        }  # fmt: skip
    peak = {"fma_gflops": fma and round(fma, 1), "mm_gflops": round(mm, 1), "copy_gbs": round(copy, 1)}
    return {"peak_one_thread": peak, "rows": rows, "bars": []}


CASES = cases.CASES | cases_shapes.CASES

# A case (cases.py, cases_shapes.py) is ours against peers; a section measures as it likes and returns its "bars" too.
SECTIONS: dict[str, Callable[[bool], dict]] = {
    "threads": threads,
    "busy": beside_busy,
    "limits": limits,
    "table": table,
}


def _say(case: dict) -> None:
    print(f"{case['title']}\n    ours {case['ours']['median']:.4g} CPU-ms", flush=True)
    for name, row in case["peers"].items():
        if "absent" in row:
            print(f"    {name}: {row['absent']}", flush=True)
        else:
            print(f"    {name}: {row['time']['median']:.4g} CPU-ms, {row['ratio']['median']:.3g}x", flush=True)


def versions() -> dict[str, str]:
    found = {"handhold": None, "torch": None} | {package: None for package, _ in peers.PACKAGES.values()}
    for package in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"torch": torch.__version__, "python": sys.version.split()[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "render.json")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one or two rounds: does it run at all")
    parser.add_argument("--only", nargs="+", choices=[*CASES, *SECTIONS], help="keeps the file's other results")
    parser.add_argument("--peers", type=Path, help="a folder made by pip install --target")
    args = parser.parse_args()
    if args.peers:
        sys.path.append(str(args.peers))
    if not kernels.available():
        raise SystemExit(f"Nothing to compare: {kernels.why_unavailable()}.")
    torch.set_num_threads(1)
    machine = {"cpu": measure.processor(), "cores": measure.cores(), "isa": kernels.info()["isa"]}
    before = measure.load()
    start, results = time.perf_counter(), {"cases": {}, "sections": {}}
    if args.only:
        with contextlib.suppress(OSError):
            results = json.loads(args.out.read_text(encoding="utf-8"))
    rounds, budget_s = (1, 1.0) if args.quick else (11, 20.0)
    for name, make in CASES.items():
        if not args.only or name in args.only:
            results["cases"][name] = measure.run_case(make(args.quick), rounds, budget_s)
            _say(results["cases"][name])
    for name, section in SECTIONS.items():
        if not args.only or name in args.only:
            results["sections"][name] = section(args.quick) | {"load": measure.load()[0]}
            print(name, json.dumps(results["sections"][name].get("rows")) if name != "table" else "", flush=True)
    results |= {
        "what": "CPU milliseconds of the process on one thread, ours and the peers in turn, unless a unit says else",
        "date": time.strftime("%Y-%m-%d"), "quick": args.quick, "seconds": round(time.perf_counter() - start, 1),
        "machine": machine | {"load_before": before, "load_after": measure.load()}, "versions": versions(),
    }  # fmt: skip
    parts = (*results["cases"].values(), *results["sections"].values())
    results["bars"] = [b for part in parts for b in part["bars"]]
    for b in results["bars"] if not args.quick else []:
        value = "not measured" if b["value"] is None else f"{b['value']:g}"
        print(f"{'met   ' if b['passed'] else 'MISSED'} {b['what']}: {value} ({b['bar']})")
    measure.write(args.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
