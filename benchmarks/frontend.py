#!/usr/bin/env python3
"""How well the trained networks do on generated pictures they have not seen, and what they cost.

    python benchmarks/frontend.py CHECKPOINT... [--pictures 512] [--device cpu] [--shards DIR] [--out FILE]

Pictures are of the generator's split "test" (objects that no training sees) and of another seed (other identities,
grasps, backgrounds, light). Hand regressors get crops around the true joints, once exact and once shaken as a detector
would; figures are given by how much of the hand other bodies hide. Cost is measured on the CPU, in a process of its
own, one hand or frame at a time. Each CHECKPOINT is a file that `handhold train` exports; results of checkpoints that
are not named stay in FILE. Writes FILE and benchmarks/tables.py's blocks.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tables
import torch
from torch import Tensor

from handhold.datasets.synthetic.sample import HandTruth, SynthBatch
from handhold.files import write_atomically
from handhold.regressors.checkpoints import load_model, read_header
from handhold.regressors.crops import CropJitter, box_of_points, hand_crops, recrop
from handhold.regressors.hand_losses import hand_errors
from handhold.regressors.segmenter import confusion, corrupt_previous, iou
from handhold.regressors.training.tasks import LEVELS, MASKS

RESULTS = Path(__file__).parent / "results" / "frontend.json"
SHAKEN = CropJitter(scale=0.15, shift=0.08, angle=0.0)
FIGURES = ("pa_mpjpe", "pa_mpvpe", "mpjpe", "mpvpe", "points", "place")
FRAME = (360, 480)


def hand_rows(model: Any, batch: SynthBatch, jitter: CropJitter | None, seed: int, looks: int = 1) -> Tensor:
    """(N, 1 + len(FIGURES)) of every hand that can be seen: hidden share; millimetres relative to the wrist; seen
    joints' error in per cent of the hand's box; millimetres of the wrist in the camera. A second look is at an upright
    crop around the joints that the first has seen."""
    generator = torch.Generator(batch.image.device).manual_seed(seed)
    crops = hand_crops(batch, generator, jitter, model.image_size)
    if len(crops) == 0:
        return torch.zeros(0, 1 + len(FIGURES))
    rows = crops.picture + len(batch) * crops.flipped
    sides = (batch.right, batch.left)
    truth = HandTruth(**{k.name: torch.cat([getattr(t, k.name) for t in sides])[rows] for k in fields(HandTruth)})
    for _ in range(looks - 1):
        again = recrop(model.predict(crops), batch.image, batch.K, upright=True, size=model.image_size)
        crops = again.with_truth(truth)
    with torch.no_grad():
        errors = hand_errors(model(crops.image, crops.K), crops)
    found = model.predict(crops)
    box = box_of_points(truth.points)
    size = (box[:, 2:] - box[:, :2]).amax(1)
    errors["points"] = 100 * (found.points - truth.points).norm(dim=-1).mean(1) / size
    errors["place"] = 1000 * (found.joints[:, 0] - truth.joints[:, 0]).norm(dim=-1)
    return torch.stack([truth.hidden, *(errors[k] for k in FIGURES)], 1).cpu()


def by_level(rows: Tensor) -> dict[str, dict[str, float]]:
    """Means over the hands of each occlusion level and over all; `place` is a median, for it has a long tail."""
    out = {}
    edges = [(f"{a:g}–{min(b, 1):g}", a, b) for a, b in zip(LEVELS, LEVELS[1:], strict=False)]
    for name, low, high in [("all", -1.0, 2.0), *edges]:
        some = rows[(rows[:, 0] >= low) & (rows[:, 0] < high)]
        if len(some):
            means = dict(zip(FIGURES, some[:, 1:].double().mean(0).tolist(), strict=True))
            out[name] = {k: round(v, 3) for k, v in means.items()} | {"hands": len(some)}
            out[name]["place"] = round(float(some[:, 1 + FIGURES.index("place")].median()), 3)
    return out


def regressor_figures(model: Any, batches: Iterable[SynthBatch], looks: int = 1) -> dict[str, Any]:
    rows: dict[str, list[Tensor]] = {"exact": [], "shaken": [], "one look": []}
    for i, batch in enumerate(batches):
        rows["exact"].append(hand_rows(model, batch, None, i, looks))
        rows["shaken"].append(hand_rows(model, batch, SHAKEN, i, looks))
        if looks > 1:
            rows["one look"].append(hand_rows(model, batch, None, i))
    out = {"levels": by_level(torch.cat(rows["exact"])), "looks": looks}
    others = {"all, boxes shaken": rows["shaken"], "all, one look": rows["one look"]}
    return out | {"others": {k: by_level(torch.cat(v)).get("all", {}) for k, v in others.items() if v}}


MERGED = torch.tensor([0, 1, 1, 2, 3])
"""Labels with both hands as one: which hand it is, tracking decides by landmarks."""


def segmenter_figures(model: Any, batches: Iterable[SynthBatch]) -> dict[str, Any]:
    """IoU of each mask, and with both hands as one, from pictures alone and given spoilt masks of a frame before."""
    names = {"iou": MASKS, "hands_as_one": ("hands", *MASKS[2:])}
    counts: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for i, batch in enumerate(batches):
            previous = corrupt_previous(batch.labels, torch.Generator().manual_seed(i), 0.0)
            merged = MERGED.to(batch.labels.device)[batch.labels.long()]
            for given, before in (("alone", None), ("previous", previous)):
                p = model(batch.image, before).softmax(1)
                one = torch.stack([p[:, 0], p[:, 1] + p[:, 2], p[:, 3], p[:, 4]], 1)
                for kind, c in (("iou", confusion(p, batch.labels)), ("hands_as_one", confusion(one, merged))):
                    counts[kind, given] = counts.get((kind, given), 0) + c
    out: dict[str, Any] = {kind: {} for kind in names}
    for (kind, given), c in counts.items():
        each = dict(zip(names[kind], iou(c)[1:].tolist(), strict=True))
        mean = sum(each.values()) / len(each)
        out[kind][given] = {k: round(v, 4) for k, v in (each | {"mean": mean}).items()}
    return out


def cost(path: Path, threads: int) -> dict[str, float]:
    """Milliseconds (best, median) and peak megabytes over what importing took, in a process of its own, on the CPU."""
    done = subprocess.run([sys.executable, __file__, "--cost", str(path), str(threads)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure_cost(path: Path, threads: int, rounds: int = 30) -> dict[str, float]:
    torch.set_num_threads(threads)
    before = memory("VmRSS")
    model = load_model(path)
    if read_header(path)["network"] == "segmenter":
        if hasattr(model, "folded"):
            model = model.folded()
        inputs = (torch.rand(1, 3, *FRAME), torch.zeros(1, 5, *FRAME))
    else:
        K = torch.tensor([[[300.0, 0, 112], [0, 300, 112], [0, 0, 1]]])
        inputs = (torch.rand(1, 3, *model.image_size), K)
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds):
            begun = time.perf_counter()
            model(*inputs)
            seconds.append(time.perf_counter() - begun)
    seconds = sorted(seconds[3:])
    return {
        "ms": round(1000 * seconds[0], 1),
        "ms_median": round(1000 * seconds[len(seconds) // 2], 1),
        "peak_mb": round(memory("VmHWM") - before, 1),
        "threads": threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_mb": round(path.stat().st_size / 1e6, 2),
    }


def memory(what: str) -> float:
    """Megabytes that this process holds ("VmRSS") or has held at most ("VmHWM"); nan where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what + ":"))


def held_out(args: argparse.Namespace) -> list[SynthBatch]:
    count = -(-args.pictures // args.batch)
    if args.shards:
        from handhold.datasets.synthetic.shards import Shards

        stream = Shards(args.shards, device=args.device)
    else:
        from handhold.datasets.synthetic.scenes import Synth, SynthConfig

        stream = Synth(replace(SynthConfig(), seed=args.seed, objects=args.objects), args.device)
    return [stream.batch(i, args.batch, args.split) for i in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--seed", type=int, default=1, help="of the generator; training has 0")
    parser.add_argument("--objects", type=int, default=600)
    parser.add_argument("--shards", type=Path, help="pictures made by `handhold synth` instead of new ones")
    parser.add_argument("--looks", type=int, choices=(1, 2), help="at each hand; as it was trained for by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of the cost")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cost", nargs=2, metavar=("CHECKPOINT", "THREADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cost:
        print(json.dumps(measure_cost(Path(args.cost[0]), int(args.cost[1]))))
        return 0
    try:
        results = json.loads(args.out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        results = {"networks": {}}
    batches = held_out(args)
    for path in args.checkpoints:
        header, model = read_header(path), load_model(path, args.device)
        if header["network"] == "segmenter":
            row = segmenter_figures(model, batches)
        else:
            row = regressor_figures(model, batches, args.looks or header["extra"].get("looks", 1))
        row |= {"cost": cost(path, args.threads), "training": header["extra"].get("training")}
        results["networks"][header["network"]] = row
        print(json.dumps({header["network"]: row}), flush=True)
    data = {
        "pictures": len(batches) * args.batch,
        "split": args.split,
        "seed": args.seed,
        "size": batches[0].image.shape[-1],
    }
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    results |= {"data": data, "date": time.strftime("%Y-%m-%d"), **machine}
    write_atomically(args.out, json.dumps(results, indent=1) + "\n")
    print(tables.regressor_table(results), tables.segmenter_table(results), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
