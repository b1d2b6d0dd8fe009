"""Masks a second time, with what tracking knows: where each hand and the object should be, and which is in front.

Single frames mistake skin-coloured print for a hand, a sleeve for background, right for left. Once the whole clip has
been explained by hands in the object's frame and a first surface of the object, all of these contradict the rest of the
clip. So the posed models, blurred by how far they may be off, become a prior for every pixel, beside the segmenter's
probabilities; the clip's own classifier learns again from the seeds that both support.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.special import ndtr

from ..kernels.raster import depth_image
from ..scene import SIDES, Mesh, Sequence

if TYPE_CHECKING:
    from .masks import Look

OBJECT_SIGMA = 2.5  # pixels (at 512 wide) by which the first surface's outline may be off
HAND_SIGMA = 0.008  # metres by which a tracked hand may be off
DEPTH_SIGMA = 0.012  # metres, of hand against object along the ray
SIDE_SIGMA = 8.0  # pixels (at 512 wide), of one hand's outline against the other's
ANYWHERE = 0.3  # coverage by a body whose pose is not known
BELIEVED = 0.8  # probability of the labels of a mask that no segmenter made
FLOOR = 0.03  # of every label everywhere: models do not know all
HIDER = 0.2  # of something else (a sleeve) in front of the object


def model_prior(
    size: tuple[int, int],
    K: np.ndarray,
    hands: dict[str, tuple[np.ndarray, np.ndarray]],
    mesh: Mesh | None,
    cam_from_object: np.ndarray,
) -> np.ndarray:
    """What the posed models say of every pixel.

    size (W,H) and K (3,3) of the prior's pixels; hands: side -> vertices (F,V,3) in the camera's frame, metres, NaN
    where unknown, and faces; mesh: the object's first surface, metres, object frame; cam_from_object (F,4,4), NaN where
    unknown. Returns (F,5,H,W) float16, background, right, left, object, forearm, adding up to 1. A body
    whose pose is not known in a frame may be anywhere in it.
    """
    w, h = size
    unit = w / 512
    out = np.empty((len(cam_from_object), 5, h, w), np.float16)
    for i, pose in enumerate(cam_from_object):
        cover, away, depth = {}, {}, {}
        for side, (vertices, faces) in hands.items():
            v = vertices[i]
            if not (np.isfinite(v).all() and (v[:, 2] > 0.05).all()):
                continue
            z = depth_image(v, faces, K, w, h)
            if np.isfinite(z).any():
                away[side] = _outside(np.isfinite(z))
                sigma = max(HAND_SIGMA * K[0, 0] / float(np.median(v[:, 2])), 2.0 * unit)
                cover[side], depth[side] = ndtr(-away[side] / sigma), _spread(z)
        hand, front = np.zeros((h, w)), np.full((h, w), np.inf)
        for side, c in cover.items():
            front = np.where(c > hand, depth[side], front)
            hand = np.maximum(hand, c)
        if len(cover) < len(hands):  # a hand, or the object, whose pose is not known may be anywhere
            hand = np.maximum(hand, ANYWHERE)
        thing, first = np.full((h, w), ANYWHERE), np.full((h, w), 0.5)
        if mesh is not None and np.isfinite(pose[0, 0]):
            z = depth_image(mesh.vertices @ pose[:3, :3].T + pose[:3, 3], mesh.faces, K, w, h)
            if np.isfinite(z).any():
                thing = ndtr(-_outside(np.isfinite(z)) / (OBJECT_SIGMA * unit))
                first = ndtr((_spread(z) - front) / DEPTH_SIGMA)
        rest = (1 - hand) * (1 - thing)
        seen_hand = hand * (1 - thing) + hand * thing * first
        right = _right_share(away, hands, unit, (h, w))
        p = np.stack([
            rest, seen_hand * right, seen_hand * (1 - right), thing * (1 - hand) + hand * thing * (1 - first),
            np.maximum(rest, HIDER * thing),
        ])  # fmt: skip
        p += FLOOR
        out[i] = p / p.sum(0)
    return out


def fused(prior: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """`prior` (F,5,H,W) of the models times the segmenter's probabilities (F,5,h,w); which hand it is, is the
    models' to say."""
    h, w = prior.shape[2:]
    out = np.empty_like(prior)
    for i, (known, p) in enumerate(zip(prior, probabilities, strict=True)):
        p = np.stack([cv2.resize(q.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR) for q in p]) + 1e-2
        known = known.astype(np.float32)
        both = known[1] + known[2]
        # what the models say is covered and the segmenter finds empty is something in front that neither knows
        hider = p[4] * known[4] + 0.5 * p[0] * np.minimum(known[3], HIDER)
        product = np.stack([p[0] * known[0], (p[1] + p[2]) * both, p[3] * known[3], hider])
        product /= product.sum(0)
        right = known[1] / np.maximum(both, 1e-6)
        out[i] = np.stack([product[0], product[1] * right, product[1] * (1 - right), product[2], product[3]])
    return out


def of_masks(sequence: Sequence) -> np.ndarray:
    """(F,5,H,W) float16 probabilities that the masks there are stand for, where no segmenter was asked."""
    names = ("right", "left", "object", "other")
    none = np.zeros(sequence.frames.shape[:3], bool)
    masks = np.stack([sequence.masks.get(k, none) for k in names], 1)
    masks = np.concatenate([~masks.any(1, keepdims=True), masks], 1)
    return np.where(masks, 1.0, (1 - BELIEVED) / 4 / BELIEVED).astype(np.float16) * np.float16(BELIEVED)


def relabel(
    sequence: Sequence,
    hands: dict[str, tuple[np.ndarray, np.ndarray]],
    mesh: Mesh | None,
    cam_from_object: np.ndarray,
    probabilities: np.ndarray | None = None,
    seed: int = 0,
    progress=None,
    look: Look | None = None,
) -> Sequence:
    """`sequence` with its masks made anew by `masks.segment`, helped by `model_prior`; see there for the arguments.

    probabilities: the segmenter's (F,5,h,w), as `prepare` keeps them; None: the masks of `sequence` stand
    in for them. look: `masks.look_at` of the sequence, if done already. Deterministic for a seed.
    """
    from .masks import WORK_SIDE, segment

    say = progress or (lambda share, what: None)
    width, height = sequence.size
    scale = min(1.0, WORK_SIDE / max(width, height))
    size = (round(width * scale), round(height * scale))
    K = np.diag([size[0] / width, size[1] / height, 1.0]) @ sequence.K
    say(0.0, "where the models are")
    seen = of_masks(sequence) if probabilities is None else probabilities
    prior = fused(model_prior(size, K, hands, mesh, cam_from_object), seen)
    return segment(sequence, lambda part, what: say(0.2 + 0.8 * part, what), seed, prior, True, look)


def _right_share(away: dict[str, np.ndarray], hands, unit: float, shape) -> np.ndarray:
    """(H,W) how far a hand's pixel is the right one's."""
    if len(hands) == 1:
        return np.full(shape, float("right" in hands))
    if not away:
        return np.full(shape, 0.5)
    if len(away) == 1:  # what is not the known one's is the other's
        ((side, outside),) = away.items()
        known = ndtr(-outside / (SIDE_SIGMA * unit))
        known = known / (known + ANYWHERE)
        return known if side == "right" else 1 - known
    right, left = (away[s] for s in SIDES)
    return ndtr((left - right) / (SIDE_SIGMA * unit))


def _outside(mask: np.ndarray) -> np.ndarray:
    """(H,W) pixels to the edge of `mask`, negative inside."""
    m = mask.astype(np.uint8)
    return cv2.distanceTransform(1 - m, cv2.DIST_L2, 5) - cv2.distanceTransform(m, cv2.DIST_L2, 5)


def _spread(depth: np.ndarray) -> np.ndarray:
    """`depth` (H,W) with the nearest pixel's where it is not finite."""
    row, column = distance_transform_edt(~np.isfinite(depth), return_distances=False, return_indices=True)
    return depth[row, column]
