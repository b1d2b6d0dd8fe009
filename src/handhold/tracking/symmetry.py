"""Turns of an object about itself that no picture could tell from the true pose.

A tin without a label turns about its axis unseen; so does a plain carton by half a turn. Where a reconstruction turned
about an axis comes to lie on itself, and its colours on like colours, no evidence in the pictures fixes the object's
turn about that axis: the pose is then whatever carried it (the hand, the frame before), and this has to be said. Where
print, a handle or a lid breaks the symmetry nothing is said.

Candidate axes: the one about which the seen surface can slip along itself (helical fields tangent to the surface:
Pottmann and Randrup 1998; Gelfand and Guibas 2004), and the principal axes. Shape: median distance of turned seen
points to the signed-distance field. Colour: difference of a seen point's colour from that of the seen point it comes
to lie on, shading taken out, against how much the frames disagree about one and the same point.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from ..kernels.grid import SdfGrid
from ..scene import Mesh
from ..shapes.mirror import principal_axes, vertex_areas
from ..shapes.texture import vertex_normals

CONTINUOUS = 0
# Reconstructions of held things are bent where the hand was, so shape alone decides little: the bars are wide, and
# colour and slip must agree (measured on a plain and a labelled tin and carton, docs/methods/rigid.md).
SLIPS = 0.18  # sine of the angle between surface and slip, median, below which it slips
SHAPE = {CONTINUOUS: 0.20, 4: 0.10, 2: 0.13}  # of the mean arm about the axis that turned surface may be off
STANDS_OUT = 0.5  # of that arm: a twelfth of the surface this far off is a handle, not an error
LIKE, NOISY = 0.03, 1.0  # difference of colour that is no texture: in [0,1], and times the frames' own disagreement
SHARED = 0.10  # of the seen surface that must come to lie on seen surface for its colours to be compared
_STEPS = 18  # turns of 20 degrees for a surface of revolution


@dataclass(frozen=True)
class Ambiguity:
    """A turn that leaves the object looking the same."""

    axis: np.ndarray  # (3,) unit, object frame
    order: int  # 0: any angle; n: multiples of 360/n degrees
    shape: float  # metres that the turned surface is off, median
    colour: float  # mean difference of colour, in [0,1]

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
    disagree about the colour of one point, mean absolute in [0,1] (`colour_noise`).
    """
    if mesh.colors is None or not len(mesh.faces):
        return ()
    seen = np.ones(len(mesh.vertices), bool) if mesh.observed is None else np.asarray(mesh.observed, bool)
    if seen.sum() < 50:
        return ()
    x, area = np.asarray(mesh.vertices, np.float64), vertex_areas(mesh)
    centre = (area[:, None] * x).sum(0) / area.sum()
    normal = vertex_normals(x, mesh.faces)[seen]
    colour = without_shading(np.asarray(mesh.colors, np.float64)[seen], normal)
    rng = np.random.default_rng(seed)
    pick = rng.choice(len(colour), min(count, len(colour)), replace=False, p=area[seen] / area[seen].sum())
    surface = _Seen(x[seen], colour, cKDTree(x[seen]), pick, grid, 1.5 * grid.h + 0.02 * np.ptp(x, axis=0).max())
    bar = LIKE + NOISY * noise
    axis, point, slip = slippage(x[seen], normal)
    if slip < SLIPS:
        result = surface.turned(point, axis, np.arange(1, _STEPS) / _STEPS, SHAPE[CONTINUOUS], bar)
        if result is not None:
            return (Ambiguity(_upright(axis), CONTINUOUS, *result),)
    found = []
    for axis in principal_axes(x - centre, area):
        for order in (4, 2):
            result = surface.turned(centre, axis, np.arange(1, order) / order, SHAPE[order], bar)
            if result is not None:
                found.append(Ambiguity(_upright(axis), order, *result))
                break
    return tuple(found)


@dataclass(frozen=True)
class _Seen:
    """The seen surface, to be turned upon itself."""

    x: np.ndarray
    colour: np.ndarray
    tree: cKDTree
    pick: np.ndarray
    grid: SdfGrid
    near: float

    def turned(
        self, point: np.ndarray, axis: np.ndarray, turns: np.ndarray, shape: float, like: float
    ) -> tuple[float, float] | None:
        """Worst median distance and mean difference of colour over the turns (shares of a whole one); None when the
        shape or the colours tell one of them."""
        x = self.x[self.pick] - point
        arm = np.linalg.norm(np.cross(x, axis), axis=1).mean()
        bar = max(shape * arm, 1.5 * self.grid.h)
        plain = np.abs(self.colour[self.pick] - np.median(self.colour, 0)).mean()
        far, differ = 0.0, []
        for share in turns:
            y = x @ Rotation.from_rotvec(2 * np.pi * share * axis).as_matrix().T + point
            with torch.no_grad():
                at = torch.as_tensor(y, dtype=self.grid.data.dtype, device=self.grid.data.device)
                off = self.grid.sample(at)[0][:, 0].abs().cpu().numpy()
            far = max(far, float(np.median(off)))
            if far > bar or np.quantile(off, 11 / 12) > STANDS_OUT * arm:
                return None
            d, j = self.tree.query(y)
            meets = d < self.near
            if meets.mean() < SHARED:  # what was seen meets what was not: only a thing of one colour looks the same
                differ.append(1.5 * plain)
            else:
                differ.append(np.abs(self.colour[self.pick[meets]] - self.colour[j[meets]]).mean())
        if np.mean(differ) > like or np.max(differ) > 1.4 * like:
            return None
        return far, float(np.mean(differ))


def slippage(x: np.ndarray, normal: np.ndarray, rounds: int = 10) -> tuple[np.ndarray, np.ndarray, float]:
    """The axis about which a surface moves most nearly along itself: unit direction, a point on it, and the median sine
    of the angle between the motion and the surface.

    Least squares n.(c + w x p) = 0 with |w| = 1 over points p with unit normals n, reweighted against outliers.
    """
    middle = x.mean(0)
    size = np.sqrt(((x - middle) ** 2).sum(1).mean())
    p = (x - middle) / size
    rows, weight = np.concatenate([normal, np.cross(p, normal)], 1), np.ones(len(p))
    for _ in range(rounds):
        m = (rows * weight[:, None]).T @ rows / weight.sum()
        shift = -np.linalg.solve(m[:3, :3] + 1e-6 * np.eye(3), m[:3, 3:])
        w = np.linalg.eigh(m[3:, 3:] + m[3:, :3] @ shift)[1][:, 0]
        c = shift @ w
        motion = c + np.cross(w, p)
        sine = np.abs((normal * motion).sum(1)) / (np.linalg.norm(motion, axis=1) + 1e-3)
        weight = 1 / (1 + (sine / 0.15) ** 2) ** 2
    return w, np.cross(w, c) * size + middle, float(np.median(sine))


def without_shading(colour: np.ndarray, normal: np.ndarray, rounds: int = 8, ridge: float = 0.02) -> np.ndarray:
    """Colours (N,3) divided by the brightness that their normals (N,3) explain: second-order spherical harmonics of the
    logarithm, robustly. What is dark because it faces away from the light is no texture."""
    a, b, c = normal.T
    basis = np.stack([np.ones_like(a), a, b, c, a * b, b * c, a * c, a * a - b * b, 3 * c * c - 1], 1)
    value, weight = np.log(np.clip(colour.mean(1), 0.02, 1)), np.ones(len(colour))
    pull = ridge * len(colour) * np.diag([0.0] + [1.0] * 8)
    for _ in range(rounds):
        x = np.linalg.solve((basis * weight[:, None]).T @ basis + pull, (basis * weight[:, None]).T @ value)
        weight = 1 / (1 + ((value - basis @ x) / 0.1) ** 2)
    return colour / np.exp(basis[:, 1:] @ x[1:])[:, None]


def _upright(axis: np.ndarray) -> np.ndarray:
    return axis * np.sign(axis[np.abs(axis).argmax()])


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
