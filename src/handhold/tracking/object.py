"""Object shape and pose together: a signed-distance grid rendered against the frames, the frames' poses refined along.

The fit itself is `shapes.sdf_fit.fit_sdf`; here is what it reads of a clip. Pixels of hands and of anything else that
may hide the object are unknown: they neither fill nor carve. Lengths are in the units of the poses given (metres once
the grasp has fixed the scale).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.grid import SdfGrid
from ..scene import Mesh, Sequence
from ..shapes.sdf import View, surface, visual_hull
from ..shapes.sdf_fit import DEFAULT_FIT, EMPTY_RAY, Pixels, SdfFitConfig, Stage, SurfacePoints, fit_sdf

REACH = 1.15  # of the object's radius: half a side of its grid
_SOLID_NODES = 48  # per axis, at which other bodies are asked where they are


@dataclass
class ObjectField:
    """Shape and per-frame pose of one object."""

    grid: SdfGrid
    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    error: np.ndarray  # (F,) mean photometric + silhouette error of the frame at the end; NaN where unknown
    light: Tensor  # (9,) spherical-harmonic shading in the camera's frame
    center: np.ndarray  # (3,)
    radius: float


@dataclass(frozen=True)
class Observations:
    """Frames and masks as the refiner reads them."""

    frames: np.ndarray  # (F,H,W,3) uint8
    inside: np.ndarray  # (F,H,W) bool
    unknown: np.ndarray  # (F,H,W) bool, hands and other occluders
    K: np.ndarray  # (3,3)
    occluder_depth: np.ndarray | None = None  # (F,H,W) float, depth of the hand's front surface, inf elsewhere
    doubtful: np.ndarray | None = None  # (F,H,W) bool, pixels whose label is not to be believed

    def scaled(self, s: float) -> Observations:
        """The same at `s` times the size; a mask pixel counts by coverage."""
        if s == 1.0:
            return self
        h, w = self.frames.shape[1:3]
        size = (round(w * s), round(h * s))
        area = lambda x: np.stack([cv2.resize(i, size, interpolation=cv2.INTER_AREA) for i in x])  # noqa: E731
        inside = area(self.inside.astype(np.float32)) > 0.5
        unknown = (area(self.unknown.astype(np.float32)) > 0.25) & ~inside
        K = np.diag([size[0] / w, size[1] / h, 1.0]) @ self.K
        depth = None
        if self.occluder_depth is not None:
            depth = np.stack(
                [
                    cv2.resize(np.where(np.isfinite(d), d, 0).astype(np.float32), size, interpolation=cv2.INTER_NEAREST)
                    for d in self.occluder_depth
                ]
            )
            depth = np.where(depth > 0, depth, np.inf)
        doubtful = None if self.doubtful is None else area(self.doubtful.astype(np.float32)) > 0.25
        return Observations(area(self.frames), inside, unknown, K, depth, doubtful)

    def clear(self) -> np.ndarray:
        """(F,H,W) bool: pixels that are surely the object's, away from what hides it."""
        return np.stack([inside & ~self.unsure(i) for i, inside in enumerate(self.inside)])

    def unsure(self, i: int) -> np.ndarray:
        """(H,W) bool: pixels of frame `i` beside an occluder, or doubtful."""
        near = beside(self.unknown[i])
        return near if self.doubtful is None else near | self.doubtful[i]


def object_extent(obs: Observations, poses: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (object frame) closest to all mask-centroid rays, and a radius that covers the masks."""
    a, b, radii = np.zeros((3, 3)), np.zeros(3), []
    fx = obs.K[0, 0]
    whole = []
    h, w = obs.inside.shape[1:]
    for i in np.flatnonzero(valid):
        y, x = np.nonzero(obs.inside[i])
        if len(x) < 50:
            continue
        r, t = poses[i, :3, :3], poses[i, :3, 3]
        cx, cy = 0.5 * (x.min() + x.max()) + 0.5, 0.5 * (y.min() + y.max()) + 0.5
        d = np.linalg.solve(obs.K, [cx, cy, 1.0])
        d = r.T @ (d / np.linalg.norm(d))
        o = -r.T @ t
        p = np.eye(3) - np.outer(d, d)
        a, b = a + p, b + p @ o
        whole.append((i, np.hypot(x + 0.5 - cx, y + 0.5 - cy).max()))
    center = np.linalg.solve(a + 1e-9 * np.eye(3), b)
    for i, px in whole:
        radii.append(px * (poses[i, :3, :3] @ center + poses[i, :3, 3])[2] / fx)
    return center, float(np.quantile(radii, 0.9))


class Solid(Protocol):
    """Something else that fills space in the object's frame."""

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Signed distance (N,) at points (N,3), negative inside."""


def carve_rays(grid: SdfGrid, points: SurfacePoints, reach: float, hits: int = 2) -> None:
    """In place: empty the nodes that `hits` or more rays to points of the surface pass by, on their last `reach`."""
    steps = max(2, round(reach / (0.5 * grid.h)))
    count = torch.zeros(grid.R**3, dtype=torch.int64)
    for k in range(steps):
        x = points.position + (1.5 * grid.h + k * 0.5 * grid.h) * points.towards
        at = ((x - grid.lo) / grid.h).round().long()
        at = at[((at >= 0) & (at < grid.R)).all(1)]
        count += torch.bincount((at[:, 0] * grid.R + at[:, 1]) * grid.R + at[:, 2], minlength=len(count))
    empty = (count >= hits).reshape(grid.R, grid.R, grid.R)
    grid.data[..., 0] = torch.where(empty, grid.data[..., 0].clamp(min=0.7 * grid.h), grid.data[..., 0])


STAGES = (
    Stage(32, 300, (3.0, 1.5), 0.5),
    Stage(48, 400, (1.5, 0.8), 0.5),
    Stage(64, 400, (1.2, 0.6), 1.0),
)


def inside_solids(center: np.ndarray, half: float, solids: Iterable[Solid]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Points (E,3) inside the solids, middles of cubes of side 2 half / 47 of the cube of side 2 half about `center`;
    and each solid's distances at all of them, flat."""
    axes = (center[a] + np.linspace(-half, half, _SOLID_NODES) for a in range(3))
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    filled = [torch.from_numpy(s.distance(nodes).astype(np.float32)) for s in solids]
    return torch.cat([torch.from_numpy(nodes).float()[d < -0.01 * half] for d in filled] or [torch.zeros(0, 3)]), filled


def refine_object(
    obs: Observations,
    cam_from_object: np.ndarray,
    confidence: np.ndarray,
    stages: tuple[Stage, ...] = STAGES,
    config: SdfFitConfig = DEFAULT_FIT,
    start: ObjectField | None = None,
    hull_quantile: float = 0.85,
    solids: Iterable[Solid] = (),
    points: SurfacePoints | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> ObjectField:
    """Shape from silhouettes and photometry, with the poses of the valid frames refined along (config.pose_lr > 0).

    cam_from_object (F,4,4), NaN where unknown; confidence (F,) weights frames; solids: other bodies that rest in the
    object's frame (a grasping hand): the object is not where they are. Deterministic for config.seed.
    """
    valid = np.isfinite(cam_from_object[:, 0, 0]) & (obs.inside.reshape(len(obs.inside), -1).sum(1) > 50)
    index = np.flatnonzero(valid)
    center, radius = (start.center, start.radius) if start is not None else object_extent(obs, cam_from_object, valid)
    half = REACH * radius
    weight = np.clip(confidence[index], 0.05, 1.0)
    empty, filled = inside_solids(center, half, solids)
    if start is not None:
        grid = start.grid
    else:
        small = obs.scaled(min(0.5, stages[0].image_scale))
        resolution = stages[0].resolution
        h = 2 * half / (resolution - 1)
        phi = visual_hull(
            _views(small, cam_from_object, weight, index), small.K, resolution, center - half, h, hull_quantile
        )
        for d in filled:
            d = d.reshape(1, 1, *(_SOLID_NODES,) * 3)
            phi = torch.maximum(phi, -F.interpolate(d, size=phi.shape, mode="trilinear", align_corners=True)[0, 0])
        grid = SdfGrid(phi, center - half, h)
    if points is not None and start is None:
        carve_rays(grid, points, EMPTY_RAY * radius)
    fit = fit_sdf(
        grid,
        lambda scale: visible_pixels(obs.scaled(scale), index),
        torch.from_numpy(cam_from_object[index]).float(),
        torch.from_numpy(center).float(),
        radius,
        stages,
        config,
        torch.from_numpy(weight).float(),
        None if start is None else start.light,
        empty,
        2 * half / (_SOLID_NODES - 1),
        points,
        progress,
    )
    poses = np.full_like(cam_from_object, np.nan)
    poses[index] = fit.cam_from_object.double().numpy()
    error = np.full(len(cam_from_object), np.nan)
    error[index] = fit.error.numpy()
    return ObjectField(fit.grid, poses, error, fit.light, center, radius)


COARSE = (Stage(48, 250, (2.5, 1.0), 0.5),)  # a first surface


def hiders(masks: dict[str, np.ndarray]) -> np.ndarray:
    """(F,H,W) bool: pixels of what may hide the object: hands, and what else moves."""
    given = [masks[k] for k in ("right", "left", "other") if k in masks]
    return np.any(given or [np.zeros_like(masks["object"])], axis=0)


def first_surface(
    sequence: Sequence,
    cam_from_object: np.ndarray,
    confidence: np.ndarray,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> Mesh:
    """Where the object roughly is, from masks that may be wrong in single frames: what hands are is not asked, for a
    hand that is off, or print taken for one, would eat the object. cam_from_object (F,4,4), NaN where unknown.
    """
    obs = Observations(sequence.frames, sequence.masks["object"], hiders(sequence.masks), sequence.K)
    weight = np.clip(confidence * sequence.mask_confidence["object"], 0.02, 1)
    config = SdfFitConfig(pose_lr=0.0, hidden=0.05, seed=seed)
    field = refine_object(obs, cam_from_object, weight, COARSE, config, progress=progress)
    return surface(field.grid)[0]


def _views(obs: Observations, poses: np.ndarray, weight: np.ndarray, index: np.ndarray) -> list[View]:
    """What the frames `index` say about the object's outline."""
    depth = [None] * len(obs.inside) if obs.occluder_depth is None else obs.occluder_depth
    out = []
    for w, i in zip(weight, index, strict=True):
        unsure = obs.unsure(i)
        out.append(View(poses[i], obs.inside[i] & ~unsure, unsure, float(w), depth[i]))
    return out


def free_space(
    obs: Observations, cam_from_object: np.ndarray, confidence: np.ndarray, share: float = 0.04
) -> Callable[[np.ndarray], np.ndarray]:
    """How far points (N,3) of the object's frame stand in space that frames see to be empty: metres (N,), 0 if not.

    A few frames must agree, at least `share` of them: masks and poses are not exact. Frames of little confidence, and
    pixels of and beside what may hide the object, say nothing.
    """
    views = []
    for i in np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0]) & (confidence > 0.3)):
        if obs.inside[i].sum() > 50:
            solid = obs.inside[i] | obs.unsure(i)
            views.append((cam_from_object[i], cv2.distanceTransform((~solid).astype(np.uint8), cv2.DIST_L2, 5)))
    rank = max(2, int(share * len(views)))

    def outside(x: np.ndarray) -> np.ndarray:
        if len(views) < rank:
            return np.zeros(len(x))
        most = np.zeros((rank, len(x)))  # the largest so far
        for pose, pixels in views:
            c = x @ pose[:3, :3].T + pose[:3, 3]
            z = np.maximum(c[:, 2], 1e-6)
            uv = np.floor(c[:, :2] / z[:, None] * obs.K[[0, 1], [0, 1]] + obs.K[:2, 2])
            h, w = pixels.shape
            ok = ((uv >= 0) & (uv < [w, h])).all(1)
            u, v = np.where(ok[:, None], uv, 0).astype(int).T
            value = np.where(ok, pixels[v, u] * z / obs.K[0, 0], 0.0)
            for k in range(rank):
                most[k], value = np.maximum(most[k], value), np.minimum(most[k], value)
        return most[-1]

    return outside


def beside(unknown: np.ndarray) -> np.ndarray:
    """(H,W) bool: within a few pixels of an occluder, where masks of either side are not to be believed."""
    k = 2 * max(1, round(0.009 * unknown.shape[1])) + 1
    return cv2.dilate(unknown.astype(np.uint8), np.ones((k, k), np.uint8)) > 0


def visible_pixels(obs: Observations, index: np.ndarray, ring: int = 14) -> Pixels:
    """Pixels within `ring` (at 480 wide) of the object's, of the frames `index`; a hidden one's limit is its hider's
    distance."""
    w = obs.inside.shape[2]
    ring = max(5, round(ring * w / 480))
    kernel = np.ones((2 * ring + 1, 2 * ring + 1), np.uint8)
    view, direction, color, label, clear, outline, limit = [], [], [], [], [], [], []
    for n, i in enumerate(index):
        inside, unknown = obs.inside[i], obs.unknown[i]
        near = cv2.dilate(inside.astype(np.uint8), kernel) > 0
        y, x = np.nonzero(near & (unknown | ~obs.unsure(i)))
        d = np.stack(
            [(x + 0.5 - obs.K[0, 2]) / obs.K[0, 0], (y + 0.5 - obs.K[1, 2]) / obs.K[1, 1], np.ones(len(x))], -1
        )
        length = np.linalg.norm(d, axis=1)
        depth = np.full(len(x), np.inf) if obs.occluder_depth is None else obs.occluder_depth[i][y, x]
        view.append(np.full(len(x), n))
        direction.append(d / length[:, None])
        color.append(obs.frames[i][y, x] / 255.0)
        label.append(np.where(unknown[y, x], -1.0, inside[y, x]))
        clear.append(cv2.erode(inside.astype(np.uint8), np.ones((3, 3), np.uint8))[y, x] * ~unknown[y, x])
        background = cv2.dilate((~(inside | obs.unsure(i))).astype(np.uint8), kernel) > 0
        outline.append(background[y, x])
        limit.append(np.where(unknown[y, x], depth * length, np.inf))
    rows = [
        torch.from_numpy(np.concatenate(a).astype(np.float32)) for a in (direction, color, label, clear, outline, limit)
    ]
    return Pixels(torch.from_numpy(np.concatenate(view)), *rows[:4], rows[4] > 0, rows[5])
