"""When a hand touches the object: windows of lasting nearness in the object's frame, metres."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from ..scene import Sequence

NEAR = 0.012  # metres between a hand's surface and the object's for contact: what tracking is off by
FEW = 8  # of a hand's vertices that must be that near
LASTING = 4  # frames
HOLDING = 0.3  # of the frames, in which a hand that holds the object is beside it
GAP = 2  # frames that a contact may be lost and is still the same


def gaps(vertices: np.ndarray, cam_from_object: np.ndarray, points: np.ndarray, few: int = FEW) -> np.ndarray:
    """(F,) metres between a hand and the object: the distance within which `few` of the hand's vertices lie.

    vertices (F,V,3) camera frame; cam_from_object (F,4,4); points (P,3) on the object's surface, object frame. NaN
    where hand or object is unknown.
    """
    out = np.full(len(vertices), np.nan)
    if not len(points):
        return out
    tree = cKDTree(np.asarray(points, np.float64))
    known = np.isfinite(cam_from_object).all((1, 2)) & np.isfinite(vertices).all((1, 2))
    for i in np.flatnonzero(known):
        x = (vertices[i] - cam_from_object[i, :3, 3]) @ cam_from_object[i, :3, :3]
        d, _ = tree.query(x)
        out[i] = np.partition(d, min(few, len(d)) - 1)[min(few, len(d)) - 1]
    return out


def contact_windows(gap: np.ndarray, near: float = NEAR, lasting: int = LASTING, bridge: int = GAP) -> np.ndarray:
    """(W,2) frames [start, end) in which `gap` (F,) stays within `near` for `lasting` frames or more.

    Unknown frames neither make nor break a contact between frames that have it; `bridge` frames apart do not break it.
    """
    gap = np.asarray(gap, np.float64)
    touching = np.flatnonzero(np.isfinite(gap) & (gap <= near))
    windows: list[list[int]] = []
    for i in touching:
        between = gap[windows[-1][1] : i] if windows else None
        if between is not None and np.isfinite(between).sum() <= bridge:
            windows[-1][1] = int(i) + 1
        else:
            windows.append([int(i), int(i) + 1])
    long = [w for w in windows if np.isfinite(gap[w[0] : w[1]]).sum() >= lasting]
    return np.asarray(long, np.int64).reshape(-1, 2)


def may_hold(sequence: Sequence, side: str) -> bool:
    """Whether the hand has a mask that lies beside the object's in enough frames for it to hold the object."""
    hand = sequence.masks.get(side)
    return hand is not None and beside_in_picture(hand, sequence.masks["object"]).mean() > HOLDING


def beside_in_picture(hand: np.ndarray, thing: np.ndarray, reach: float = 0.012) -> np.ndarray:
    """(F,) bool: masks (F,H,W) that lie within `reach` image widths of each other: what holds may be told of no more
    where nothing is known in 3D."""
    import cv2

    k = 2 * max(1, round(reach * hand.shape[2])) + 1
    kernel = np.ones((k, k), np.uint8)
    return np.array(
        [
            bool((cv2.dilate(h.astype(np.uint8), kernel).astype(bool) & o).any())
            for h, o in zip(hand, thing, strict=True)
        ]
    )
