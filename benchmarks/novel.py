#!/usr/bin/env python3
"""How fast `view.novel` draws finished runs on the CPU; writes benchmarks/results/novel.json.

    python benchmarks/novel.py RUN [RUN ...] [--size 480 360] [--passes 10] [--pictures 12] [--out FILE]

Frames spread over a clip are drawn from the video's camera, posing included; nothing is encoded or written. For one and
two threads: pictures per second by the wall clock, each picture by the fastest of its passes (other work on the machine
only slows), and milliseconds of CPU time a picture, all threads together. `load` is the machine's at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

import handhold
from handhold.files import write_atomically
from handhold.methods.base import fitted_splats
from handhold.scene import Scene
from handhold.view.novel import OUTPUTS, actors, draw, input_cameras

RESULTS = Path(__file__).parent / "results" / "novel.json"
BAR = 15.0  # pictures per second at 480x360 on two cores (Gaussians, colour)


def measure(root: Path, size: tuple[int, int], passes: int, pictures: int) -> dict[str, Any]:
    """One run: Gaussians by body, and figures by engine, outputs and threads."""
    import torch  # after handhold, which has OpenMP's idle threads sleep

    scene = Scene.load(root / "scene.npz")
    splats = fitted_splats(root / "3_fit", scene.bodies)
    bodies, cameras = actors(scene, splats), input_cameras(scene, size)
    some = [int(i) for i in np.linspace(0, len(cameras) - 1, min(pictures, len(cameras))).round()]
    row: dict[str, Any] = {"frames": len(some), "gaussians": {n: len(g) for n, g in splats.items()}}
    kinds = [("splats", ("color",)), ("splats_all", OUTPUTS), ("meshes", ("color",))]
    for name, outputs in kinds[0 if len(splats) == len(bodies) else 2 :]:
        row[name] = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            wall, cpu = np.full((2, len(some)), np.inf)
            for _ in range(passes if name == "splats" else min(passes, 3)):
                for k, frame in enumerate(some):
                    start, used = time.perf_counter(), time.process_time()
                    draw(bodies, frame, cameras[frame], outputs, splats=name != "meshes")
                    wall[k] = min(wall[k], time.perf_counter() - start)
                    cpu[k] = min(cpu[k], time.process_time() - used)
            figures = {"per_second": round(1 / wall.mean(), 1), "cpu_ms": round(1e3 * cpu.mean(), 1)}
            row[name][f"{threads}_threads"] = figures
    return row


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+", type=Path, help="run folders whose fit is done")
    ap.add_argument("--size", nargs=2, type=int, default=(480, 360))
    ap.add_argument("--passes", type=int, default=10)
    ap.add_argument("--pictures", type=int, default=12)
    ap.add_argument("--out", type=Path, default=RESULTS)
    args = ap.parse_args()
    results: dict[str, Any] = {
        "handhold": handhold.__version__,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": [round(v, 2) for v in os.getloadavg()],
        "size": list(args.size),
        "runs": {},
    }
    for root in args.runs:
        row = results["runs"][root.name] = measure(root, tuple(args.size), args.passes, args.pictures)
        write_atomically(args.out, json.dumps(results, indent=1) + "\n")
        for name in ("splats", "splats_all", "meshes"):
            for threads, v in row.get(name, {}).items():
                met = " (met)" if v["per_second"] >= BAR else " (NOT met)"
                asked = f", asked {BAR:g}{met}" if name == "splats" and threads == "2_threads" else ""
                print(
                    f"{root.name:12s} {name:11s} {threads} {v['per_second']:6.1f} /s {v['cpu_ms']:7.1f} ms CPU{asked}"
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
