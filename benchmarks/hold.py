#!/usr/bin/env python3
"""Time of one training step of HOLD: `fast`, `paper`, and `paper` as the authors sample it, as ratios in one run.

    python benchmarks/hold.py RUN [--rays 64] [--steps 3] [--device cpu] [--presets fast paper authors]

RUN is a run folder that is tracked. Steps are of the joint training on drawn rays of the clip; fewer rays than the
method's own (fast 1536, paper 1280) keep it short, and times per ray are compared. `authors` has the sampler's
cost of the authors' code: every ray takes five rounds of 128 (their test of convergence is of the whole batch).
Writes benchmarks/results/hold.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch

import handhold
from handhold.files import write_atomically
from handhold.methods import hold, hold_scene
from handhold.methods.hold_rays import pixel_table
from handhold.methods.hold_train import Training, train
from handhold.methods.placing import place
from handhold.methods.settings import HoldConfig
from handhold.render import samplers
from handhold.runs import open_run
from handhold.shapes.sdf_fit import SdfFitConfig
from handhold.stages.track import load_tracked

RESULTS = Path(__file__).parent / "results" / "hold.json"


def all_rounds(sdf, rays, bounds, beta, n=64, extra=34, jitter=False, generator=None, **_):
    """The error-bounded sampler as one batch that never converges: 128 samples and five times 128 more, everywhere."""
    settings = {"n": 128, "more": 128, "rounds": 5, "eps": 1e-9}
    r = samplers.refine(sdf, rays, bounds, beta, **settings)
    t = r.t[:, torch.linspace(0, r.t.shape[1] - 1, n + extra).round().long()]
    return samplers.Samples(t, t[:, 1:] > t[:, :-1])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path)
    ap.add_argument("--rays", type=int, default=64)
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--presets", nargs="+", default=["fast", "paper", "authors"])
    args = ap.parse_args()
    sequence, tracks = load_tracked(open_run(args.run))
    config = SdfFitConfig(pose_lr=1e-4, hidden=0.05)
    start = place(sequence, tracks, config, registration=False)
    hold.PRETRAIN = tuple(replace(s, iterations=1) for s in hold.PRETRAIN)
    hold.TEMPLATE_STEPS = 1
    ours = hold_scene.error_bounded
    rows = {}
    for name in args.presets:
        hold_scene.error_bounded = all_rounds if name == "authors" else ours
        fast = name == "fast"
        settings = HoldConfig(preset="fast" if fast else "paper", iterations=0)
        if fast:
            held = hold.pretrain_grids(sequence, start, settings, config, None, args.device)
        else:
            held = hold.pretrain_networks(sequence, start, settings, 0, None, args.device)
        table = pixel_table(sequence, start.obs, held.scene.names, start.weight)
        rays = 1536 if fast else args.rays
        plan = Training(1, rays, 8, (0.8, 0.5) if fast else None)
        train(held.scene, table, held.templates, replace(plan, eikonal=not fast))  # trees, caches
        began = time.perf_counter()
        train(held.scene, table, held.templates, replace(plan, iterations=args.steps, eikonal=not fast))
        if args.device != "cpu":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / args.steps
        rows[name] = {"seconds": round(seconds, 4), "rays": rays, "ms_per_ray": round(1e3 * seconds / rays, 4)}
        print(name, rows[name], flush=True)
    base = rows.get("fast", next(iter(rows.values())))["ms_per_ray"]
    for row in rows.values():
        row["ratio"] = round(row["ms_per_ray"] / base, 1)
    head = {"handhold": handhold.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
    write_atomically(RESULTS, json.dumps(head | {"device": args.device, "step": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
