"""From class probabilities to masks: what belongs together, whose hand it is, and how sure each frame is."""

from __future__ import annotations

import cv2
import numpy as np
from scipy import ndimage

from ..parallel import each
from ..scene import SIDES

BACKGROUND, HAND, OBJECT, OTHER = range(4)
BONES = [
    *((0, 1), (1, 2), (2, 3), (3, 4), (0, 5), (5, 6), (6, 7), (7, 8), (5, 9), (9, 10), (10, 11), (11, 12)),
    *((9, 13), (13, 14), (14, 15), (15, 16), (13, 17), (17, 18), (18, 19), (19, 20), (0, 17)),
]  # of the 21 landmarks, OpenPose order, with the edges of the palm
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
SURE_HAND = 0.45  # confidence of landmarks that are there
MEMORY = 0.15
"""How much less a mask of the frame before tells than landmarks of this one, in sizes of the hand."""
TRUSTED = 0.85
"""Least share of the landmarks' pixels that the segmenter gives to their side, for its sides to be used at all."""


def px(p) -> tuple[int, int]:
    return int(np.clip(p[0], -9999, 9999)), int(np.clip(p[1], -9999, 9999))


def clean(probabilities, features, hands, hand_size, share=None, sides_known=False):
    """Labels to masks: components that belong to the hand-object group, islands and holes resolved, skin split by side
    and cut at the wrist.

    probabilities (F,H,W,4); features: `_mask_classifier.Features`; hands: side -> points (F,21,2) and confidence (F,);
    hand_size: side -> (F,) pixels; share: (F,H,W) the right hand's part of the hands as the segmenter sees it, or None;
    sides_known: it is to be believed.
    Returns masks (F,H,W) bool and confidences (F,) by name.
    """
    n, h, w = probabilities.shape[:3]
    sides = [s for s in SIDES if s in hands]
    masks = {s: np.zeros((n, h, w), bool) for s in [*sides, "object", "other"]}
    confidence = {k: np.zeros(n, np.float32) for k in masks}
    typical_size = float(np.median([hand_size[s][0] for s in sides])) if sides else 0.3 * max(h, w)
    if share is not None and not sides_known:
        share = _named_as_landmarks(share, hands)

    def plain(i: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray]:
        p = probabilities[i].astype(np.float32)
        label = p.argmax(-1).astype(np.uint8)
        d = features.foreground(i)
        label[(d < 2.5) & features.known] = (
            BACKGROUND  # smoothing spreads labels a little past the edge: take that back
        )
        label = _absorb_islands(label, round(0.012 * typical_size**2))
        found = {s: hands[s][0][i] for s in sides if hands[s][1][i] > SURE_HAND and np.isfinite(hands[s][0][i]).all()}
        found = {s: q for s, q in found.items() if _mostly_on(label == HAND, q)}
        return label, ndimage.binary_opening(label == OBJECT), found, p.max(-1)

    labels, things, founds, tops = zip(*each(plain, range(n)), strict=True)
    previous, skins = None, [label == HAND for label in labels]
    for i, (label, skin) in enumerate(zip(labels, skins, strict=True)):
        obj = _belonging(things[i], skin, previous)
        obj = ndimage.binary_fill_holes(ndimage.binary_closing(obj, iterations=2)) & ~skin
        masks["object"][i] = obj
        masks["other"][i] = ~obj & ~skin & (label != BACKGROUND)
        previous = obj if obj.any() else previous
    if sides_known and share is not None:
        owners = [
            {s: k & ((r >= 0.5) if s == "right" else (r < 0.5)) for s in sides}
            for k, r in zip(skins, share, strict=True)
        ]
    else:
        owners = _shared_out(skins, founds, sides, hand_size, share)
    for i, owned in enumerate(owners):
        for s, m in owned.items():
            masks[s][i] = m
        if share is not None:  # arms, and hands of others
            masks["other"][i] |= skins[i] & ~np.any(list(owned.values()), axis=0)
        for k in masks:
            m = masks[k][i]
            if m.sum() > 30:
                confidence[k][i] = float(np.clip(2 * tops[i][m].mean() - 1, 0, 1)) * (
                    1.0 if k in founds[i] or k not in SIDES else 0.6 if share is None else 0.8
                )
    area = masks["object"].reshape(n, -1).sum(1)
    if (area > 0).any():  # an object does not halve or double between neighbours; say so rather than trust it
        typical = ndimage.median_filter(area.astype(np.float32), 9, mode="nearest")
        confidence["object"] *= np.clip(1.5 - np.abs(np.log((area + 1) / (typical + 1))), 0.1, 1).astype(np.float32)
    return masks, confidence


def _named_as_landmarks(share: np.ndarray, hands) -> np.ndarray | None:
    """`share` of the right hand (F,H,W), or of the left if that is what the landmarks call right: sides are named by
    one vote of the clip. None where the segmenter cannot tell them apart, and nearness has to do."""
    votes = [np.zeros(0)]
    h, w = share.shape[1:]
    for side, (points, confidence) in hands.items():
        for i in np.flatnonzero(confidence > SURE_HAND):
            x, y = points[i][np.isfinite(points[i]).all(-1)].astype(int).T
            inside = (x >= 0) & (y >= 0) & (x < w) & (y < h)
            right = share[i, y[inside], x[inside]].astype(np.float32)
            votes.append(right if side == "right" else 1 - right)
    votes = np.concatenate(votes)
    if len(votes) and 1 - TRUSTED < votes.mean() < TRUSTED:
        return None
    return 1 - share if len(votes) and votes.mean() < 0.5 else share


def _shared_out(skins, founds, sides, hand_size, share) -> list[dict[str, np.ndarray]]:
    """Whose skin it is in all frames, side -> (H,W) bool. What was known of a hand travels forwards and backwards in
    time from where landmarks found it; each frame believes the direction that knew more recently.

    skins: (H,W) bool of each frame; founds: side -> points (21,2) of each frame; share: (F,H,W) or None.
    """
    n, best = len(skins), []
    for frames in (range(n), range(n - 1, -1, -1)):
        last, age, out = {}, dict.fromkeys(sides, n), [({}, 0)] * n
        for i in frames:
            now = {s: hand_size[s][i] for s in sides}
            owned = _owned(skins[i], founds[i], sides, now, last, None if share is None else share[i])
            last |= {s: m for s, m in owned.items() if m.any()}
            age = {s: 0 if s in founds[i] else age[s] + 1 for s in sides}
            out[i] = owned, sum(age.values())
        best.append(out)
    return [a if x <= y else b for (a, x), (b, y) in zip(*best, strict=True)]


def _owned(skin, found, sides, hand_size, last, share) -> dict[str, np.ndarray]:
    """Whose skin it is in one frame, side -> (H,W) bool: that of the closest hand, in pixels of the picture and in how
    far the segmenter, if asked (share), finds it to be of the other side. What is behind a wrist is nobody's.

    found: side -> points (21,2); hand_size: side -> pixels; last: side -> mask when the side was last seen.
    """
    h, w = skin.shape
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32) + 0.5
    order = [s for s in sides if s in found] + [s for s in sides if s not in found]
    cost = []
    for s in order:
        if s in found:
            q = found[s]
            bones = np.ones((h, w), np.uint8)
            for a, b in BONES:
                cv2.line(bones, px(q[a]), px(q[b]), 0, 1)
            distance = cv2.distanceTransform(bones, cv2.DIST_L2, 3)
            axis = q[9] - q[0]
            length = np.linalg.norm(axis)
            if length > 0.25 * hand_size[s]:  # cut the bare forearm just behind the wrist
                along = ((xx - q[0, 0]) * axis[0] + (yy - q[0, 1]) * axis[1]) / length
                across = np.abs((xx - q[0, 0]) * axis[1] - (yy - q[0, 1]) * axis[0]) / length
                behind = (along < -0.1 * hand_size[s]) & (across < 0.5 * hand_size[s])
                distance = np.where(behind, np.inf, distance)
        elif s in last:  # a hand that was not found here keeps the skin next to where it was a frame ago
            distance = cv2.distanceTransform((~last[s]).astype(np.uint8), cv2.DIST_L2, 3)
            distance = distance + (MEMORY * hand_size[s] if found else 0.0)
        else:
            distance = np.full((h, w), 1e6 if share is None else 0.3 * hand_size[s], np.float32)
        if share is not None:
            own = share.astype(np.float32) if s == "right" else 1 - share.astype(np.float32)
            distance = distance + 0.6 * hand_size[s] * (1 - own)
        cost.append(distance)
    if share is not None and len(order) == 1:  # a hand that no landmarks follow may be there too
        nobody = 0.3 + 0.6 * own
        if order[0] in found:
            nobody = np.where(cost[0] < (0.1 + 0.6 * (1 - own)) * hand_size[order[0]], np.inf, nobody)
        cost.append(nobody * hand_size[order[0]])
    if not cost:
        return {}
    nearest = np.argmin(cost, 0)
    return {s: skin & (nearest == j) & np.isfinite(cost[j]) for j, s in enumerate(order)}


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
            # many and small: OpenCV is twenty times as quick at these as `ndimage`
            ring = label[box][(cv2.dilate(m.astype(np.uint8), CROSS, iterations=2) > 0) & ~m]
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
