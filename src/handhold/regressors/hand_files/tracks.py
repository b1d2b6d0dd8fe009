"""Detections of single frames to one hand per side: tracks by continuity, sides by one vote of each track.

Detectors call one hand right in one frame and left in the next. A hand does not change sides, so detections are first
joined into tracks by where they are, and each track then takes the side most of its weight speaks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from ...scene import SIDES, Landmarks

_GATE = 0.8  # hand sizes: the farthest a hand goes from one frame to the next
_GAP = 12  # frames that a track may be without a detection
_TWICE = 0.2  # hand sizes: two detections of one frame nearer than this are the same hand
_WRONG_SIDE = 0.5  # what is left of the confidence of a detection that was read as the other hand
_BRIEF = 0.06  # share of the clip, and at least 3 frames, that a second hand must be seen for


@dataclass(frozen=True)
class Detection:
    """One hand in one frame, as a tool saw it."""

    frame: int  # row of the clip
    points: np.ndarray  # (21,2) pixels, OpenPose order; NaN where not found
    points3d: np.ndarray  # (21,3) metres up to a similarity, axes as the camera's; NaN where not known
    right: float  # in [0,1]: 1 where the tool says right, 0 for left
    confidence: float = 1.0  # in [0,1]

    @property
    def size(self) -> float:
        """Longer side of the box around the points, pixels."""
        return max(float(np.nanmax(np.ptp(self.points[np.isfinite(self.points).all(1)], axis=0))), 1.0)


@dataclass
class _Track:
    seen: list[Detection] = field(default_factory=list)

    @property
    def vote(self) -> float:
        """Positive for a right hand: its weight for right less that for left."""
        return sum(d.confidence * (2 * d.right - 1) for d in self.seen)

    @property
    def weight(self) -> float:
        return sum(d.confidence for d in self.seen)

    def frames(self) -> set[int]:
        return {d.frame for d in self.seen}

    def expected(self, frame: int) -> np.ndarray:
        """(21,2): where the last points go at the pace of the last two frames."""
        last = self.seen[-1]
        if len(self.seen) < 2 or last.frame - self.seen[-2].frame > 2 or frame - last.frame > 3:
            return last.points
        move = _middle(last.points) - _middle(self.seen[-2].points)
        return last.points + move * (frame - last.frame) / (last.frame - self.seen[-2].frame)


def join(detections: Sequence[Detection], count: int, source: str = "") -> tuple[dict[str, Landmarks], list[str]]:
    """Landmarks by side over a clip of `count` frames, and notes on what was decided.

    Tracks that overlap in time are different hands: the heavier one chooses its side, the other gets what is left, and
    a third is dropped. A side seen only briefly, and never beside the other, was a wrong reading. A detection read as
    the other hand than its track's keeps its pixels at half its confidence and loses its 3D points, which are mirrored.
    """
    usable = [d for d in detections if np.isfinite(d.points).all(1).sum() >= 4]
    tracks = _linked(_once(usable))
    taken: dict[str, list[_Track]] = {s: [] for s in SIDES}
    dropped = 0
    for track in sorted(tracks, key=lambda t: -t.weight):
        wish = "right" if track.vote >= 0 else "left"
        for side in (wish, *(s for s in SIDES if s != wish)):
            if not any(_beside(track, other) for other in taken[side]):
                taken[side].append(track)
                break
        else:
            dropped += len(track.seen)
    dropped += _without_brief(taken, count)
    notes, out, turned = [], {}, 0
    for side in SIDES:
        seen = [d for t in taken[side] for d in t.seen]
        if seen:
            out[side] = _landmarks(seen, count, side, source)
            turned += sum((d.right >= 0.5) != (side == "right") for d in seen)
    if turned:
        notes.append(f"joints: {turned} of {len(usable)} detections named the other hand and follow their track's side")
    if dropped:
        notes.append(
            f"joints: {dropped} of {len(usable)} detections are of a third hand or too brief, and were left out"
        )
    return out, notes


def chirality(points3d: np.ndarray) -> float:
    """Which hands (N,21,3) joints are, in right-handed axes such as the camera's: 1 right, -1 left, 0 when flat hands
    do not tell.

    Fingers bend towards the palm, and the palm's normal (wrist to index times wrist to little finger) points out of the
    palm in a right hand.
    """
    x = np.asarray(points3d, np.float64).reshape(-1, 21, 3)
    x = x[np.isfinite(x).all((1, 2))]
    if not len(x):
        return 0.0
    normal = np.cross(x[:, 5] - x[:, 0], x[:, 17] - x[:, 0])
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    bent = np.zeros(len(x))
    for first in (5, 9, 13, 17):
        finger = x[:, first + 1 : first + 4].mean(1) - x[:, first]
        length = np.linalg.norm(np.diff(x[:, first : first + 4], axis=1), axis=-1).sum(1)
        bent += np.einsum("nc,nc->n", finger, normal) / np.maximum(length, 1e-12) / 4
    return float(bent.sum() / max(np.abs(bent).sum(), 1e-12)) if np.abs(bent).mean() > 0.05 else 0.0


def _beside(a: _Track, b: _Track) -> bool:
    """Whether two tracks are of two hands: both seen at once, and not only where one begins and the other ends."""
    both = len(a.frames() & b.frames())
    return both > 2 or both > 0.2 * min(len(a.seen), len(b.seen))


def _middle(points: np.ndarray) -> np.ndarray:
    return np.nanmean(points, axis=0)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Median distance of the joints that both have; of their middles where that is hardly any."""
    distance = np.linalg.norm(a - b, axis=-1)
    distance = distance[np.isfinite(distance)]
    return float(np.median(distance)) if len(distance) >= 4 else float(np.linalg.norm(_middle(a) - _middle(b)))


def _once(detections: list[Detection]) -> list[Detection]:
    """Of several detections of one hand in one frame, the surest, with the votes of all."""
    out: list[Detection] = []
    for d in sorted(detections, key=lambda d: -d.confidence):
        twin = next(
            (k for k, o in enumerate(out) if o.frame == d.frame and _apart(o.points, d.points) < _TWICE * o.size), None
        )
        if twin is None:
            out.append(d)
        elif (d.right >= 0.5) != (out[twin].right >= 0.5):
            o = out[twin]
            share = o.confidence / max(o.confidence + d.confidence, 1e-9)
            even = share * o.right + (1 - share) * d.right
            keep = even if (even >= 0.5) == (o.right >= 0.5) else o.right  # its 3D is still of the side it was read as
            out[twin] = replace(o, right=float(keep))
    return out


def _linked(detections: list[Detection]) -> list[_Track]:
    """Detections joined from frame to frame, all at once (Hungarian method), at the least distance."""
    done: list[_Track] = []
    live: list[_Track] = []
    by_frame: dict[int, list[Detection]] = {}
    for d in detections:
        by_frame.setdefault(d.frame, []).append(d)
    for frame in sorted(by_frame):
        done += [t for t in live if frame - t.seen[-1].frame > _GAP]
        live = [t for t in live if frame - t.seen[-1].frame <= _GAP]
        now = by_frame[frame]
        free = set(range(len(now)))
        if live:
            cost = np.array([[_cost(t, d) for d in now] for t in live])
            for i, j in zip(*linear_sum_assignment(np.minimum(cost, 1e3)), strict=True):
                if cost[i, j] < _GATE:
                    live[i].seen.append(now[j])
                    free.discard(j)
        live += [_Track([now[j]]) for j in sorted(free)]
    return done + live


def _cost(track: _Track, d: Detection) -> float:
    """Hand sizes per root of the frames in between, a little more where the sides differ."""
    last = track.seen[-1]
    size = max(last.size, d.size)
    away = _apart(track.expected(d.frame), d.points) / size / np.sqrt(d.frame - last.frame)
    side = 0.5 + 0.5 * track.vote / max(track.weight, 1e-9)
    return away + 0.1 * abs(side - d.right)


def _without_brief(taken: dict[str, list[_Track]], count: int) -> int:
    """Take back a side that is hardly seen: to the other side where that one is free, else out. The number left out."""
    frames = {s: sum(len(t.seen) for t in taken[s]) for s in SIDES}
    weak, strong = sorted(SIDES, key=lambda s: frames[s])
    if not frames[weak] or frames[weak] >= max(3, _BRIEF * count):
        return 0
    lost = 0
    for track in taken[weak]:
        if any(track.frames() & other.frames() for other in taken[strong]):
            lost += len(track.seen)
        else:
            taken[strong].append(track)
    taken[weak] = []
    return lost


def _landmarks(seen: list[Detection], count: int, side: str, source: str) -> Landmarks:
    points, points3d = np.full((count, 21, 2), np.nan, np.float32), np.full((count, 21, 3), np.nan, np.float32)
    confidence = np.zeros(count, np.float32)
    for d in seen:
        same = (d.right >= 0.5) == (side == "right")
        sure = float(np.clip(d.confidence, 0, 1)) * (1.0 if same else _WRONG_SIDE)
        if sure > confidence[d.frame]:
            points[d.frame], confidence[d.frame] = d.points, sure
            points3d[d.frame] = d.points3d if same else np.nan
    return Landmarks(points, points3d, confidence, source)
