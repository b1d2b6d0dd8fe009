"""Loops closed by dense flow: frames far apart in time that show the object from nearly the same side.

What is followed from frame to frame drifts, and few descriptors find each other again on a plain or shiny thing. The
poses found so far tell which frames look alike, and an affine map takes one onto the other; what DIS flow then finds is
as dense and exact as between neighbours. A pair counts where one pose, near the one known, explains most of it.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

from ..parallel import each
from ._sfm_bundle import PIXELS, Tracks, errors, is_registered
from ._sfm_flow import pair_flow
from ._sfm_refine import pnp

APART = 7  # frames
WIDEST = np.radians(25.0)  # between the directions from which two frames see the object
PARTNERS = 2  # per frame
ERROR = 0.6  # pixels, there and back
OFF = 20.0  # pixels from where the poses put it, at most
TURNED = np.radians(20.0)  # between a frame's pose and the one its partner gives it, at most
LEAST, SHARE = 20, 0.4  # matches that one pose must explain


def far_pairs(poses: np.ndarray, middle: np.ndarray) -> list[tuple[int, int]]:
    """Frames (i, j), `APART` or more apart, that see the object from nearly the same side: each with its nearest."""
    here = np.flatnonzero(is_registered(poses))
    ray = -np.einsum("fji,fj->fi", poses[here, :3, :3], poses[here, :3, 3]) - middle
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    angle = np.arccos(np.clip(ray @ ray.T, -1, 1))
    angle[np.abs(here[:, None] - here) < APART] = np.inf
    nearest = np.argsort(angle, axis=1, kind="stable")[:, :PARTNERS]
    found = {(int(here[a]), int(here[b])) for a in range(len(here)) for b in nearest[a] if angle[a, b] < WIDEST}
    return sorted(found)


def close_by_flow(
    grey: np.ndarray, masks: np.ndarray, K: np.ndarray, poses: np.ndarray, X: np.ndarray, t: Tracks
) -> tuple[Tracks, int]:
    """`t` with points (P,3) of `X` seen in frames far from those that made them, and how many were added.

    grey (F,H,W) uint8, masks (F,H,W) bool.
    """
    if not np.isfinite(X).any():
        return t, 0
    c = np.array([K[0, 2], K[1, 2]])
    f = np.array([K[0, 0], K[1, 1]])
    pairs = far_pairs(poses, np.nanmedian(X, axis=0))
    rows = [np.flatnonzero((t.frame == i) & np.isfinite(X[t.track, 0])) for i in range(t.frames)]

    def look(pair: tuple[int, int]):
        i, j = pair
        at = rows[i]
        cam = X[t.track[at]] @ poses[j, :3, :3].T + poses[j, :3, 3]
        at, cam = at[cam[:, 2] > 0], cam[cam[:, 2] > 0]
        if len(at) < LEAST:
            return None
        p, q = t.x[at] * f + c, cam[:, :2] / cam[:, 2:] * f + c
        cv2.setRNGSeed(0)
        M, _ = cv2.estimateAffine2D(p - 0.5, q - 0.5, method=cv2.RANSAC, ransacReprojThreshold=6.0)
        if M is None or not 0.2 < abs(np.linalg.det(M[:, :2])) < 5:
            return None
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = grey.shape[:0:-1]
        warped = cv2.warpAffine(grey[j], M, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        there = cv2.warpAffine(masks[j].astype(np.uint8), M, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP) > 0
        flow = pair_flow(grey[i], warped, masks[i], there)
        if flow is None:
            return None
        r, error = flow(p)
        seen = np.clip(r.astype(int), 0, [size[0] - 1, size[1] - 1])
        r = (r - 0.5) @ M[:, :2].T + M[:, 2] + 0.5
        ok = (error < ERROR) & there[seen[:, 1], seen[:, 0]] & (np.linalg.norm(r - q, axis=1) < OFF)
        at, x = at[ok], (r[ok] - c) / f
        got = pnp(X[t.track[at]], x, t.focal, 1000 * i + j) if len(at) >= LEAST else None
        if got is None or got[1] < LEAST or got[2] < SHARE:
            return None
        turn = Rotation.from_matrix(got[0][:3, :3] @ poses[j, :3, :3].T).magnitude()
        if turn > TURNED:
            return None
        fit = errors(np.broadcast_to(got[0], (len(at), 4, 4)), X[t.track[at]], x, t.focal)[0] < PIXELS
        return t.track[at[fit]], np.full(int(fit.sum()), j), x[fit]

    found = [s for s in each(look, pairs) if s is not None]
    if not found:
        return t, 0
    track, frame, x = (np.concatenate(k) for k in zip(*found, strict=True))
    key = frame * t.count + track
    new = ~np.isin(key, t.frame * t.count + t.track)
    _, first = np.unique(key[new], return_index=True)
    pick = np.flatnonzero(new)[np.sort(first)]
    more = {"frame": np.r_[t.frame, frame[pick]], "track": np.r_[t.track, track[pick]], "x": np.r_[t.x, x[pick]]}
    return replace(t, **more), len(pick)
