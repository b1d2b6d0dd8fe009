"""Prompts for a click-driven video segmenter from a clip's own first masks, and the fusion of what it answers.

Nobody clicks: the first masks (`tracking.masks.segment`) are right in some frames and say so. In these, a body's box,
points well inside it, and points well inside the others are what a person would have given. The segmenter's answers,
forwards and backwards in time, are then weighed against each other and against the first masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

BODIES = ("right", "left", "object", "other")
_FRAMES = 4  # prompted frames of a body
_APART = 0.12  # of the clip: least distance between them
_SURE = 0.5  # confidence of a mask that may prompt, or contradict
_POINTS = 3  # inside a body
_AGREES = 0.5  # median IoU with sure first masks below which a body's answers are not used
_LOST = 0.3  # IoU with a sure first mask below which a frame's answer is not used


@dataclass(frozen=True)
class Prompt:
    """What a person would have clicked on one body in one frame."""

    body: int  # which body, 0..N-1
    frame: int
    box: np.ndarray  # (4,) x0 y0 x1 y1, pixel indices (centres at whole numbers), inclusive
    points: np.ndarray  # (P,2) x y, pixel indices
    labels: np.ndarray  # (P,) 1 on the body, 0 on another


class Predictor(Protocol):
    """A promptable video segmenter, both ways in time."""

    def __call__(
        self, frames: np.ndarray, prompts: list[Prompt], bodies: int, report: Callable[[float], None]
    ) -> np.ndarray:
        """frames (F,H,W,3) uint8 sRGB -> (2,F,N,h,w) logits of each body, forwards and backwards in time."""
        ...


def choose_prompts(masks: list[np.ndarray], confidence: list[np.ndarray]) -> list[Prompt]:
    """Prompts for the bodies of masks (F,H,W) bool, confidence (F,); at most `_FRAMES` a body, in order of frames.

    A frame is as good as its confidence, less where the mask is much larger or smaller than usual in the clip or
    touches the border; chosen frames lie at least `_APART` of the clip from each other.
    """
    out = []
    for body, (mask, sure) in enumerate(zip(masks, confidence, strict=True)):
        for frame in _best_frames(mask, sure):
            others = [m[frame] for k, m in enumerate(masks) if k != body]
            out.append(_prompt(body, frame, mask[frame], others))
    return sorted(out, key=lambda p: (p.frame, p.body))


def _best_frames(mask: np.ndarray, sure: np.ndarray) -> list[int]:
    n = len(mask)
    area = mask.reshape(n, -1).sum(1).astype(float)
    if not (area > 0).any():
        return []
    usual = np.median(area[area > 0])
    like = np.exp(-np.abs(np.log((area + 1) / (usual + 1))))
    edge = np.array([m[[0, -1]].any() or m[:, [0, -1]].any() for m in mask])
    score = np.nan_to_num(sure) * like * np.where(edge, 0.8, 1.0) * (area > 30)
    least = min(_SURE, 0.8 * float(score.max()))
    chosen: list[int] = []
    for frame in np.argsort(-score, kind="stable"):
        if score[frame] < least or score[frame] <= 0 or len(chosen) == _FRAMES:
            break
        if all(abs(int(frame) - c) >= max(2, _APART * n) for c in chosen):
            chosen.append(int(frame))
    return sorted(chosen)


def _prompt(body: int, frame: int, mask: np.ndarray, others: list[np.ndarray]) -> Prompt:
    parts, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    large = [k for k in range(1, parts) if stats[k, cv2.CC_STAT_AREA] >= 0.1 * mask.sum()]
    seen = np.isin(labels, large)  # an object behind fingers has several
    y, x = np.nonzero(seen)
    inside = _inmost(seen, _POINTS)
    reach = np.zeros_like(seen)
    pad = max(5, round(0.3 * max(np.ptp(x), np.ptp(y))))
    reach[max(0, y.min() - pad) : y.max() + pad + 1, max(0, x.min() - pad) : x.max() + pad + 1] = True
    outside = [p for other in others for p in _inmost(other & reach & ~mask, 1)]
    points = np.array([*inside, *outside], np.float32).reshape(-1, 2)
    answers = np.array([1] * len(inside) + [0] * len(outside))
    return Prompt(body, frame, np.array([x.min(), y.min(), x.max(), y.max()], np.float32), points, answers)


def _inmost(mask: np.ndarray, count: int) -> list[tuple[int, int]]:
    """Up to `count` pixels (x, y) as far inside the mask as can be, and apart from each other."""
    left = np.pad(mask, 1).astype(np.uint8)
    out: list[tuple[int, int]] = []
    deepest = None
    for _ in range(count):
        depth = cv2.distanceTransform(left, cv2.DIST_L2, 5)[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        deepest = float(depth[y, x]) if deepest is None else deepest
        if depth[y, x] < max(1.5, 0.3 * deepest):
            break
        out.append((int(x), int(y)))
        cv2.circle(left, (int(x) + 1, int(y) + 1), max(2, round(1.5 * float(depth[y, x]))), 0, -1)
    return out


def fuse(
    logits: np.ndarray, masks: list[np.ndarray], confidence: list[np.ndarray], trusted: list[bool] | None = None
) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
    """Masks (F,H,W) and confidences (F,) of the bodies, and each body's median IoU with its sure first masks.

    logits (2,F,N,h,w) as from a `Predictor`; masks, confidence: the first ones. A pixel is the body's with the largest
    mean logit above zero, so that bodies do not overlap. Confidence is the mean margin |2 p - 1| inside the mask, times
    the IoU of the two directions. Where the answer hardly overlaps a sure first mask, it has lost the body: the first
    mask stays, at half its confidence; and for the whole clip where that is the rule. trusted: bodies that were
    prompted; the others keep their first masks.
    """
    n, (h, w) = len(masks), masks[0].shape[1:]
    frames = logits.shape[1]
    trusted = [True] * n if trusted is None else trusted
    found = [np.zeros((frames, h, w), bool) for _ in range(n)]
    sure = [np.zeros(frames, np.float32) for _ in range(n)]
    for i in range(frames):
        both = [
            [cv2.resize(np.asarray(m, np.float32), (w, h), interpolation=cv2.INTER_LINEAR) for m in d[i]]
            for d in logits
        ]
        mean = np.mean(both, axis=0)
        owner = np.where(mean.max(0) > 0, mean.argmax(0), -1)
        for k in range(n):
            found[k][i] = owner == k
            if found[k][i].any():
                margin = np.abs(np.tanh(mean[k][found[k][i]] / 2)).mean()
                sure[k][i] = margin * _iou(both[0][k] > 0, both[1][k] > 0)
    agreement = [_agreement(f, m, c) for f, m, c in zip(found, masks, confidence, strict=True)]
    for k in range(n):
        if not trusted[k] or agreement[k] < _AGREES:
            found[k], sure[k] = masks[k].copy(), np.asarray(confidence[k], np.float32).copy()
            continue
        for i in np.flatnonzero(np.asarray(confidence[k]) >= _SURE):
            if masks[k][i].any() and _iou(found[k][i], masks[k][i]) < _LOST:
                found[k][i], sure[k][i] = masks[k][i], 0.5 * confidence[k][i]
    return _disjoint(found, sure), sure, agreement


def _disjoint(found: list[np.ndarray], sure: list[np.ndarray]) -> list[np.ndarray]:
    """Masks that do not overlap after some were taken back: a pixel is the surer body's."""
    for i in range(len(found[0])):
        taken = np.zeros(found[0].shape[1:], bool)
        for k in np.argsort([-s[i] for s in sure], kind="stable"):
            found[k][i] &= ~taken
            taken |= found[k][i]
    return found


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    union = float((a | b).sum())
    return float((a & b).sum()) / union if union else 1.0


def _agreement(found: np.ndarray, mask: np.ndarray, confidence: np.ndarray) -> float:
    at = [i for i in np.flatnonzero(np.asarray(confidence) >= _SURE) if mask[i].any()]
    return float(np.median([_iou(found[i], mask[i]) for i in at])) if at else 1.0
