#!/usr/bin/env python3
"""What sharing one set of Gaussians between both hands is worth where a hand was not seen (docs/methods/bigs.md).

    python benchmarks/bigs_hidden.py RUN [--shown 12] [--steps 240]

RUN is a finished run of a clip with both hands. Each hand in turn teaches its colours in the first `--shown` frames
only, and is scored in all later frames, where it shows sides that it did not show before; the other hand is seen
throughout. PSNR of that hand's pixels, dB: one set for both hands, a set for each. Poses stay as they are tracked.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from handhold.methods.base import posed_hand
from handhold.methods.bigs import optimiser_of, subjects, train
from handhold.methods.bigs_model import draw
from handhold.methods.crops import crops
from handhold.methods.settings import BigsConfig
from handhold.runs import Run
from handhold.scene import Scene
from handhold.stages.track import load_tracked


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("run", type=Path)
    ap.add_argument("--shown", type=int, default=12, help="frames in which the hand teaches its colours")
    ap.add_argument("--steps", type=int, default=240)
    args = ap.parse_args()
    run = Run(args.run)
    sequence, tracks = load_tracked(run)
    scene = Scene.load(run.scene_path)
    body = scene.bodies["object"]
    poses = np.linalg.inv(scene.world_from_cam) @ body.motion.world_from_body
    start = SimpleNamespace(tracked=tracks.hands, hands={s: posed_hand(s, t) for s, t in tracks.hands.items()})
    all_views = crops(sequence, tracks.confidence, poses, {s: v for s, (v, _) in start.hands.items()})
    told = {}
    for k, side in enumerate(tracks.hands):
        views = [replace(v, held_out=False, label=hidden(v, 1 + k, v.frame >= args.shown)) for v in all_views]
        for shared in (True, False):
            config = BigsConfig(shared_hands=shared, densify=False, count=500)
            generator = torch.Generator().manual_seed(0)
            s = subjects(sequence, start, body.shape, poses, views, config, generator, "cpu", 0)
            train(views, s, optimiser_of(s), config, args.steps, generator, None, None, lambda share, what: None)
            told[f"{side} {'shared' if shared else 'separate'}"] = round(psnr(all_views, s, side, args.shown), 2)
    print(json.dumps(told, indent=1))


def hidden(view, body: int, yes: bool) -> torch.Tensor:
    """Labels of a view without those of a body."""
    label = view.label.clone()
    label[..., body] *= not yes
    return label


@torch.no_grad()
def psnr(views, s, side: str, shown: int) -> float:
    """dB of a hand's labelled pixels in the frames from `shown` on."""
    body, total, count = s.ids()[side], 0.0, 0
    rest = s.rest_hands()
    for v in views:
        drawn = draw(v, s, None, rest) if v.frame >= shown else None
        if drawn is not None and body in drawn.bodies:
            where = (v.label[..., body] > 0) & (drawn.out.ids[0, ..., body] > 0.5)
            e = (drawn.out.color[0].clamp(0, 1) - v.image).square().mean(-1)
            total, count = total + float(e[where].sum()), count + int(where.sum())
    return -10 * np.log10(max(total / max(count, 1), 1e-12))


if __name__ == "__main__":
    main()
