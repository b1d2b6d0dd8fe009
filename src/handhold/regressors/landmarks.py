"""21 hand landmarks per frame, for at most two hands, over a whole clip.

MediaPipe's networks (`regressors.mediapipe`) were made for bare hands in one image; a hand around an object is often
missed or misread, and the network's own "presence" does not tell. So each frame is looked at in many ways (turned
images, the neighbours' ROIs in both time directions), and each candidate is read again through several jittered and
mirrored ROIs: their median is the answer and their *spread* is the confidence, which tells a good reading from a bad
one far better than presence does. Readings are then joined into tracks over the clip; handedness is one decision per
track. No temporal smoothing is done here: the hand fitter does that with a model.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import StageFailed
from ..parallel import each
from ..scene import SIDES, Landmarks
from .landmark_files import load_landmarks, save_landmarks
from .mediapipe import HandDetection, HandLandmarker, Roi, image_pyramid, roi_from_palm, roi_from_points

__all__ = [
    "HandDetection",
    "HandLandmarker",
    "Reading",
    "Roi",
    "find_hands",
    "load_landmarks",
    "require_hands",
    "save_landmarks",
    "track_landmarks",
]

# (shift x, shift y, scale, turn, mirrored) of the ROIs of one reading: shares of the ROI's side, radians.
_JITTER = (
    (0.0, 0.0, 1.0, 0.0, False),
    (0.0, 0.0, 1.0, 0.0, True),
    (0.04, 0.0, 0.9, 0.2, False),
    (-0.04, 0.0, 1.15, -0.2, True),
    (0.0, 0.05, 1.15, 0.35, True),
    (0.0, -0.05, 0.9, -0.35, False),
    (0.03, 0.03, 1.3, 0.0, False),
    (-0.03, -0.03, 0.8, 0.0, True),
)
# Where a hand may have gone since the neighbouring frame: (shift x, shift y, scale, turn).
_NEAR = tuple((0.0, 0.0, s, t) for t in (0.0, 0.25, -0.25, 0.5, -0.5) for s in (1.0, 0.8, 1.25))
_SAME = 0.15  # candidates nearer than this (median joint distance, hand sizes) are one reading
# Prices, in confidence: of moving by a hand's size (or growing by a factor e) beyond what is usual from frame to frame,
# and of a leap, which is a move that nothing else in the clip is like.
_JUMP, _LEAP = 0.5, 4.0
_GONE = 0.05  # readings below this confidence say nothing


# Measured on seven rendered clips (127 good readings), truth of the open hand model less landmarks, as shares of
# `Reading.size`. Median error of each joint: the wrist and the thumb are weak when an object is held. And the mean
# shift along wrist -> middle knuckle, in the image: the model's knuckles lie further towards the fingers in every clip
# (index 0.04..0.12, others 0.03..0.08); the wrist's shift differs in sign between clips, so there is none to correct.
JOINT_ERROR = np.array(
    [0.11, 0.09, 0.09, 0.16, 0.27, 0.09, 0.05, 0.05, 0.05, 0.05, 0.04, 0.04, 0.06, 0.04, 0.06, 0.06, 0.05]
    + [0.05, 0.04, 0.06, 0.06],
    np.float32,
)
KNUCKLE_SHIFT = {5: 0.08, 9: 0.05, 13: 0.04, 17: 0.04}


@dataclass(frozen=True)
class Reading:
    """One hand in one frame: the median over several looks at it."""

    points: np.ndarray  # (21,2) pixels
    points3d: np.ndarray  # (21,3) metres of a generic hand, camera-aligned axes
    spread: np.ndarray  # (21,) median distance of the looks from `points`, hand sizes
    presence: float
    right: float
    confidence: float  # probability that the median joint error is below 12 % of the hand's size

    @property
    def size(self) -> float:
        """Side of the box around the hand, pixels (half of its ROI)."""
        return roi_from_points(self.points).size / 2


def spread_confidence(spread: float, presence: float) -> float:
    """Probability that a reading is good (median joint error < 12 % of hand size) from its looks' median spread.

    Logistic in log(spread); fitted on 430 readings of eight clips with truth, where it is calibrated within 0.08 when
    each clip is left out in turn (area under the ROC curve 0.91; mean presence alone reaches 0.86 and adds nothing to
    it).
    """
    p = 1 / (1 + np.exp(11.9 + 4.04 * np.log(spread + 0.005)))
    return float(p * np.clip((presence - 0.2) / 0.3, 0, 1))


def consensus(landmarker: HandLandmarker, pyramid: list[np.ndarray], points: np.ndarray) -> Reading:
    """Read the hand near (21,2) landmarks through `_JITTER`ed ROIs and take the median."""
    roi = roi_from_points(points)
    looks = [landmarker.read(pyramid, roi.jittered((sx, sy), sc, t), m) for sx, sy, sc, t, m in _JITTER]
    xy = np.array([d.points for d in looks])
    mid = np.median(xy, 0)
    size = roi_from_points(mid).size / 2
    off = np.linalg.norm(xy - mid, axis=-1) / size
    presence = float(np.mean([d.presence for d in looks]))
    c = spread_confidence(float(np.median(off)), presence)
    right = float(np.mean([d.right for d in looks]))
    return Reading(mid, np.median([d.points3d for d in looks], 0), np.median(off, 0), presence, right, c)


def _follow(
    landmarker: HandLandmarker, pyramid: list[np.ndarray], roi: Roi, steps: int, presence: float
) -> list[HandDetection]:
    """Read through an ROI, then through the ROI of the answer, while there is a hand."""
    out: list[HandDetection] = []
    for _ in range(steps):
        d = landmarker.read(pyramid, roi)
        if d.presence < presence or not np.isfinite(d.points).all():
            break
        out.append(d)
        roi = roi_from_points(d.points)
    return out


def _merge(
    landmarker: HandLandmarker, pyramid: list[np.ndarray], found: list[HandDetection], limit: int = 4
) -> list[Reading]:
    """Group candidates that say the same, read each group's median again, and keep what is distinct, best first."""
    found, out = sorted(found, key=lambda d: -d.presence), []
    while found and len(out) < limit:
        near = [_apart(d.points, found[0].points) < _SAME for d in found]
        near[0] = True
        group = [d.points for d, same in zip(found, near, strict=True) if same]
        found = [d for d, same in zip(found, near, strict=True) if not same]
        out.append(consensus(landmarker, pyramid, np.median(group, 0)))
    return _distinct(out)


def _distinct(readings: Iterable[Reading]) -> list[Reading]:
    out: list[Reading] = []
    for r in sorted(readings, key=lambda r: -r.confidence):
        if r.confidence > _GONE / 5 and all(_apart(r.points, o.points) > _SAME for o in out):
            out.append(r)
    return out


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Median joint distance in hand sizes."""
    return float(np.median(np.linalg.norm(a - b, axis=-1)) / (roi_from_points(b).size / 2 + 1e-9))


def find_hands(landmarker: HandLandmarker, image: np.ndarray, window: Roi | None = None) -> list[Reading]:
    """Readings of all hands in one image (H,W,3) uint8 RGB, best first.

    Palms are sought in four turned copies of the image (and of a window of it, where one is given), and in four more
    when these show no sure hand: the palm detector is not invariant to rotation.
    """
    pyramid = image_pyramid(image)
    rois: list[Roi] = []
    found: list[HandDetection] = []
    for first in (0.0, np.pi / 4):
        new = []
        for turn in first + np.arange(4) * np.pi / 2:
            for view in (None, window) if window else (None,):
                for p in landmarker.palms(pyramid, float(turn), 0.2, view):
                    roi = roi_from_palm(p)
                    if not any(_same_roi(roi, o) for o in rois + new):
                        new.append(roi)
        rois += new
        found += [d for r in new for d in _follow(landmarker, pyramid, r, 3, presence=0.3)]
        readings = _merge(landmarker, pyramid, found)
        if readings and readings[0].confidence > 0.8:
            break
    return readings


def _window(foreground: np.ndarray) -> Roi | None:
    """A square around what moves, where looking closer than at the whole image is worth it. foreground: (H,W) bool."""
    y, x = np.nonzero(foreground)
    if len(x) < 50:
        return None
    (x0, x1), (y0, y1) = np.percentile(x, [1, 99]), np.percentile(y, [1, 99])
    side = 1.2 * max(x1 - x0, y1 - y0)
    return (
        Roi(np.array([x0 + x1 + 1, y0 + y1 + 1]) / 2, float(side), 0.0) if side < 0.6 * max(foreground.shape) else None
    )


def _same_roi(a: Roi, b: Roi) -> bool:
    """Too alike to be worth two looks, as what is found is read again through several ROIs anyway."""
    turn = abs((a.angle - b.angle + np.pi) % (2 * np.pi) - np.pi)
    return bool(
        np.linalg.norm(a.center - b.center) < 0.06 * b.size and turn < 0.12 and abs(np.log(a.size / b.size)) < 0.12
    )


def _find_near(landmarker: HandLandmarker, pyramid: list[np.ndarray], hint: np.ndarray) -> list[Reading]:
    """Readings near (21,2) landmarks taken from a neighbouring frame."""
    roi = roi_from_points(hint)

    def look(near: tuple[float, ...]) -> list[HandDetection]:
        sx, sy, sc, t = near
        return _follow(landmarker, pyramid, roi.jittered((sx, sy), sc, t), 2, presence=0.3)

    return _merge(landmarker, pyramid, list(itertools.chain(*each(look, _NEAR))), limit=2)


def _sweep(landmarker: HandLandmarker, pyramids, readings: list[list[Reading]], step: int) -> None:
    """Carry hands from frame to frame in one time direction into frames where nothing sure is near; in place."""
    order = range(len(readings))[:: 1 if step > 0 else -1]
    for i in list(order)[1:]:
        for r in [r for r in readings[i - step] if r.confidence > 0.15]:
            near = [q for q in readings[i] if np.linalg.norm(q.points.mean(0) - r.points.mean(0)) < r.size]
            if any(q.confidence > 0.7 for q in near):
                continue
            readings[i] = _distinct(readings[i] + _find_near(landmarker, pyramids(i), r.points))[:5]


def _for_side(readings: list[list[Reading]], side: str) -> list[list[Reading]]:
    """Readings as evidence for one side. Those that see the other hand are this one's mirror readings: wrong."""
    out = []
    for rs in readings:
        p = [r.right if side == "right" else 1 - r.right for r in rs]
        seen = [
            replace(r, confidence=r.confidence * float(np.clip((q - 0.2) / 0.4, 0, 1)))
            for r, q in zip(rs, p, strict=True)
        ]
        out.append([r for r in seen if r.confidence > _GONE])
    return out


def _best_track(readings: list[list[Reading]], gap_limit: int = 40) -> list[Reading | None]:
    """The chain of readings (None: none in that frame) with the most confidence, less the price of teleports and of
    jumps of size between readings that follow each other. Solved exactly, by dynamic programming."""
    nodes = [(i, r) for i, rs in enumerate(readings) for r in rs]
    out: list[Reading | None] = [None] * len(readings)
    if not nodes:
        return out
    frame = np.array([i for i, _ in nodes])
    place = np.array([np.median(r.points, 0) for _, r in nodes])
    size = np.array([r.size for _, r in nodes])
    score = np.array([r.confidence for _, r in nodes])
    back = np.full(len(nodes), -1)
    usual = []
    for n in range(len(nodes)):
        following = place[frame == frame[n] + 1]
        if len(following):
            usual.append(np.linalg.norm(following - place[n], axis=-1).min() / size[n])
    leap = max(0.8, 3 * float(np.median(usual))) if usual else 0.8
    for n in range(len(nodes)):
        m = np.flatnonzero((frame[:n] < frame[n]) & (frame[:n] >= frame[n] - gap_limit))
        if not len(m):
            continue
        gap = frame[n] - frame[m]
        slack = np.sqrt(gap)
        move = np.linalg.norm(place[m] - place[n], axis=-1) / (size[m] + size[n]) * 2 / slack
        grow = np.abs(np.log(size[m] / size[n])) / slack
        price = np.minimum(_JUMP * np.maximum(move - 0.3, 0) + _JUMP * np.maximum(grow - 0.2, 0), 3.0)
        gain = score[m] - price - _LEAP * ((gap <= 6) & (move * slack > leap * gap**0.25))
        if gain.max() > 0:
            score[n] += gain.max()
            back[n] = m[np.argmax(gain)]
    at = int(np.argmax(score))
    while at >= 0:
        out[frame[at]] = nodes[at][1]
        at = back[at]
    return out


def _elsewhere(readings: list[list[Reading]], track: list[Reading | None], reach: int = 4) -> list[list[Reading]]:
    """Readings that are not of the hand of `track`; its place is interpolated over up to `reach` frames without it."""
    at = [i for i, t in enumerate(track) if t is not None]
    out = []
    for i, rs in enumerate(readings):
        near = [min((j for j in at if j <= i), key=lambda j: i - j, default=None)]
        near += [min((j for j in at if j >= i), key=lambda j: j - i, default=None)]
        near = [j for j in near if j is not None and abs(j - i) <= reach]
        if near:
            w = np.array([1 / (abs(j - i) + 1e-6) for j in near])
            place = np.average([track[j].points.mean(0) for j in near], axis=0, weights=w)
            size = np.average([track[j].size for j in near], weights=w)
            rs = [r for r in rs if np.linalg.norm(r.points.mean(0) - place) > 0.4 * size]
        out.append(rs)
    return out


def _tracks(readings: list[list[Reading]], sides: tuple[str, ...] | None) -> dict[str, list[Reading | None]]:
    """One chain of readings for each hand. Handedness is decided over the whole clip: the side with more evidence takes
    its readings first, and the other must be seen for long enough elsewhere, or have been asked for."""
    by_side = {s: _for_side(readings, s) for s in sides or SIDES}
    tracks = {s: _best_track(rs) for s, rs in by_side.items()}
    weight = {s: sum(r.confidence for r in t if r) for s, t in tracks.items()}
    order = sorted(tracks, key=lambda s: -weight[s])
    if len(order) > 1:
        second = _best_track(_elsewhere(by_side[order[1]], tracks[order[0]]))
        sure = sum(r.confidence > 0.5 for r in second if r)
        tracks[order[1]] = second if sure >= (1 if sides else max(3, 0.06 * len(readings))) else [None] * len(readings)
    return {s: tracks[s] for s in SIDES if s in tracks and any(tracks[s])}


def track_landmarks(
    frames: np.ndarray,
    landmarker: HandLandmarker,
    sides: tuple[str, ...] | None = None,
    foreground: np.ndarray | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Landmarks]:
    """Landmarks of the hands in a clip.

    frames: (F,H,W,3) uint8 RGB. landmarker: called from several threads at once. sides: the hands that are there, e.g.
    ("right",); None to decide from the clip.
    foreground: (F,H,W) bool, what moves, to look closer at where it is small, or None. progress: called with the share
    done. Returns Landmarks by side, only sides that were found; frames without a hand are NaN with confidence 0.
    Confidence is the probability that the frame's median joint error is below 12 % of the hand's size.
    """
    tell = progress or (lambda _: None)
    n = len(frames)

    def find(i: int) -> list[Reading]:
        return find_hands(landmarker, frames[i], None if foreground is None else _window(foreground[i]))

    readings = each(find, range(n), tick=lambda done: tell(0.6 * done / n))
    _sweep(landmarker, lambda i: image_pyramid(frames[i]), readings, 1)
    tell(0.8)
    _sweep(landmarker, lambda i: image_pyramid(frames[i]), readings, -1)
    tell(1.0)
    return _as_landmarks(_tracks(readings, sides), n)


def _as_landmarks(tracks: dict[str, list[Reading | None]], n: int) -> dict[str, Landmarks]:
    out = {}
    for side, track in tracks.items():
        p, q = np.full((n, 21, 2), np.nan, np.float32), np.full((n, 21, 3), np.nan, np.float32)
        c = np.zeros(n, np.float32)
        for i, r in enumerate(track):
            if r is not None:
                p[i], q[i], c[i] = r.points, r.points3d, r.confidence
        if c.any():
            out[side] = Landmarks(p, q, c, "mediapipe")
    return out


def require_hands(found: dict[str, Landmarks], source: str | os.PathLike = "the clip") -> dict[str, Landmarks]:
    """`found` as it is, or StageFailed when it holds no hand at all."""
    if not any((lm.confidence > 0).any() for lm in found.values()):
        raise StageFailed(
            f"No hand was found in {source}: check that one is in view, or give landmarks with --joints FILE."
        )
    return found
