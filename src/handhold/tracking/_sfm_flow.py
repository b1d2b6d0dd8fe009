"""Dense optical flow on masked crops, and tracks chained from it: matches where SIFT finds none (blur, gloss, paint).

DIS flow (Kroeger et al., ECCV 2016) twice: once plainly, then again after an affine warp fitted to the first, because a
hand turns an object by 8 to 15 degrees between frames, which is more than a patch search forgives (measured on real
footage: neighbour rotations 3.9 degrees off at the median, against 7.5 for one plain pass). Pixels, centres at +0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

MARGIN = 24  # pixels around the masks that the flow sees
UPSAMPLE = 2  # the object is small: flow on a doubled image is twice as exact


@dataclass(frozen=True)
class PairFlow:
    """Flow from one frame to another and back, on the same crop of both."""

    corner: np.ndarray  # (2,) crop's top left, pixels
    forward: np.ndarray  # (h*s,w*s,2) float32, upsampled pixels
    backward: np.ndarray

    def __call__(self, xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points (N,2) of the first frame -> the same in the second (N,2), and forward-backward error (N,), pixels."""
        p = (xy - self.corner) * UPSAMPLE
        q = p + _sample(self.forward, p)
        back = q + _sample(self.backward, q)
        return q / UPSAMPLE + self.corner, np.linalg.norm(back - p, axis=1) / UPSAMPLE

    def reversed(self) -> PairFlow:
        return PairFlow(self.corner, self.backward, self.forward)


def _sample(image: np.ndarray, xy: np.ndarray) -> np.ndarray:
    x, y = (np.ascontiguousarray(xy[:, k] - 0.5, np.float32) for k in (0, 1))
    if not len(x):
        return np.zeros((0, image.shape[2]), np.float32)
    # remap refuses more than 32767 rows, so the points go in as a matrix
    n, cols = len(x), 1024
    pad = -n % cols
    x, y = np.pad(x, (0, pad)).reshape(-1, cols), np.pad(y, (0, pad)).reshape(-1, cols)
    return cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).reshape(n + pad, -1)[:n]


def pair_flow(grey_a: np.ndarray, grey_b: np.ndarray, mask_a: np.ndarray, mask_b: np.ndarray) -> PairFlow | None:
    """Flow both ways between two grey frames (H,W) uint8 inside their masks; None when a mask is empty."""
    if not mask_a.any() or not mask_b.any():
        return None
    y, x = np.nonzero(mask_a | mask_b)
    x0, y0 = max(x.min() - MARGIN, 0), max(y.min() - MARGIN, 0)
    box = np.s_[y0 : y.max() + MARGIN + 1, x0 : x.max() + MARGIN + 1]
    up = {"dsize": None, "fx": UPSAMPLE, "fy": UPSAMPLE}
    a, b = (cv2.resize(g[box], **up, interpolation=cv2.INTER_CUBIC) for g in (grey_a, grey_b))
    ma, mb = (cv2.resize(m[box].astype(np.uint8), **up, interpolation=cv2.INTER_NEAREST) > 0 for m in (mask_a, mask_b))
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    forward, backward = dis.calc(a, b, None), dis.calc(b, a, None)
    pair = PairFlow(
        np.array([x0, y0], float),
        _affine_second_pass(dis, a, b, ma, forward, backward),
        _affine_second_pass(dis, b, a, mb, backward, forward),
    )
    return pair


def _affine_second_pass(dis, a, b, mask, forward, backward) -> np.ndarray:
    """Warp `b` onto `a` by the affine map that most of the flow agrees with, and let DIS find only what is left."""
    y, x = np.nonzero(mask)
    step = max(1, len(x) // 1500)
    p = np.stack([x[::step], y[::step]], 1) + 0.5
    q = p + _sample(forward, p)
    ok = np.linalg.norm(q + _sample(backward, q) - p, axis=1) < 1.5
    if ok.sum() < 20:
        return forward
    cv2.setRNGSeed(0)
    m, _ = cv2.estimateAffine2D(p[ok], q[ok], method=cv2.RANSAC, ransacReprojThreshold=4.0)
    if m is None:
        return forward
    centre = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # warpAffine counts pixel centres from 0
    w = np.linalg.inv(centre) @ np.vstack([m, [0, 0, 1]]) @ centre
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(b, w[:2], a.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
    rest = dis.calc(a, warped, None)
    gy, gx = np.mgrid[: a.shape[0], : a.shape[1]].astype(np.float32) + 0.5
    grid = np.stack([gx, gy], -1)
    return ((grid + rest) @ m[:, :2].T + m[:, 2] - grid).astype(np.float32)


def flow_tracks(
    grey: np.ndarray,
    masks: np.ndarray,
    spacing: float = 5.0,
    longest: int = 12,
    max_error: float = 0.6,
    tick=lambda share: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Corners followed through time by chained flow, each step checked forward and backward.

    grey (F,H,W) uint8, masks (F,H,W) bool. `longest` bounds the drift. Returns (N,2) int (frame, track), (N,2) px.
    """
    rows, points, count = [], [], 0
    live = np.zeros((0, 2))
    ids, age = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for f in range(len(grey)):
        inner = cv2.erode(masks[f].astype(np.uint8), np.ones((5, 5), np.uint8))
        free = inner.copy()
        for x, y in live[:, :2]:
            cv2.circle(free, (int(x), int(y)), int(spacing) - 1, 0, -1)
        new = _corners(grey[f], free, spacing)
        live = np.concatenate([live, new])
        ids = np.concatenate([ids, count + np.arange(len(new))])
        age = np.concatenate([age, np.zeros(len(new), np.int64)])
        count += len(new)
        rows.append(np.stack([np.full(len(ids), f), ids], 1))
        points.append(live)
        flow = pair_flow(grey[f], grey[f + 1], masks[f], masks[f + 1]) if f + 1 < len(grey) else None
        if flow is None:
            live, ids, age = live[:0], ids[:0], age[:0]
            continue
        moved, error = flow(live)
        h, w = masks.shape[1:]
        ij = moved.astype(int)
        ok = (error < max_error) & (ij >= 0).all(1) & (ij[:, 0] < w) & (ij[:, 1] < h) & (age + 1 < longest)
        ok[ok] = masks[f + 1][ij[ok, 1], ij[ok, 0]]
        live, ids, age = moved[ok], ids[ok], age[ok] + 1
        tick((f + 1) / len(grey))
    rows, points = np.concatenate(rows), np.concatenate(points)
    long = np.bincount(rows[:, 1], minlength=count) > 1 if count else np.zeros(0, bool)
    keep = long[rows[:, 1]]
    rows, points = rows[keep], points[keep]
    rows[:, 1] = np.cumsum(long)[rows[:, 1]] - 1
    return rows, points


def _corners(grey: np.ndarray, where: np.ndarray, spacing: float) -> np.ndarray:
    """Shi-Tomasi corners where allowed, with a low bar: on plain paint a weak corner is better than none."""
    c = cv2.goodFeaturesToTrack(grey, 1500, 0.003, spacing, mask=where, blockSize=5) if where.any() else None
    return np.zeros((0, 2)) if c is None else c.reshape(-1, 2).astype(float) + 0.5
