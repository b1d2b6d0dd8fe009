"""Does the camera stand still? Patches of the background, looked for again in neighbouring and in far frames.

A patch found where it was votes for a camera that stood still between the two frames. Things move in front of a static
camera as well, but not all together: what speaks against it is one common motion that explains more patches than rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

SIDES = (480, 240, 120)  # the longer side of the tested frames; smaller where texture is weak: noise is averaged away
TOLERANCE = 1.0  # pixels of the tested frames that a patch may seem to move by without having moved
EXACT = 0.15  # pixels that noise may shift a patch by
ENOUGH = 8  # patches that a pair of frames needs to be judged
CELLS = 12  # along the longer side; one patch a cell, so that one busy thing is not the background
EXPLAINED = 0.2  # share of patches that rest or a common motion must explain, for a pair to have a vote
RATIO = 0.6  # patches that rest / patches that the best common motion explains, from which a frame is at rest
BLUR = 1.2


@dataclass(frozen=True)
class Stillness:
    """What pairs of frames say."""

    still: bool | None  # None: too little background to tell
    share: float  # of the frames that are at rest against far ones and their neighbours
    evidence: str  # one sentence


def judge_stillness(frames: np.ndarray, background: np.ndarray, tick=lambda share: None) -> Stillness:
    """frames (F,H,W,3) uint8; background (F,H,W) bool, pixels that belong to no moving body."""
    for side in SIDES:
        pairs, stay, best, moved, tried = _vote(frames, background, side, tick)
        if len(pairs) >= 0.3 * tried:
            break
    else:
        return Stillness(None, 0.0, "too little texture in the background to tell whether the camera moves")
    far, says = pairs[:, 1] - pairs[:, 0] != 1, best >= EXPLAINED
    rest = []
    for kind in (far, ~far):  # a slow drift shows over long baselines only, a jolt between neighbours too
        for b in np.unique(pairs[kind & says, 1]):
            mine = kind & says & (pairs[:, 1] == b)
            rest.append(stay[mine].sum() / best[mine].sum() >= RATIO)
    if len(rest) < 0.15 * len(np.unique(pairs[:, 1])):
        return Stillness(None, 0.0, "too little of the background is seen again to tell whether the camera moves")
    share = float(np.mean(rest))
    typical = np.median(moved[far & says] if (far & says).any() else moved[says])
    text = (
        f"{100 * stay[says].sum() / best[says].sum():.0f} % of the background patches that share a motion are at rest, "
        f"over {int((far & says).sum())} far and {int((~far & says).sum())} neighbouring pairs of frames "
        f"(median motion of these {typical:.1f} pixels)"
    )
    return Stillness(share >= 0.95, share, text)


def _vote(frames: np.ndarray, background: np.ndarray, side: int, tick) -> tuple:
    """Pairs of frames (P,2), shares of their patches at rest (P,) and in the best common motion (P,), its median length
    (P,) in pixels of `frames`, and how many pairs were tried."""
    scale = min(1.0, side / max(frames.shape[1:3]))
    pick = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), 90)).round().astype(int))
    grey = [cv2.cvtColor(_shrunk(frames[i], scale), cv2.COLOR_RGB2GRAY) for i in pick]
    mask = [_shrunk(background[i].astype(np.uint8), scale) > 0 for i in pick]
    plain = [cv2.GaussianBlur(g, (0, 0), BLUR) for g in grey]
    noise = _noise(grey, mask)
    last = len(pick) - 1
    far = [(a, b) for a in sorted({0, last // 3, 2 * last // 3, last}) for b in range(last + 1) if abs(a - b) > 1]
    tried = [(i, i + 1) for i in range(last)] + far
    corners: dict[int, np.ndarray] = {}
    pairs, votes = [], []
    for k, (a, b) in enumerate(tried):
        if a not in corners:
            corners[a] = _corners(plain[a], mask[a], noise)
        xy, d = _displacement(plain[a], plain[b], corners[a], mask[b])
        if len(d) >= ENOUGH:
            pairs.append((pick[a], pick[b]) if b - a != 1 else (pick[b] - 1, pick[b]))
            votes.append(_common(xy, d))
        tick((k + 1) / len(tried))
    stay, best, moved = np.array(votes).reshape(-1, 3).T
    return np.array(pairs, int).reshape(-1, 2), stay, best, moved / scale, len(tried)


def _shrunk(image: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1.0:
        return image
    return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _noise(grey: list[np.ndarray], mask: list[np.ndarray]) -> float:
    """Standard deviation of the blurred background's noise, grey levels.

    The lesser of two estimates: what neighbours differ by, which motion raises, and what single pixels differ by from a
    plane through their neighbours (Immerkaer, CVIU 1996), which texture raises. Quiet parts count: a low percentile.
    """
    change, rough = [], []
    kernel = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
    for k in np.unique(np.linspace(0, len(grey) - 2, 8).round().astype(int)):
        both = mask[k] & mask[k + 1]
        if both.any():
            a, b = (g.astype(np.float32) for g in (grey[k], grey[k + 1]))
            change.append(np.percentile(np.abs(a - b)[both], 40) / (0.524 * np.sqrt(2)))
            rough.append(np.percentile(np.abs(cv2.filter2D(a, -1, kernel))[both], 40) / (0.524 * 6))
    raw = min(np.median(change), np.median(rough)) if change else 0.0
    return float(raw / (2 * np.sqrt(np.pi) * BLUR) + 0.15)  # and rounding


def _corners(grey: np.ndarray, mask: np.ndarray, noise: float) -> np.ndarray:
    """(N,2) the best corner of every cell of the background, where noise shifts a patch by less than `EXACT`."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((9, 9), np.uint8))
    inner[:8] = inner[-8:] = 0
    inner[:, :8] = inner[:, -8:] = 0
    # the sum of the patch's squared gradient in its weakest direction (OpenCV gives four times its mean); a shift's
    # standard deviation is noise / sqrt(sum), and 4 times that as blur has made about 16 neighbours' noise one
    weakest = cv2.cornerMinEigenVal(grey.astype(np.float32), 15, 3) * (15**2 / 4)
    inner[weakest < (4 * noise / EXACT) ** 2] = 0
    c = cv2.goodFeaturesToTrack(grey, 1000, 1e-4, 7, mask=inner, blockSize=7) if inner.any() else None
    if c is None:
        return np.zeros((0, 2), np.float32)
    c = c.reshape(-1, 2)  # best first
    cell = (c // (max(grey.shape) / CELLS)).astype(int)
    _, first = np.unique(cell[:, 0] * 1000 + cell[:, 1], return_index=True)
    return c[first]


def _displacement(a: np.ndarray, b: np.ndarray, xy: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,2) the patches' places in `a`, and (M,2) how far from there they lie in `b`, infinite where not found.

    Pyramidal Lucas-Kanade, forward and backward (Bouguet, 2001).
    """
    at = np.round(xy).astype(int)
    xy = xy[mask[at[:, 1], at[:, 0]]] if len(xy) else xy  # covered ones say nothing
    if len(xy) < ENOUGH:
        return xy[:0], np.zeros((0, 2))
    lk = {"winSize": (21, 21), "maxLevel": 3, "minEigThreshold": 1e-5}
    to, ok, _ = cv2.calcOpticalFlowPyrLK(a, b, xy[:, None], None, **lk)
    back, ok2, _ = cv2.calcOpticalFlowPyrLK(b, a, to, None, **lk)
    good = (ok[:, 0] > 0) & (ok2[:, 0] > 0) & (np.linalg.norm((back - xy[:, None])[:, 0], axis=1) < 1.0)
    d = (to[:, 0] - xy).astype(float)
    d[~good] = np.inf
    return xy, d


def _common(xy: np.ndarray, d: np.ndarray) -> tuple[float, float, float]:
    """Share of the patches at rest, the share that the best common motion (rest or a homography) explains, its median
    length in pixels."""
    length = np.linalg.norm(d, axis=1)
    rest = length < TOLERANCE
    best = rest
    found = np.isfinite(length)
    if found.sum() >= 6:
        cv2.setRNGSeed(0)
        h, inlier = cv2.findHomography(xy[found], (xy + d)[found], cv2.RANSAC, TOLERANCE, maxIters=300)
        if h is not None and inlier.sum() > rest.sum() + 2:  # eight numbers fit four patches by themselves
            best = np.zeros(len(d), bool)
            best[found] = inlier[:, 0] > 0
    return float(rest.mean()), float(best.mean()), float(np.median(length[best])) if best.any() else 0.0
