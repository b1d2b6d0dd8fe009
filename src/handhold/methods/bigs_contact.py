"""Contact of hands and object in metres: points that touch for long attract each other, what overlaps is pushed apart.

The authors' release pulls the wrist to the centre of the object's box instead. Here a contact is a place of the hand
that stays within reach of one place of the object's surface over some frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..geometry.queries import MeshQueries, intersection
from ..kernels.grid import SdfGrid
from ..tracking.contact import LASTING, NEAR

SLIDE = 0.010  # metres that the touched place may wander on the object; more is sliding, not holding
REACH = 0.004  # metres: nearer than this a pair pulls as its square, farther with constant force
SOFT = 0.003  # metres of overlap that are flesh giving way, and of what tracking is off by
DEEP = 0.010  # metres: overlap much deeper than this is an error of the models, and pushes less and less
TOUCH = 0.005  # metres within which a hand counts as touching, for the figures
FEW = 8  # vertices that near


@dataclass(frozen=True)
class Pairs:
    """Places of a hand that hold a place of the object."""

    ids: np.ndarray  # (P,) hand vertices
    anchors: np.ndarray  # (P,3) on the object's surface, object frame, metres
    active: np.ndarray  # (F,P) bool


def find_pairs(
    hand: np.ndarray, queries: MeshQueries, near: float = NEAR, lasting: int = LASTING, slide: float = SLIDE
) -> Pairs:
    """Persistent contact pairs of a hand's vertices (F,V,3), object frame (NaN where unknown), and the object.

    One pair per vertex and run of `lasting` frames or more in which it stays within `near` of the surface and its
    closest point within `slide` of that point's median.
    """
    frames, count = hand.shape[:2]
    known = np.isfinite(hand).all((1, 2))
    close, foot = np.zeros((frames, count), bool), np.zeros((frames, count, 3))
    if known.any():
        found = queries.nearest(hand[known].reshape(-1, 3))
        foot[known] = np.asarray(found.points).reshape(-1, count, 3)
        close[known] = np.asarray(found.distance).reshape(-1, count) < near
    ids, anchors, active = [], [], []
    order = np.flatnonzero(known)
    for v in np.flatnonzero(close.any(0)):
        touching = close[order, v]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], touching, [0]]).astype(int)))
        for a, b in edges.reshape(-1, 2):
            run = order[a:b]
            place = foot[run, v]
            middle = np.median(place, 0)
            stays = np.linalg.norm(place - middle, axis=1) < slide
            if stays.sum() >= lasting:
                on = np.zeros(frames, bool)
                on[run[stays]] = True
                ids.append(v)
                anchors.append(queries.nearest(place[stays].mean(0)[None]).points[0])
                active.append(on)
    if not ids:
        return Pairs(np.zeros(0, int), np.zeros((0, 3)), np.zeros((frames, 0), bool))
    return Pairs(np.array(ids), np.array(anchors), np.stack(active, 1))


def attraction(points: Tensor, anchors: Tensor, reach: float = REACH) -> Tensor:
    """Mean pull between pairs (P,3), metres; 0 without pairs. Quadratic within `reach`, linear beyond (Huber)."""
    if not len(points):
        return points.sum()
    d2 = (points - anchors).square().sum(-1)
    far = d2 > reach * reach
    d = torch.where(far, d2, torch.ones_like(d2)).sqrt()
    return torch.where(far, d - 0.5 * reach, 0.5 * d2 / reach).mean()


def fingers(weights: Tensor) -> Tensor:
    """(V,) the part of the hand that a vertex is of, by skinning weights (V,16): 0 the palm, 1 to 5 the fingers."""
    return (weights.argmax(-1) + 2) // 3


def untouched(distance: Tensor, part: Tensor) -> Tensor:
    """(V,) bool: vertices of those parts of a hand that touch the object nowhere. distance: signed, negative inside.

    A finger that rests on the object with its tip is not to be pulled in with its whole length.
    """
    least = distance.new_full((6,), torch.inf).scatter_reduce(0, part, distance, "amin")
    return least[part] > 0


def overlap(distance: Tensor, soft: float = SOFT, deep: float = DEEP) -> Tensor:
    """Mean push of points at signed distances (N,), metres, negative inside; 0 when nothing is deeper than `soft`.

    Geman-McClure in the depth: overlap of `deep` and more is an error of the models rather than of the pose.
    """
    d2 = (-distance - soft).clamp(min=0).square()
    return (deep * d2 / (d2 + deep * deep)).mean()


def distances(grid: SdfGrid, points: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distances (N,) of points (N,3) of the object's frame, far ones positive, and their gradients (N,3).

    Differentiable in the points.
    """
    inside = ((points > grid.lo) & (points < grid.lo + grid.h * (grid.R - 1))).all(-1)
    phi, gradient = grid.sample_sdf(points)
    return torch.where(inside, phi, torch.ones_like(phi)), gradient


def entering(distance: Tensor, outward: Tensor, gradient: Tensor) -> Tensor:
    """`distance` (N,) where the hand's skin faces the surface that it came through, 1 elsewhere.

    A fingertip beyond the middle of a thin object is nearest to the far side: to push it there is to push it on.
    outward (N,3): the skin's normals; gradient (N,3): where the distance grows.
    """
    return torch.where((outward * gradient).sum(-1) < 0, distance, torch.ones_like(distance))


@dataclass(frozen=True)
class Figures:
    """How a hand and the object meet, over the frames that hold contact pairs."""

    frames: int
    penetration_cm3: float  # mean volume of the overlap
    depth_mm: float  # mean of the deepest vertex's depth
    contact: float  # share of the frames in which `FEW` vertices are within `TOUCH` of the surface, or inside


def figures(hand: np.ndarray, faces: np.ndarray, queries: MeshQueries, frames: np.ndarray, most: int = 6) -> Figures:
    """Figures of a watertight hand (F,V,3), object frame, in `frames` (at most `most` of them, evenly)."""
    frames = frames[np.isfinite(hand[frames]).all((1, 2))]
    if not len(frames):
        return Figures(0, float("nan"), float("nan"), float("nan"))
    frames = frames[np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)]
    volume, depth, touch = [], [], []
    for i in frames:
        d = np.asarray(queries.signed_distance(hand[i]))
        depth.append(1e3 * max(0.0, -d.min()))
        touch.append((d < TOUCH).sum() >= FEW)
        volume.append(1e6 * intersection(MeshQueries(hand[i], faces), queries).volume if d.min() < 0 else 0.0)
    return Figures(len(frames), float(np.mean(volume)), float(np.mean(depth)), float(np.mean(touch)))
