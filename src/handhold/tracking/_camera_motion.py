"""A camera's motion from tracks of the background: turning alone, or turning and moving, up to one scale.

Poses are cam_from_world (F,4,4), NaN where unknown; tracks are those of `_sfm_bundle`.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from . import _sfm_bundle as bundle
from . import _sfm_refine as refine
from ._sfm_flow import flow_tracks

LONGEST = 60  # frames that a track may live: the background changes little, and long baselines are what parallax needs
PER_FRAME = 350  # tracks
MIN_ANGLE = np.radians(0.4)  # between the rays to a background point: it is far, and flow is exact to 0.2 pixels
CLOSE = 1.5  # pixels
FEW = 20  # tracks that two frames must share


def background_tracks(
    frames: np.ndarray, background: np.ndarray, K: np.ndarray, tick: Callable[[float], None] = lambda share: None
) -> bundle.Tracks:
    """Flow tracks of corners in `background` (F,H,W) bool of frames (F,H,W,3) uint8 with intrinsics K."""
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])
    spacing = max(5.0, np.sqrt(background.sum((1, 2)).mean() / PER_FRAME))
    rows, xy = flow_tracks(grey, background, spacing, LONGEST, tick=tick)
    x = (xy - K[:2, 2]) / [K[0, 0], K[1, 1]]
    none = np.zeros((0, 128), np.float32)
    return bundle.Tracks(
        rows[:, 0], rows[:, 1], x, float(K[0, 0]), len(frames), np.zeros(0, np.int64), none,
        MIN_ANGLE,
    )  # fmt: skip


def turning(t: bundle.Tracks, rounds: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Rotations cam_from_world (F,3,3) of a camera that only turns, NaN where tracks break off, and each observation's
    error (N,) in pixels.

    Neighbours are chained by robust alignment of their rays, then all frames are aligned in turn with the tracks' mean
    directions (Wahba's problem, solved by SVD), Cauchy weights: parallax of near things does not pull the rest along.
    """
    ray = np.c_[t.x, np.ones(len(t.x))]
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    R = np.full((t.frames, 3, 3), np.nan)
    R[0] = np.eye(3)
    order = np.argsort(t.frame, kind="stable")
    start = np.searchsorted(t.frame[order], np.arange(t.frames + 1))
    rows = [order[start[f] : start[f + 1]] for f in range(t.frames)]
    for f in range(1, t.frames):
        _, i, j = np.intersect1d(t.track[rows[f - 1]], t.track[rows[f]], return_indices=True)
        if len(i) >= FEW and np.isfinite(R[f - 1, 0, 0]):
            R[f] = _aligned(ray[rows[f - 1][i]] @ R[f - 1], ray[rows[f][j]], t.focal)
    known = np.isfinite(R[:, 0, 0])
    used = known[t.frame]
    error = np.full(len(ray), np.inf)
    if not used.any():
        return R, error
    weight = np.ones(len(ray))
    for _ in range(rounds):
        world = np.einsum("nji,nj->ni", R[t.frame[used]], ray[used]) * weight[used, None]
        mean = np.stack([np.bincount(t.track[used], world[:, k], minlength=t.count) for k in range(3)], -1)
        mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
        for f in np.flatnonzero(known):
            R[f] = _aligned(mean[t.track[rows[f]]], ray[rows[f]], t.focal, R[f], 2)
        seen = np.einsum("nij,nj->ni", R[t.frame[used]], mean[t.track[used]])
        error[used] = np.linalg.norm(np.cross(seen, ray[used]), axis=1) * t.focal
        weight = 1 / (1 + np.minimum(error, 1e6) ** 2)
    return R @ R[0].T, error


def _aligned(a: np.ndarray, b: np.ndarray, focal: float, R: np.ndarray | None = None, rounds: int = 12) -> np.ndarray:
    """The rotation R with R a = b for most of the unit vectors (N,3); Cauchy weights of one pixel."""
    w = np.ones(len(a)) if R is None else 1 / (1 + (np.linalg.norm(a @ R.T - b, axis=1) * focal) ** 2)
    for _ in range(rounds):
        u, _, vt = np.linalg.svd((b * w[:, None]).T @ a)
        R = u @ np.diag([1, 1, np.sign(np.linalg.det(u @ vt))]) @ vt
        w = 1 / (1 + (np.linalg.norm(a @ R.T - b, axis=1) * focal) ** 2)
    return R


def moving(t: bundle.Tracks, R: np.ndarray, seed: int = 0) -> np.ndarray | None:
    """Poses (F,4,4) of a camera that turns and moves: two frames with parallax, then the rest by PnP, all adjusted.

    R (F,3,3): what turning alone would be. None when no two frames tell.
    """
    best, found = 0.0, None
    for a, b in _wide_pairs(t, R):
        poses = _first_two(a, b, t, seed)
        if poses is None:
            continue
        X, _ = bundle.triangulate(poses, t)
        value = np.isfinite(X[:, 0]).sum()
        if value > best:
            best, found = value, poses
    if found is None or best < FEW:
        return None
    reason = np.full(t.frames, "", dtype="<U64")
    poses, _ = refine.grow(refine._polish(found, t, 6), [], t, reason, seed)
    poses = refine._polish(poses, t, 15)
    return refine._polish(poses, t, 15, refine.FINE)


def _wide_pairs(t: bundle.Tracks, R: np.ndarray, count: int = 6) -> list[tuple[int, int]]:
    """Pairs of frames with the most parallax: shared tracks times their median distance from turning alone, pixels."""
    out = []
    lags = sorted({l for l in (4, 8, 12, 20, 30, 45) if l < t.frames} or {t.frames - 1})
    for lag in lags:
        for a in range(0, t.frames - lag, max(1, (t.frames - lag) // 16)):
            b = a + lag
            i, j = t.common(a, b)
            if len(i) < 2 * FEW or not np.isfinite(R[[a, b], 0, 0]).all():
                continue
            p = np.c_[t.x[i], np.ones(len(i))] @ (R[b] @ R[a].T).T
            off = np.linalg.norm(p[:, :2] / p[:, 2:] - t.x[j], axis=1) * t.focal
            out.append((min(len(i), 150) * min(np.median(np.abs(off - np.median(off))) + np.median(off), 30), a, b))
    return [(a, b) for _, a, b in sorted(out, reverse=True)[:count]]


def _first_two(a: int, b: int, t: bundle.Tracks, seed: int) -> np.ndarray | None:
    """Two poses from an essential matrix; the world's origin lies among the points, so that it is in front of both."""
    i, j = t.common(a, b)
    found = refine.best_essential(t.x[i], t.x[j], t.focal, seed)
    if found is None or found[2].mean() < 0.5:
        return None
    poses = np.full((t.frames, 4, 4), np.nan)
    poses[a] = poses[b] = np.eye(4)
    poses[b, :3, :3], poses[b, :3, 3] = found[0], found[1]
    X, _ = bundle.triangulate(poses, t)
    X = X[np.isfinite(X[:, 0])]
    if len(X) < FEW:
        return None
    shift = np.median(X, axis=0)
    for f in (a, b):
        poses[f, :3, 3] += poses[f, :3, :3] @ shift
    poses[[a, b], :3, 3] /= np.linalg.norm(shift)
    return poses


def chained(R: np.ndarray) -> np.ndarray:
    """Rotations (F,3,3) as poses without translation (F,4,4), NaN kept."""
    poses = np.where(np.isfinite(R[:, :1, :1]), np.eye(4), np.nan)
    poses[:, :3, :3] = R
    return poses


def interpolated(world_from_cam: np.ndarray) -> np.ndarray:
    """Poses (F,4,4) with NaN where unknown -> all known: between known ones rotations on SO(3) and centres in a line at
    constant speed, before the first and after the last the nearest one."""
    known = np.flatnonzero(bundle.is_registered(world_from_cam))
    out = world_from_cam.copy()
    out[: known[0]], out[known[-1] + 1 :] = out[known[0]], out[known[-1]]
    for a, b in zip(known[:-1], known[1:], strict=True):
        turn = Rotation.from_matrix(out[a, :3, :3].T @ out[b, :3, :3]).as_rotvec()
        for f in range(a + 1, b):
            s = (f - a) / (b - a)
            out[f] = np.eye(4)
            out[f, :3, :3] = out[a, :3, :3] @ Rotation.from_rotvec(s * turn).as_matrix()
            out[f, :3, 3] = (1 - s) * out[a, :3, 3] + s * out[b, :3, 3]
    return out
