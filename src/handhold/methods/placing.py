"""Every frame's object pose before a fine surface is fitted: tracking's, the hand's, or a registration's.

A coarse surface from the frames that tracking placed is what the others are registered to. All methods start here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..hand import HandModel
from ..kernels.grid import SdfGrid
from ..scene import Sequence
from ..shapes.sdf import nodes, open_thin, surface
from ..shapes.sdf_fit import SdfFitConfig, SurfacePoints
from ..tracking import rungs
from ..tracking.bootstrap import bootstrap, silhouette_iou
from ..tracking.fiducial import bridge_gaps
from ..tracking.object import COARSE, ObjectField, Observations, hiders, refine_object
from ..tracking.occlusion import HandSolid, hand_depth, object_depth, raw_depth, widened
from ..tracking.points import follow, surface_points
from ..tracking.register import register_missing
from .base import f64, posed_hand

SURE_HAND = 0.1  # confidence of a frame placed by the hand below which a short gap is rather bridged
AGREES = 0.5  # of the placed frames' silhouette IoU, for a pose from the hand to be believed
HELD = 0.3  # confidence of a pose from the hand that the outline agrees with
HAND_MARGIN = 0.006  # metres a tracked hand may be off: only deeper inside it is surely no object
IN_FRONT = 0.004  # metres: a hand this much behind the object's first surface may still be in front of the true one
COARSE_POINTS = 0.1  # `SdfFitConfig.points` of the coarse surface, which has the way from the hull to go
THIN_COARSE = 0.006  # metres: half the thickness below which leftovers beside a hand are removed


@dataclass(frozen=True)
class Placing:
    """A clip with every frame placed that can be, and a coarse surface of the object."""

    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    confidence: np.ndarray  # (F,)
    reason: np.ndarray  # (F,) str
    weight: np.ndarray  # (F,) of the object's masks in that frame
    tracked: dict  # side -> HandTrack
    hands: dict[str, tuple[np.ndarray, np.ndarray]]  # side -> vertices (F,V,3) camera frame, faces; sealed
    obs: Observations  # pixels that a hand in front of the object covers are doubtful
    coarse: ObjectField
    solids: list[HandSolid]  # where the hands are, the object is not
    points: SurfacePoints | None  # of the object's surface
    notes: list[str]


def enough(sequence: Sequence, tracks) -> bool:
    """Whether so many frames have both an object mask and a pose that a surface can be fitted."""
    seen = sequence.masks["object"].reshape(len(sequence), -1).sum(1) > 50
    return bool((np.isfinite(tracks.cam_from_object[:, 0, 0]) & seen).sum() >= 3)


def place(
    sequence: Sequence,
    tracks,
    config: SdfFitConfig,
    registration: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> Placing:
    """Place all frames of one clip from its masks and `stages.track.Tracks`. Deterministic for `config.seed`.

    registration: place the frames that tracking could not.
    """
    say = progress or (lambda share, what: None)
    part = lambda a, b: lambda share, what, **metrics: say(a + (b - a) * share, what, **metrics)  # noqa: E731
    seed = config.seed
    poses, tracked = tracks.cam_from_object, dict(tracks.hands)
    masks = sequence.masks
    hands = {s: posed_hand(s, h) for s, h in tracked.items()}
    raw = raw_depth(sequence, hands)
    hidden = hiders(masks)
    obs = Observations(sequence.frames, masks["object"], hidden, sequence.K, hand_depth(sequence, raw))
    belief = sequence.mask_confidence.get("object", np.ones(len(sequence)))
    confidence, reason = tracks.confidence.copy(), np.asarray(tracks.reason, dtype="<U24").copy()
    notes: list[str] = []
    carried = reason == rungs.FIDUCIAL
    guess = np.where(carried[:, None, None], poses, np.nan)
    if np.isfinite(poses[~carried, 0, 0]).sum() >= 3:  # a model of its own: the hand's poses are only hints to it
        poses = np.where(carried[:, None, None], np.nan, poses)
    elif carried.any():
        start = bootstrap(obs, poses, confidence, seed, part(0.0, 0.2))
        poses = start.cam_from_object
        told = "places and turns" if "turns" in start.steps else "places"
        if start.steps:
            reason[carried] = rungs.SILHOUETTE
            notes.append(
                f"the object's outlines corrected the {told} that the hand gave it "
                f"(held-out IoU {start.iou[0]:.2f} to {max(start.iou):.2f})"
            )
        else:
            notes.append("the object's outlines could not correct the poses that the hand gave it")
    weight = np.clip(confidence * belief, 0.02, 1)
    solids = [s for v, f in hands.values() if (s := HandSolid.of(v, f, poses, margin=HAND_MARGIN)) is not None]

    # A coarse surface from the frames that tracking placed; the frames it could not place are registered to that.
    # (Poses stay for now: a coarse grid blurs the print they hang on.)
    corners, width = follow(obs), sequence.size[0]
    points = surface_points(corners, poses, width)
    first = replace(config, pose_lr=0.0, points=COARSE_POINTS)
    coarse = refine_object(obs, poses, weight, COARSE, first, solids=solids, points=points, progress=part(0.2, 0.8))
    placed, error = coarse.cam_from_object, np.full(len(sequence), np.nan)
    if registration:
        placed, error = register_missing(
            coarse, obs.scaled(0.5), placed, seed=seed, progress=part(0.8, 1.0), hints=guess
        )
    new = np.isfinite(error)
    confidence[new], reason[new] = 0.2 if tracks.carried_by else 0.5, rungs.REGISTERED
    by_hand = carried & ~np.isfinite(placed[:, 0, 0])
    confidence[seen_where_held(coarse, obs, guess, by_hand, placed)] = HELD
    surely = by_hand & (confidence >= SURE_HAND)
    placed[surely] = guess[surely]
    between = bridge_gaps(placed, coarse.center)
    rest = by_hand & ~surely & ~between
    placed[rest] = guess[rest]
    confidence[between], reason[between] = 0.2, rungs.INTERPOLATED
    new |= between
    if new.any():
        tracked = {s: carry(s, h, poses, placed, new) for s, h in tracked.items()}
        hands = {s: posed_hand(s, h) for s, h in tracked.items()}
        raw = raw_depth(sequence, hands)
        obs = replace(obs, occluder_depth=hand_depth(sequence, raw))
        weight = np.clip(confidence * belief, 0.02, 1)
        points = surface_points(corners, placed, width)

    # Which of the hand's pixels are in front of the object can be told now.
    prune(coarse.grid, solids, THIN_COARSE)
    front = widened(raw < object_depth(surface(coarse.grid)[0], sequence, placed) + IN_FRONT)
    obs = replace(obs, doubtful=front)
    return Placing(placed, confidence, reason, weight, tracked, hands, obs, coarse, solids, points, notes)


def seen_where_held(
    field: ObjectField, obs: Observations, guess: np.ndarray, by_hand: np.ndarray, placed: np.ndarray
) -> np.ndarray:
    """(F,) bool: frames `by_hand` whose outline lies about as well on the object where the hand holds it, `guess`
    (F,4,4), as it does in frames that are `placed` (F,4,4)."""
    out = np.zeros(len(by_hand), bool)
    known = np.flatnonzero(np.isfinite(placed[:, 0, 0]))
    if not by_hand.any() or not len(known):
        return out
    small = obs.scaled(0.25)
    typical = np.median(
        [silhouette_iou(field.grid, small, int(i), placed[i]) for i in known[:: max(1, len(known) // 8)]]
    )
    for i in np.flatnonzero(by_hand):
        out[i] = silhouette_iou(field.grid, small, int(i), guess[i]) > AGREES * typical
    return out


def carry(side: str, h, before: np.ndarray, after: np.ndarray, new: np.ndarray):
    """A hand that holds the object goes along with it in newly placed frames, as in the nearest frame placed before.

    Frames in which the hand itself was seen well keep it.
    """
    model = HandModel.open(side, dtype=torch.float64)
    wrist = model.with_shape(f64(h.betas)).rest_joints.numpy()[0]
    pose, transl, confidence, reason = (
        h.pose.copy(),
        h.transl.copy(),
        h.confidence.copy(),
        np.asarray(h.reason, dtype="<U24").copy(),
    )
    known = np.flatnonzero(np.isfinite(before[:, 0, 0]) & (h.confidence > 0.2))
    if not len(known):
        return h
    for i in np.flatnonzero(new):
        k = known[np.abs(known - i).argmin()]
        if h.confidence[i] >= h.confidence[k]:
            continue
        step = after[i] @ np.linalg.inv(before[k])
        rotations = model.rotations(f64(h.pose[k])).clone()
        rotations[0] = torch.from_numpy(step[:3, :3]) @ rotations[0]
        pose[i] = model.theta(rotations).numpy()
        transl[i] = step[:3, :3] @ (wrist + h.transl[k]) + step[:3, 3] - wrist
        confidence[i], reason[i] = 0.7 * h.confidence[k], rungs.CARRIED
    return replace(h, pose=pose, transl=transl, confidence=confidence, reason=reason)


def prune(grid: SdfGrid, solids: list[HandSolid], radius: float, reach: float = 0.03) -> None:
    """Remove thin leftovers within `reach` (metres) of the hands; see `open_thin`."""
    for solid in solids:
        inside = grid.data[..., 0].numpy() < 0
        near = np.zeros(inside.shape, bool)
        near[inside] = solid.distance(nodes(grid)[inside.ravel()]) < reach
        open_thin(grid, near, radius)
