"""The first whole method: skinned hands and one rigid unknown object.

The object's surface is a signed-distance grid (strong on geometry and pose), its appearance Gaussians on that surface
(strong on colour), rendered together with the hands' in true occlusion order. What hands hide is unknown, not
background; where the hands are, the object is not; what no frame has seen is filled in smoothly and marked as unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.spatial import cKDTree

from ..hand import HandModel
from ..kernels.grid import SdfGrid
from ..scene import Mesh, Sequence
from ..shapes.gaussians import Gaussians
from ..shapes.sdf import nodes, open_thin, surface
from ..shapes.sdf_fit import SdfFitConfig, Stage
from ..shapes.texture import fair_hidden, observe
from ..tracking import rungs
from ..tracking.bootstrap import bootstrap, silhouette_iou
from ..tracking.fiducial import bridge_gaps
from ..tracking.object import COARSE, ObjectField, Observations, beside, hiders, refine_object
from ..tracking.occlusion import HandSolid, hand_depth, object_depth, raw_depth, widened
from ..tracking.register import register_missing
from ..tracking.symmetry import Ambiguity, ambiguities, colour_noise
from .appearance import fit_appearance

FINE = (Stage(80, 350, (1.2, 0.6), 1.0),)
SURE_HAND = 0.1  # confidence of a frame placed by the hand below which a short gap is rather bridged
AGREES = 0.5  # of the placed frames' silhouette IoU, for a pose from the hand to be believed
HELD = 0.3  # confidence of a pose from the hand that the outline agrees with
MIN_IOU = 0.5  # of the rendered object with its masks; below, the result is marked partial
HAND_MARGIN = 0.006  # metres a tracked hand may be off: only deeper inside it is surely no object
IN_FRONT = 0.004  # metres: a hand this much behind the object's first surface may still be in front of the true one
THIN_UNSEEN = 0.008  # metres: likewise, where no frame saw the surface
THIN_COARSE, THIN_FINE = 0.006, 0.0035  # metres: half the thickness below which leftovers beside a hand are removed


@dataclass(frozen=True)
class RigidFit:
    """What the fit stage turns into a scene."""

    mesh: Mesh | None  # metres, object frame
    gaussians: Gaussians | None  # object frame
    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    object_confidence: np.ndarray  # (F,)
    object_reason: np.ndarray  # (F,) str
    hands: dict  # side -> HandTrack
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  # why the result is only partial
    ambiguous: tuple[Ambiguity, ...] = ()  # turns of the object that no picture tells apart


def fit_rigid(
    sequence: Sequence,
    tracks,
    seed: int = 0,
    pose_lr: float = 1e-4,
    appearance: bool = True,
    progress: Callable[[float, str], None] | None = None,
    registration: bool = True,
) -> RigidFit:
    """Fit one clip from its masks and `stages.track.Tracks`. Deterministic for a seed.

    pose_lr: radians per step of the pose refinement with the surface (0: poses stay); appearance: fit Gaussians too;
    registration: place the frames that tracking could not.
    """
    say = progress or (lambda share, what: None)
    part = lambda a, b: lambda share, what, **metrics: say(a + (b - a) * share, what, **metrics)  # noqa: E731
    poses, tracked = tracks.cam_from_object, dict(tracks.hands)
    masks = sequence.masks
    seen = masks["object"].reshape(len(sequence), -1).sum(1) > 50
    if (np.isfinite(poses[:, 0, 0]) & seen).sum() < 3:
        return RigidFit(
            None, None, poses, tracks.confidence, tracks.reason, tracked, ["no object surface: its pose is unknown"]
        )
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
        start = bootstrap(obs, poses, confidence, seed, part(0.0, 0.1))
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
    # A weak wish for emptiness where a hand hides the object: a strong one eats what no frame sees.
    config = SdfFitConfig(pose_lr=pose_lr, hidden=0.05, seed=seed)

    # 1. A coarse surface from the frames that tracking placed; the frames it could not place are registered to that.
    # (Poses stay for now: a coarse grid blurs the print they hang on.)
    coarse = refine_object(
        obs, poses, weight, COARSE, replace(config, pose_lr=0.0), solids=solids, progress=part(0.0, 0.2)
    )
    placed, error = coarse.cam_from_object, np.full(len(sequence), np.nan)
    if registration:
        placed, error = register_missing(
            coarse, obs.scaled(0.5), placed, seed=seed, progress=part(0.2, 0.25), hints=guess
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

    # 2. The fine surface. Which of the hand's pixels are in front of the object can be told now.
    prune(coarse.grid, solids, THIN_COARSE)
    front = widened(raw < object_depth(surface(coarse.grid)[0], sequence, placed) + IN_FRONT)
    fitted = refine_object(
        replace(obs, doubtful=front), placed, weight, FINE, config, coarse, solids=solids, progress=part(0.25, 0.6)
    )
    prune(fitted.grid, solids, THIN_FINE)
    mesh, more = surface(fitted.grid)
    notes += more
    poses = fitted.cam_from_object
    confidence = frame_confidence(fitted, confidence)
    if not len(mesh.faces):
        return RigidFit(None, None, poses, confidence, reason, tracked, notes)

    # 3. Colours, what was seen, and the rest.
    say(0.6, "surface colours")
    clear = np.stack([i & ~beside(h) & ~f for i, h, f in zip(masks["object"], hidden, front, strict=True)])
    colour = lambda m: observe(m, sequence.frames, clear, sequence.K, poses, weight, 2.5 * fitted.grid.h)  # noqa: E731
    mesh = colour(mesh)
    if prune_unseen(fitted.grid, mesh, THIN_UNSEEN):
        mesh = colour(surface(fitted.grid)[0])
    noise = colour_noise(mesh, sequence.frames, clear, sequence.K, poses)
    same = ambiguities(mesh, fitted.grid, noise, seed)
    notes += [a.sentence for a in same]
    mesh = fair_hidden(mesh)
    if not appearance:
        return RigidFit(mesh, None, poses, confidence, reason, tracked, notes, ambiguous=same)
    look = fit_appearance(sequence, mesh, poses, weight, hands, seed=seed, progress=part(0.65, 1.0))
    doubts = []
    if look.iou < MIN_IOU:
        doubts.append(
            f"The object does not explain its masks (IoU {look.iou:.2f}): it may not be one rigid object, or none."
        )
    notes.append(f"Gaussians: {look.psnr:.1f} dB on held-out frames' foreground, object mask IoU {look.iou:.2f}")
    return RigidFit(mesh, look.object, look.cam_from_object, confidence, reason, tracked, notes, doubts, same)


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
    typical = np.median([silhouette_iou(field, small, int(i), placed[i]) for i in known[:: max(1, len(known) // 8)]])
    for i in np.flatnonzero(by_hand):
        out[i] = silhouette_iou(field, small, int(i), guess[i]) > AGREES * typical
    return out


def posed_hand(side: str, h) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (F,V,3) camera frame and faces of a tracked hand, sealed at the wrist."""
    model = HandModel.open(side, dtype=torch.float64).sealed()
    posed = model.with_shape(_f64(h.betas)).with_pose(_f64(h.pose), _f64(h.transl))
    return posed.vertices.numpy(), np.asarray(model.faces)


def _f64(x) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, np.float64))


def carry(side: str, h, before: np.ndarray, after: np.ndarray, new: np.ndarray):
    """A hand that holds the object goes along with it in newly placed frames, as in the nearest frame placed before.

    Frames in which the hand itself was seen well keep it.
    """
    model = HandModel.open(side, dtype=torch.float64)
    wrist = model.with_shape(_f64(h.betas)).rest_joints.numpy()[0]
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
        rotations = model.rotations(_f64(h.pose[k])).clone()
        rotations[0] = torch.from_numpy(step[:3, :3]) @ rotations[0]
        pose[i] = model.theta(rotations).numpy()
        transl[i] = step[:3, :3] @ (wrist + h.transl[k]) + step[:3, 3] - wrist
        confidence[i], reason[i] = 0.7 * h.confidence[k], rungs.CARRIED
    return replace(h, pose=pose, transl=transl, confidence=confidence, reason=reason)


def prune(grid: SdfGrid, solids: list[HandSolid], radius: float, reach: float = 0.03) -> None:
    """Remove thin leftovers within `reach` (metres) of the hands; see `open_thin`."""
    for solid in solids:
        near = solid.distance(nodes(grid)).reshape(grid.R, grid.R, grid.R) < reach
        open_thin(grid, near, radius)


def prune_unseen(grid: SdfGrid, mesh: Mesh, radius: float) -> bool:
    """Remove what is thin (see `open_thin`) where no frame saw the surface; whether there was any."""
    if mesh.observed is None or mesh.observed.all() or not mesh.observed.any():
        return False
    at = nodes(grid)
    unseen = cKDTree(mesh.vertices[~mesh.observed]).query(at, workers=-1)[0]
    seen = cKDTree(mesh.vertices[mesh.observed]).query(at, workers=-1)[0]
    before = (grid.data[..., 0] < 0).sum()
    open_thin(grid, (unseen < seen).reshape(grid.R, grid.R, grid.R), radius)
    return bool((grid.data[..., 0] < 0).sum() < before)


def frame_confidence(fitted: ObjectField, prior: np.ndarray) -> np.ndarray:
    """(F,) tracking's confidence, lowered where the final rendering disagrees with the frame."""
    e = fitted.error
    typical = np.nanmedian(e)
    doubt = np.clip(1.75 - 0.75 * e / max(typical, 1e-6), 0.3, 1.0)
    return np.where(np.isfinite(e), prior * doubt, 0.0).astype(np.float32)
