"""Turns of an object about itself that no picture could tell from the true pose.

A tin without a label turns about its axis unseen; so does a plain carton by half a turn. Where a reconstruction turned
about an axis comes to lie on itself, and its colours on like colours, no evidence in the pictures fixes the object's
turn about that axis: the pose is then whatever carried it (the hand, the frame before), and this has to be said. Where
print, a handle or a lid breaks the symmetry nothing is said.

Shape: distance of turned surface points to the signed-distance field. Colour: difference of a seen point's colour from
that of the seen point it comes to lie on, against how much the frames disagree about one and the same point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from ..kernels.grid import SdfGrid
from ..scene import Mesh
from ..shapes.texture import vertex_normals

CONTINUOUS = 0
ORDERS = (CONTINUOUS, 4, 2)  # asked of each axis in this order; the first that holds is told
SHAPE = 0.05  # of the object's radius about the axis that a turned surface may be off, mean; or a voxel and a half
SAME = 1.6  # times the frames' own disagreement that colours may differ by, mean
SLIGHT = 0.025  # difference of colour, in [0,1], that is never texture: shading left over
SHARED = 0.12  # of the seen surface that must come to lie on seen surface for colours to be compared
_STEPS = 18  # turns of 20 degrees for a surface of revolution


@dataclass(frozen=True)
class Ambiguity:
    """A turn that leaves the object looking the same."""

    axis: np.ndarray  # (3,) unit, object frame
    order: int  # 0: any angle; n: multiples of 360/n degrees
    shape: float  # metres that the turned surface is off, mean
    colour: float  # mean difference of colour, over the frames' own disagreement

    @property
    def sentence(self) -> str:
        """What the report says."""
        if self.order == CONTINUOUS:
            return (
                "The object looks the same turned about its axis by any angle: "
                "its rotation about that axis is not observable and rests on the hand and on smoothness."
            )
        return (
            f"The object looks the same turned by {360 // self.order} degrees about an axis: "
            "which of these turns is the true one is not observable."
        )


def ambiguities(mesh: Mesh, grid: SdfGrid, noise: float, seed: int = 0, count: int = 1500) -> tuple[Ambiguity, ...]:
    """The turns that change neither outline nor colours of a fitted object; empty when each can be told.

    mesh: its surface with colours and `observed`; grid: its signed-distance field, same frame; noise: how much frames
    disagree about the colour of one point, mean absolute in [0,1] (`colour_noise`). An axis that cannot be judged,
    because turned seen surface does not meet seen surface, counts by shape alone for half turns and fewer only if the
    object as a whole is of one colour.
    """
    if mesh.colors is None or not len(mesh.faces):
        return ()
    seen = np.ones(len(mesh.vertices), bool) if mesh.observed is None else np.asarray(mesh.observed, bool)
    if seen.sum() < 50:
        return ()
    x, colour = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.colors, np.float64)
    area = _vertex_areas(mesh)
    centre = (area[:, None] * x).sum(0) / area.sum()
    rng = np.random.default_rng(seed)
    pick = rng.choice(len(x), min(count, len(x)), replace=False, p=area / area.sum())
    tree = cKDTree(x[seen])
    found: list[Ambiguity] = []
    for axis in candidate_axes(x - centre, area):
        arm = np.linalg.norm(np.cross(x[pick] - centre, axis), axis=1).mean()
        bar = max(SHAPE * arm, 1.5 * grid.h)
        for order in ORDERS:
            turns = np.arange(1, _STEPS) / _STEPS if order == CONTINUOUS else np.arange(1, order) / order
            result = _turned(x, colour, seen, tree, pick, centre, axis, turns, grid, noise)
            if result is not None and result[0] < bar and result[1] < SAME:
                found.append(Ambiguity(axis, order, *result))
                break
    return _independent(found)


def _turned(x, colour, seen, tree, pick, centre, axis, turns, grid, noise) -> tuple[float, float] | None:
    """Worst over the turns of the surface's mean distance and of the colours' difference over noise."""
    far, differ = 0.0, 0.0
    mine = pick[seen[pick]]
    near = 1.5 * grid.h + 0.02 * np.ptp(x, axis=0).max()
    for share in turns:
        r = Rotation.from_rotvec(2 * np.pi * share * axis).as_matrix()
        with torch.no_grad():
            y = torch.as_tensor((x[pick] - centre) @ r.T + centre, dtype=grid.data.dtype)
            value, _ = grid.sample(y.to(grid.data.device))
        far = max(far, float(value[:, 0].abs().mean()))
        d, j = tree.query((x[mine] - centre) @ r.T + centre)
        meets = d < near
        if meets.mean() < SHARED:
            # unseen meets seen: only a thing of one colour says anything, by how little its colours differ at all
            gap = np.abs(colour[mine] - np.median(colour[mine], 0)).mean(1)
        else:
            gap = np.abs(colour[mine[meets]] - colour[seen][j[meets]]).mean(1)
        differ = max(differ, float(gap.mean()) / max(noise, SLIGHT))
    return far, differ


def candidate_axes(x: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """Unit axes worth a try: the principal axes of the surface, and between two whose moments are alike the diagonals."""
    moment = (weight[:, None, None] * (x[:, :, None] * x[:, None])).sum(0) / weight.sum()
    size, axes = np.linalg.eigh(moment)
    out = [axes[:, k] for k in (2, 1, 0)]
    for a, b in ((0, 1), (1, 2)):
        if size[a] > 0.8 * size[b]:
            out += [(axes[:, a] + s * axes[:, b]) / np.sqrt(2) for s in (1, -1)]
    return [v * np.sign(v[np.abs(v).argmax()]) for v in out]


def _independent(found: list[Ambiguity]) -> tuple[Ambiguity, ...]:
    """Without half turns that a surface of revolution has anyway: with one axis of any angle only that is told."""
    free = [a for a in found if a.order == CONTINUOUS]
    if len(free) > 1:  # nearly a ball
        return tuple(free[:3])
    return tuple(free or found)


def _vertex_areas(mesh: Mesh) -> np.ndarray:
    a, b, c = (np.asarray(mesh.vertices, np.float64)[mesh.faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 6
    return np.bincount(mesh.faces.ravel(), np.repeat(area, 3), minlength=len(mesh.vertices)) + 1e-12


def colour_noise(
    mesh: Mesh, frames: np.ndarray, clear: np.ndarray, K: np.ndarray, cam_from_object: np.ndarray, most: int = 24
) -> float:
    """How much frames disagree about the colour of one point of the surface: mean absolute, in [0,1].

    frames (F,H,W,3) uint8; clear (F,H,W) bool, pixels that show the object alone. The overall brightness of each frame
    is divided out. Points that face the camera are taken; on a closed convex thing nothing else lies before them.
    """
    x, colour = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.colors, np.float64)
    normal = vertex_normals(x, mesh.faces)
    known = np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0]))
    known = known[np.unique(np.linspace(0, len(known) - 1, min(most, len(known))).astype(int))]
    h, w = clear.shape[1:]
    gaps = []
    for i in known:
        r, t = cam_from_object[i, :3, :3], cam_from_object[i, :3, 3]
        c = x @ r.T + t
        facing = -(c * (normal @ r.T)).sum(1) / np.maximum(np.linalg.norm(c, axis=1), 1e-9) > 0.5
        u = np.floor(c[:, :2] / c[:, 2:] * [K[0, 0], K[1, 1]] + K[:2, 2]).astype(int)
        facing &= (u >= 0).all(1) & (u < [w, h]).all(1)
        if mesh.observed is not None:
            facing &= mesh.observed
        at = np.flatnonzero(facing)
        at = at[clear[i][u[at, 1], u[at, 0]]]
        if len(at) < 30:
            continue
        pixel = frames[i][u[at, 1], u[at, 0]] / 255.0
        gain = pixel.mean() / max(colour[at].mean(), 1e-3)
        gaps.append(np.abs(pixel / gain - colour[at]).mean())
    return float(np.median(gaps)) if gaps else 0.0
