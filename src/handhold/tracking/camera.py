"""The video's camera: does it stand still, and where is it in every frame?

1. `_camera_still` decides from the background alone. Without evidence a camera is taken as static, and that is said.
2. A camera that moves is found by structure from motion on the background (`_camera_motion`): flow tracks, rotations
   from aligned rays, then two frames with parallax, PnP and bundle adjustment; pycolmap (`sfm`) where that places too
   few frames. Without parallax only the rotation can be seen, and the translation is zero.
3. The background's scale is not the hands'. `metric_scale` finds it: the one at which hands and object move least in
   the world.
World is the first frame's camera; which way is up is not known.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from ..scene import Body, Rigid, Scene, Skinned
from . import _camera_motion as motion
from . import _sfm_bundle as bundle
from ._camera_still import judge_stillness
from .sfm import structure_from_motion

SIDE = 320  # the longer side of the frames that are followed; flow doubles them
MARGIN = 0.02  # of the longer side, by which the subject's masks are widened
PARALLAX = 0.5  # pixels of such frames that turning alone must leave in a fifth of the observations to look for more
MOST = 0.6  # of the frames that a model must place
LAGS = (1, 2)  # frames between the two ends of a step, for the scale; over longer ones the subject wanders too
SURE = 0.3  # standard deviation of the scale's logarithm from which it is not observable


@dataclass(frozen=True)
class CameraTrack:
    """The camera over a clip."""

    world_from_cam: np.ndarray  # (F,4,4) float64; translations in units of the background until `scaled`
    static: bool
    translates: bool
    confidence: np.ndarray  # (F,) float32 in [0,1]
    reason: np.ndarray  # (F,) str: "static", "static: assumed", "turning", "sfm on the background", "interpolated"
    evidence: str  # one sentence
    nearest: float  # distance of the nearest background, same units; NaN where unknown
    scale_std: float = 0.0  # standard deviation of the logarithm of the translation's scale


@dataclass(frozen=True)
class CameraScale:
    """Metres per unit of the background."""

    value: float
    log_std: float  # inf where nothing is known
    observable: bool


def estimate_camera(
    frames: np.ndarray,
    K: np.ndarray,
    subject: np.ndarray,
    workdir: str | os.PathLike,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> CameraTrack:
    """frames (F,H,W,3) uint8; K (3,3) pixels; subject (F,H,W) bool, hands, arms, object and whatever moves by itself.

    `workdir` takes what passes to pycolmap, where that is needed. Never fails: what cannot be found is said.
    """
    tell = progress or (lambda share, text: None)
    longer = max(frames.shape[1:3])
    r = max(1, round(MARGIN * longer))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * r + 1, 2 * r + 1))
    background = np.stack([cv2.dilate(m.astype(np.uint8), kernel) == 0 for m in subject])
    still = judge_stillness(frames, background, lambda s: tell(0.2 * s, "is the camera static"))
    if still.still is None:
        return _standing(len(frames), 0.3, "static: assumed", f"The camera is taken as static: {still.evidence}.")
    if still.still:
        return _standing(len(frames), still.share, "static", f"The camera is static: {still.evidence}.")
    scale = min(1.0, SIDE / longer)
    if scale < 1:
        size = tuple(round(scale * n) for n in frames.shape[2:0:-1])
        frames = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames])
        background = np.stack([cv2.resize(m.astype(np.uint8), size, interpolation=cv2.INTER_AREA) for m in background])
        background, K = background > 0, np.diag([scale, scale, 1.0]) @ K
    evidence = f"The camera moves: {still.evidence}"
    t = motion.background_tracks(frames, background, K, lambda s: tell(0.2 + 0.5 * s, "following the background"))
    tell(0.7, "camera")
    return _moving(t, lambda: _by_colmap(frames, background, K, workdir, seed), evidence, seed)


def _standing(count: int, confidence: float, reason: str, evidence: str) -> CameraTrack:
    eye, trust = np.tile(np.eye(4), (count, 1, 1)), np.full(count, confidence, np.float32)
    return CameraTrack(eye, True, False, trust, np.full(count, reason), evidence, np.nan)


def _by_colmap(frames, background, K, workdir, seed) -> np.ndarray:
    return structure_from_motion(frames, background, K, Path(workdir), seed).cam_from_object


def _moving(t: bundle.Tracks, otherwise: Callable[[], np.ndarray], evidence: str, seed: int) -> CameraTrack:
    """The best model of the motion in tracks. `otherwise` gives poses (F,4,4) when the tracks alone give too few."""
    R, e_turn = motion.turning(t)
    turned = motion.chained(R)
    left = np.percentile(e_turn[np.isfinite(e_turn)], 80) if np.isfinite(e_turn).any() else np.inf
    poses, doubt = turned, ""
    if left > PARALLAX:
        poses, fit = _checked(motion.moving(t, R, seed), t, left)
        if not fit:
            poses, fit = _checked(otherwise(), t, left)
        if not fit:
            poses, doubt = turned, " Not all of the background fits that, but no path fits better: position left out."
    translates = poses is not turned
    known = bundle.is_registered(poses)
    if known.sum() < 2:
        why = f"{evidence}, but too little of the background can be followed to say how; it is taken as static."
        return replace(_standing(t.frames, 0.05, "static: assumed", why), static=False)
    X, error = bundle.triangulate(poses, t) if translates else (None, e_turn)
    fits = np.bincount(t.frame[error < motion.CLOSE], minlength=t.frames)
    share = fits / np.maximum(np.bincount(t.frame, minlength=t.frames), 1)
    trust = np.where(known, share * fits / (fits + 20.0), 0.1) * (0.3 if doubt else 1.0)
    word = "sfm on the background" if translates else "turning"
    reason = np.where(known, word, "interpolated")
    nearest = np.nan
    if translates:
        depth = np.einsum("nj,nj->n", poses[t.frame, 2, :3], X[t.track]) + poses[t.frame, 2, 3]
        nearest = float(np.percentile(depth[error < motion.CLOSE], 5))
    world = np.full_like(poses, np.nan)
    world[known] = np.linalg.inv(poses[known])
    world = motion.interpolated(world)
    world = np.linalg.inv(world[0]) @ world
    world[0] = np.eye(4)
    how = "turns and moves" if translates else "only turns, as far as the background shows (no parallax)"
    if doubt:
        how = "turns"
    text = (
        f"{evidence}. It {how}; {int(known.sum())} of {t.frames} frames are placed.{doubt} "
        "The world is the first frame's camera, gravity is not known."
    )
    return CameraTrack(world, False, translates, trust.astype(np.float32), reason, text, nearest)


def _checked(poses: np.ndarray | None, t: bundle.Tracks, left: float) -> tuple[np.ndarray | None, bool]:
    """The poses, and whether they place enough frames and explain clearly more than turning alone, which leaves a fifth
    of the observations `left` pixels off."""
    if poses is None or bundle.is_registered(poses).sum() < MOST * t.frames:
        return poses, False
    _, error = bundle.triangulate(poses, t)
    mine = error[bundle.is_registered(poses)[t.frame]]
    fit = np.isfinite(mine)
    return poses, bool(fit.mean() > 0.5 and np.percentile(mine[fit], 80) < 0.6 * left)


def metric_scale(track: CameraTrack, points: list[np.ndarray], weights: list[np.ndarray]) -> CameraScale:
    """The scale of the camera's translation at which points move least in the world.

    points: each (F,3) of a wrist or the object, camera frame, metres, NaN where unknown; weights: each (F,). With the
    step of point p between frames i and j, world_j - world_i = (R_j p_j - R_i p_i) + s (c_j - c_i) = a + s b, it is
    argmin over s of the sum of w |a + s b|: convex, solved by reweighted least squares. The sum of distances, not of
    their squares, lets the frames where a hand rests decide. Its standard deviation is a jackknife over blocks of time.
    A subject that moves with the camera (a person who walks and films) cannot be told from one at rest.
    """
    R, c = track.world_from_cam[:, :3, :3], track.world_from_cam[:, :3, 3]
    a, b, w, ends = [], [], [], []
    for p, trust in zip(points, weights, strict=True):
        world = np.einsum("fij,fj->fi", R, p)
        for lag in LAGS:
            if lag >= len(p):
                continue
            step, weight = world[lag:] - world[:-lag], np.sqrt(trust[lag:] * trust[:-lag])
            ok = np.isfinite(step).all(1) & (weight > 0)
            i = np.flatnonzero(ok)
            a.append(step[ok])
            b.append((c[lag:] - c[:-lag])[ok])
            w.append(weight[ok])
            ends.append(np.stack([i, i + lag], 1))
    a, b, w, ends = (np.concatenate(x) if x else np.zeros((0, 3)) for x in (a, b, w, ends))
    if len(a) < 8 or not (b**2).sum() > 0:
        return _by_distance(track, points)
    value = _least_motion(a, b, w)
    blocks = np.array_split(np.arange(len(c)), min(10, max(3, len(c) // 4)))
    left_out = [_least_motion(a[k], b[k], w[k]) for block in blocks if (k := ~np.isin(ends, block).any(1)).sum() >= 4]
    n = len(left_out)
    std = (
        float(np.sqrt((n - 1) / max(n, 1) * np.sum((np.array(left_out) - np.mean(left_out)) ** 2))) if n > 2 else np.inf
    )
    if not value > std:  # nothing, or the wrong sign
        return _by_distance(track, points)
    return CameraScale(value, std / value, std / value < SURE)


def _least_motion(a: np.ndarray, b: np.ndarray, w: np.ndarray, rounds: int = 60) -> float:
    """argmin over s of sum w |a + s b|."""
    s, k = 0.0, w
    for _ in range(rounds):
        s = -(k[:, None] * a * b).sum() / max((k[:, None] * b * b).sum(), 1e-30)
        k = w / (np.linalg.norm(a + s * b, axis=1) + 1e-4)
    return float(s)


def _by_distance(track: CameraTrack, points: list[np.ndarray]) -> CameraScale:
    """A guess: the nearest background is as far as the subject."""
    z = np.concatenate([p[:, 2] for p in points] or [np.zeros(0)])
    z = z[np.isfinite(z)]
    value = float(np.median(z) / track.nearest) if len(z) and track.nearest > 0 else 1.0
    return CameraScale(value, np.inf, False)


def scale_note(scale: CameraScale) -> str:
    """What to tell the user of it."""
    if scale.observable:
        return f"camera: the scale of its path is known to {100 * np.expm1(scale.log_std):.0f} % from hands and object"
    why = "they move too much" if np.isfinite(scale.log_std) else "guessed: the nearest background as far as they are"
    return f"camera scale unobservable from hands and object ({why}); lengths of the camera's path are not metric"


def scaled(track: CameraTrack, scale: CameraScale) -> CameraTrack:
    """The track with translations in metres."""
    world = track.world_from_cam.copy()
    world[:, :3, 3] *= scale.value
    return replace(track, world_from_cam=world, nearest=track.nearest * scale.value, scale_std=scale.log_std)


def in_world(scene: Scene, world_from_cam: np.ndarray) -> Scene:
    """A scene whose bodies are in the camera's frame (world_from_cam identity), moved into the world (F,4,4)."""
    if (world_from_cam == np.eye(4)).all():
        return scene
    R, c = world_from_cam[:, :3, :3], world_from_cam[:, :3, 3]
    bodies: dict[str, Body] = {}
    for name, body in scene.bodies.items():
        m = body.motion
        if isinstance(m, Rigid):
            bodies[name] = replace(body, motion=Rigid(world_from_cam @ m.world_from_body))
            continue
        there = lambda x: np.einsum("fij,fnj->fni", R, x) + c[:, None]  # noqa: E731
        joints = there(m.joints)
        pose = np.array(m.pose, np.float64)
        known = np.isfinite(pose[:, 0]).all(1)
        turned = R[known] @ Rotation.from_rotvec(pose[known, 0]).as_matrix()
        pose[known, 0] = Rotation.from_matrix(turned).as_rotvec()
        # the wrist rests at J0 and is posed at J0 + transl (docs/conventions.md, "The hand")
        transl = m.transl + joints[:, 0] - m.joints[:, 0]
        bodies[name] = replace(body, motion=Skinned(m.model, pose, m.betas, transl, there(m.vertices), joints))
    return replace(scene, world_from_cam=world_from_cam, bodies=bodies)
