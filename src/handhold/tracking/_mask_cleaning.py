"""From class probabilities to masks: what belongs together, whose hand it is, and how sure each frame is."""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage

from ..scene import SIDES

BACKGROUND, HAND, OBJECT, OTHER = range(4)
BONES = [
    *((0, 1), (1, 2), (2, 3), (3, 4), (0, 5), (5, 6), (6, 7), (7, 8), (5, 9), (9, 10), (10, 11), (11, 12)),
    *((9, 13), (13, 14), (14, 15), (15, 16), (13, 17), (17, 18), (18, 19), (19, 20), (0, 17)),
]  # of the 21 landmarks, OpenPose order, with the edges of the palm


def px(p) -> tuple[int, int]:
    return int(np.clip(p[0], -9999, 9999)), int(np.clip(p[1], -9999, 9999))


def clean(probabilities, features, hands, hand_size):
    """Labels to masks: components that belong to the hand-object group, islands and holes resolved, skin split by side
    and cut at the wrist.

    probabilities (F,H,W,4); features: `masks._Features`; hands: side -> points (F,21,2) and confidence (F,); hand_size:
    side -> (F,) pixels. Returns masks (F,H,W) bool and confidences (F,) by name.
    """
    n, h, w = probabilities.shape[:3]
    sides = [s for s in SIDES if s in hands]
    masks = {s: np.zeros((n, h, w), bool) for s in [*sides, "object", "other"]}
    confidence = {k: np.zeros(n, np.float32) for k in masks}
    typical_size = float(np.median([hand_size[s][0] for s in sides])) if sides else 0.3 * max(h, w)
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32) + 0.5
    previous, last = None, {}
    for i in range(n):
        p = probabilities[i].astype(np.float32)
        label = p.argmax(-1).astype(np.uint8)
        top = p.max(-1)
        d = features.foreground(i)
        label[(d < 2.5) & features.known] = (
            BACKGROUND  # smoothing spreads labels a little past the edge: take that back
        )
        label = _absorb_islands(label, round(0.012 * typical_size**2))
        skin = label == HAND
        obj = _belonging(ndimage.binary_opening(label == OBJECT, iterations=1), skin, previous)
        obj = ndimage.binary_fill_holes(ndimage.binary_closing(obj, iterations=2)) & ~skin
        found = [(s, hands[s][0][i]) for s in sides if hands[s][1][i] > 0.45 and np.isfinite(hands[s][0][i]).all()]
        found = [(s, q) for s, q in found if _mostly_on(skin, q)]
        if sides:
            cost = []
            for s, q in found:
                bones = np.ones((h, w), np.uint8)
                for a, b in BONES:
                    cv2.line(bones, px(q[a]), px(q[b]), 0, 1)
                distance = cv2.distanceTransform(bones, cv2.DIST_L2, 3)
                axis = q[9] - q[0]
                length = np.linalg.norm(axis)
                if length > 0.25 * hand_size[s][i]:  # cut the bare forearm just behind the wrist
                    along = ((xx - q[0, 0]) * axis[0] + (yy - q[0, 1]) * axis[1]) / length
                    across = np.abs((xx - q[0, 0]) * axis[1] - (yy - q[0, 1]) * axis[0]) / length
                    distance = np.where(
                        (along < -0.1 * hand_size[s][i]) & (across < 0.5 * hand_size[s][i]), np.inf, distance
                    )
                cost.append(distance)
            # a hand that was not found here keeps the skin next to where it was a frame ago
            carried = [s for s in sides if s not in dict(found)]
            cost += [
                cv2.distanceTransform((~last[s]).astype(np.uint8), cv2.DIST_L2, 3)
                if s in last
                else np.full((h, w), 1e6)
                for s in carried
            ]
            nearest = np.argmin(cost, 0)
            for j, s in enumerate([s for s, _ in found] + carried):
                masks[s][i] = skin & (nearest == j) & np.isfinite(cost[j])
                if masks[s][i].any():
                    last[s] = masks[s][i]
        masks["object"][i] = obj
        masks["other"][i] = ~obj & ~skin & (label != BACKGROUND)
        for k in masks:
            m = masks[k][i]
            if m.sum() > 30:
                confidence[k][i] = float(np.clip(2 * top[m].mean() - 1, 0, 1)) * (
                    1.0 if k in dict(found) or k not in SIDES else 0.6
                )
        previous = obj if obj.any() else previous
    area = masks["object"].reshape(n, -1).sum(1)
    if (area > 0).any():  # an object does not halve or double between neighbours; say so rather than trust it
        typical = ndimage.median_filter(area.astype(np.float32), 9, mode="nearest")
        confidence["object"] *= np.clip(1.5 - np.abs(np.log((area + 1) / (typical + 1))), 0.1, 1).astype(np.float32)
    return masks, confidence


def _mostly_on(skin: np.ndarray, points: np.ndarray) -> bool:
    """Whether at least a third of the landmarks lie on (or beside) skin."""
    h, w = skin.shape
    near = ndimage.binary_dilation(skin, iterations=3)
    x, y = points.astype(int).T
    inside = (x >= 0) & (y >= 0) & (x < w) & (y < h)
    return bool(near[y[inside], x[inside]].sum() >= len(points) / 3)


def _absorb_islands(label: np.ndarray, small: int) -> np.ndarray:
    """Small components take the label that surrounds them most: print on an object is not skin, a ring is no object."""
    for c in (HAND, OBJECT, OTHER):
        comp, k = ndimage.label(label == c)
        if k == 0:
            continue
        size = ndimage.sum_labels(label == c, comp, np.arange(1, k + 1))
        boxes = ndimage.find_objects(comp)
        for j in np.flatnonzero(size < small):
            box = tuple(slice(max(b.start - 3, 0), b.stop + 3) for b in boxes[j])
            m = comp[box] == j + 1
            ring = label[box][ndimage.binary_dilation(m, iterations=2) & ~m]
            votes = np.bincount(ring, minlength=4)
            surround = votes.argmax() if votes.sum() else BACKGROUND
            if size[j] < 0.1 * small or votes[surround] > 0.75 * votes.sum():
                label[box][m] = surround
    return label


def _belonging(obj: np.ndarray, skin: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """The components that touch the hand or lie where the object was a frame ago."""
    comp, k = ndimage.label(obj)
    if k < 2:
        return obj
    size = ndimage.sum_labels(obj, comp, np.arange(1, k + 1))
    touching = ndimage.maximum(ndimage.binary_dilation(skin, iterations=4), comp, np.arange(1, k + 1)) > 0
    was = np.zeros(k) if previous is None else ndimage.mean(previous, comp, np.arange(1, k + 1))
    keep = (touching | (was > 0.3)) & (size > 0.03 * size.max())
    return np.concatenate([[False], keep])[comp] if keep.any() else obj
