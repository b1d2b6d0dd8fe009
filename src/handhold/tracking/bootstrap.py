"""Shape and poses of an object that nothing could be matched on, from poses that are only roughly known.

The poses come from a hand that holds the object (`tracking.fiducial`). They are smooth in time but off by ten degrees
and more, and by centimetres in depth. Silhouettes and colours refine them in rounds, each with a robust visual hull
anew: first places alone, which outlines tell well once the turns are given; then turns too, but only as a correction
that is smooth in time and shrunk towards the hand's. The leash is needed: shape and turns together can be bent to
explain all outlines better and better while the turns get worse (measured, docs/methods/rigid.md). Nothing is believed
unless the outlines of frames that took no part in the shape agree better than before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..geometry.rigid import so3_exp, so3_log
from ..kernels.grid import SdfGrid
from ..shapes.sdf_fit import SdfFitConfig, Stage, object_rays, render_band
from .object import Observations, refine_object

HELD_OUT = 5  # every fifth frame takes no part in the shape that judges
GAIN = 0.01  # of IoU on held-out frames that a step must bring
FEWEST = 8  # frames with a pose and a mask
_LEASH = 0.3  # share of a turn away from the hand's that is kept, each round
_SMOOTH = 3.0  # frames: width of the Gaussian that corrections of turns are smoothed with
_ROUND = (Stage(24, 70, (4.0, 2.0), 0.25),)
_PLACES = ((3e-2, 0.6), (3e-2, 0.7), (2e-2, 0.75), (2e-2, 0.8))  # step, and quantile of the hull
_TURNS = ((1e-2, 0.85), (1e-2, 0.85))
_JUDGE = (Stage(28, 90, (3.0, 1.5), 0.5),)


@dataclass(frozen=True)
class Bootstrap:
    """What `bootstrap` found."""

    cam_from_object: np.ndarray  # (F,4,4), NaN where the start was; the start itself when nothing was accepted
    steps: tuple[str, ...]  # of "places" and "turns", those accepted
    iou: tuple[float, ...]  # of held-out silhouettes: at the start, after places, after turns


def bootstrap(
    obs: Observations,
    start: np.ndarray,
    confidence: np.ndarray,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Bootstrap:
    """Poses refined from `start` (F,4,4), NaN where unknown, by outlines and colours; see the module's head.

    confidence (F,) of the poses given. Nothing is done when fewer than `FEWEST` frames have a pose and a mask.
    """
    say = progress or (lambda share, text: None)
    usable = np.isfinite(start[:, 0, 0]) & (obs.inside.reshape(len(start), -1).sum(1) > 150)
    if usable.sum() < FEWEST:
        return Bootstrap(start, (), ())
    weight = np.clip(confidence, 0.1, 1.0)
    best, steps, iou = start, [], [held_out_iou(obs, start, usable, weight, seed)]
    total, done = len(_PLACES) + len(_TURNS), 0
    for name, rounds, leash in (("places", _PLACES, 0.0), ("turns", _TURNS, _LEASH)):
        poses = best
        for lr, quantile in rounds:
            config = SdfFitConfig(pose_lr=lr, hidden=0.05, rays=2048, seed=seed)
            known = np.where(usable[:, None, None], poses, np.nan)
            field = refine_object(obs, known, weight, _ROUND, config, hull_quantile=quantile)
            poses = on_leash(field.cam_from_object, start, poses, field.center, leash)
            done += 1
            say(done / total, "object from its outlines")
        iou.append(held_out_iou(obs, poses, usable, weight, seed))
        if iou[-1] > max(iou[:-1]) + GAIN:
            best = poses
            steps.append(name)
    return Bootstrap(best, tuple(steps), tuple(iou))


def on_leash(
    moved: np.ndarray, start: np.ndarray, before: np.ndarray, centre: np.ndarray, leash: float, width: float = _SMOOTH
) -> np.ndarray:
    """Poses (F,4,4) whose places of `centre` (3,) are those of `moved`, and whose turns are those of `start` plus
    `leash` times the smoothed difference of `moved` from them; frames that are NaN in `moved` stay as `before`."""
    ok = np.flatnonzero(np.isfinite(moved[:, 0, 0]) & np.isfinite(start[:, 0, 0]))
    out = before.copy()
    r0 = torch.from_numpy(start[ok, :3, :3])
    w = so3_log(torch.from_numpy(moved[ok, :3, :3]) @ r0.mT).numpy()
    kernel = np.exp(-0.5 * ((ok[:, None] - ok) / width) ** 2)
    w = leash * (kernel / kernel.sum(1, keepdims=True)) @ w
    out[ok, :3, :3] = (so3_exp(torch.from_numpy(w)) @ r0).numpy()
    out[ok, :3, 3] = moved[ok, :3, :3] @ centre + moved[ok, :3, 3] - out[ok, :3, :3] @ centre
    return out


def held_out_iou(obs: Observations, poses: np.ndarray, usable: np.ndarray, weight: np.ndarray, seed: int = 0) -> float:
    """Mean silhouette IoU of every fifth frame with the shape that the others make, all poses held."""
    frames = np.flatnonzero(usable)
    out = frames[2::HELD_OUT]
    rest = poses.copy()
    rest[~usable] = rest[out] = np.nan
    if not len(out) or np.isfinite(rest[:, 0, 0]).sum() < 3:
        return 0.0
    field = refine_object(obs, rest, weight, _JUDGE, SdfFitConfig(pose_lr=0.0, hidden=0.05, rays=2048, seed=seed))
    small = obs.scaled(0.25)
    return float(np.mean([silhouette_iou(field.grid, small, int(i), poses[i]) for i in out]))


def silhouette_iou(grid: SdfGrid, obs: Observations, i: int, pose: np.ndarray) -> float:
    """IoU of the rendered object with the mask of frame i; pixels that may hide the object do not count."""
    told = ~obs.unsure(i)
    y, x = np.nonzero(told)
    d = np.stack([(x + 0.5 - obs.K[0, 2]) / obs.K[0, 0], (y + 0.5 - obs.K[1, 2]) / obs.K[1, 1], np.ones(len(x))], -1)
    d = torch.from_numpy((d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32))
    view = torch.zeros(len(d), dtype=torch.long)
    o, d = object_rays(torch.from_numpy(pose[None]).float(), view, d)
    limit = torch.full((len(d),), float("inf"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        _, acc, _ = render_band(grid, o, d, limit, 0.75 * grid.h, 16, generator)
    drawn, mask = acc.numpy() > 0.5, obs.inside[i][y, x]
    return float((drawn & mask).sum() / max((drawn | mask).sum(), 1))
