"""Object shape and pose together: a signed-distance grid rendered against the frames, the frames' poses refined along.

Rendering is NeuS (Wang et al., NeurIPS 2021, eq. 13) in a marched band. Pixels of hands and of anything else that may
hide the object are unknown: they neither fill nor carve. The pose step is small by default: a grid coarser than the
object's print blurs it, and a large step then bends good poses by two to three degrees (measured on the demo clip,
from true poses). Lengths are in the units of the poses given (metres once the grasp has fixed the scale).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.rigid import so3_exp
from ..kernels.grid import SdfGrid
from ..shapes.sdf import View, visual_hull

_SAMPLES = 16


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


def shading(normal: Tensor, light: Tensor) -> Tensor:
    """Positive factor (N,) at unit normals (N,3).

    Second-order spherical-harmonic irradiance (Ramamoorthi and Hanrahan, 2001).
    """
    x, y, z = normal.unbind(-1)
    basis = torch.stack([torch.ones_like(x), y, z, x, x * y, y * z, 3 * z * z - 1, x * z, x * x - y * y], -1)
    return (1.0 + basis @ light).clamp(0.1, 3.0)


class Solid(Protocol):
    """Something else that fills space in the object's frame."""

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Signed distance (N,) at points (N,3), negative inside."""


@dataclass(frozen=True)
class Stage:
    """One level of the coarse-to-fine refinement."""

    resolution: int
    iterations: int
    beta: tuple[float, float]  # logistic width in voxels, start and end
    image_scale: float


STAGES = (
    Stage(32, 300, (3.0, 1.5), 0.5),
    Stage(48, 400, (1.5, 0.8), 0.5),
    Stage(64, 400, (1.2, 0.6), 1.0),
)


def refine_object(
    obs: Observations,
    cam_from_object: np.ndarray,
    confidence: np.ndarray,
    stages: tuple[Stage, ...] = STAGES,
    rays: int = 3072,
    pose_lr: float = 5e-3,
    seed: int = 0,
    refine_poses: bool = True,
    start: ObjectField | None = None,
    hull_quantile: float = 0.85,
    hidden_weight: float = 0.2,
    smooth: float = 1e-3,
    solids: Sequence[Solid] = (),
    progress: Callable[[float, str], None] | None = None,
) -> ObjectField:
    """Shape from silhouettes and photometry, with the poses of the valid frames refined along.

    cam_from_object (F,4,4), NaN where unknown; confidence (F,) weights frames; solids: other bodies that rest in the
    object's frame (a grasping hand): the object is not where they are. Deterministic for a seed.
    """
    valid = np.isfinite(cam_from_object[:, 0, 0]) & (obs.inside.reshape(len(obs.inside), -1).sum(1) > 50)
    index = np.flatnonzero(valid)
    center, radius = (start.center, start.radius) if start is not None else object_extent(obs, cam_from_object, valid)
    half = 1.15 * radius
    generator = torch.Generator().manual_seed(seed)
    base = torch.from_numpy(cam_from_object[index]).float()
    xi = torch.zeros(len(index), 6, requires_grad=True)
    light = torch.zeros(9) if start is None else start.light.clone()
    light.requires_grad_(True)
    weight = torch.from_numpy(np.clip(confidence[index], 0.05, 1.0)).float()
    nodes = np.stack(
        np.meshgrid(*(center[a] + np.linspace(-half, half, 48) for a in range(3)), indexing="ij"), -1
    ).reshape(-1, 3)
    filled = [torch.from_numpy(s.distance(nodes).astype(np.float32)).reshape(48, 48, 48) for s in solids]
    empty_points = torch.cat(
        [torch.from_numpy(nodes).float()[d.ravel() < -0.01 * half] for d in filled] or [torch.zeros(0, 3)]
    )
    total, done, grid, level = sum(s.iterations for s in stages), 0, None, None
    opt = torch.optim.Adam([{"params": [xi], "lr": pose_lr}, {"params": [light], "lr": 5e-3}], betas=(0.9, 0.99))
    running = torch.full((len(index),), float("nan"))
    c0 = torch.from_numpy(center).float()
    for stage in stages:
        h = 2 * half / (stage.resolution - 1)
        if level is None or level[0] != stage.image_scale:
            level = (stage.image_scale, _rays(obs.scaled(stage.image_scale), index))
        frame_of, direction, color, mask, limit = level[1]
        if grid is None:
            if start is not None:
                grid = start.grid.upsampled(stage.resolution)
            else:
                small = obs.scaled(min(0.5, stage.image_scale))
                views = [
                    View(
                        cam_from_object[i],
                        small.inside[i] & ~small.unsure(i),
                        small.unsure(i),
                        float(np.clip(confidence[i], 0.05, 1)),
                        None if small.occluder_depth is None else small.occluder_depth[i],
                    )
                    for i in index
                ]
                phi = visual_hull(views, small.K, stage.resolution, center - half, h, hull_quantile)
                for d in filled:
                    phi = torch.maximum(
                        phi, -F.interpolate(d[None, None], size=phi.shape, mode="trilinear", align_corners=True)[0, 0]
                    )
                grid = SdfGrid(phi, center - half, h)
        elif grid.R != stage.resolution:
            grid = grid.upsampled(stage.resolution)
        for k in range(stage.iterations):
            share = k / stage.iterations
            beta = stage.beta[0] * (stage.beta[1] / stage.beta[0]) ** share * h
            opt.param_groups[0]["lr"] = pose_lr * 0.03 ** (done / total)
            pick = torch.randint(len(direction), (rays,), generator=generator)
            f = frame_of[pick]
            o, d = _object_rays(base, xi, c0, radius, f, direction[pick])
            rgb, acc, normal = _render(grid, o, d, limit[pick], beta, generator)
            r_cam = (so3_exp(xi[f, :3]) if refine_poses else None, base[f, :3, :3])
            n_cam = _rotate(r_cam, normal)
            predicted = rgb * shading(n_cam, light)[:, None]
            seen, hidden = mask[pick].clamp(min=0), mask[pick] < 0
            w = weight[f]
            residual = (predicted - color[pick]).abs().mean(-1) * seen
            # where a hand may hide the object nothing is known, but what no frame needs should not be there
            # (in front of a known hand it cannot be at all, or it would be seen)
            weak = hidden & ~limit[pick].isfinite()
            silhouette = torch.where(
                weak, hidden_weight * acc, F.binary_cross_entropy(acc.clamp(1e-3, 1 - 1e-3), seen, reduction="none")
            )
            loss = (w * (residual + 0.2 * silhouette)).mean() + 1e-3 * light.square().sum()
            if len(empty_points):
                at = empty_points[torch.randint(len(empty_points), (512,), generator=generator)]
                at = at + (torch.rand(at.shape, generator=generator) - 0.5) * (half / 24)
                loss = loss + 2.0 * (grid.sample(at)[0][:, 0] / (4 * h)).clamp(max=0).square().mean()
            loss.backward()
            with torch.no_grad():
                e = residual.detach() + 0.2 * silhouette.detach().clamp(max=2)
                for_frame = torch.zeros_like(running).index_add(0, f, e) / torch.bincount(
                    f, minlength=len(index)
                ).clamp(min=1)
                running = torch.where(running.isnan(), for_frame, 0.95 * running + 0.05 * for_frame)
            grid.reg(0.02, smooth, 8 * h)
            grid.blur(2)
            grid.adam(0.05 * h * (0.2**share if stage is stages[-1] else 1.0), 0.1 * 0.3 ** (done / total))
            if refine_poses:
                opt.step()
            opt.zero_grad()
            done += 1
            if progress and done % 25 == 0:
                progress(done / total, f"object shape and pose, error {loss.item():.3f}")
    poses = np.full_like(cam_from_object, np.nan)
    poses[index] = _compose(base, xi.detach(), c0, radius).double().numpy()
    error = np.full(len(cam_from_object), np.nan)
    error[index] = running.numpy()
    return ObjectField(grid, poses, error, light.detach(), center, radius)


def beside(unknown: np.ndarray) -> np.ndarray:
    """(H,W) bool: within a few pixels of an occluder, where masks of either side are not to be believed."""
    k = 2 * max(1, round(0.009 * unknown.shape[1])) + 1
    return cv2.dilate(unknown.astype(np.uint8), np.ones((k, k), np.uint8)) > 0


def _rays(obs: Observations, index: np.ndarray, ring: int = 14):
    """Pixels within `ring` (at 480 wide) of the object's: frame, unit direction, colour, label, limit.

    label: 1 object, 0 background, -1 hidden; limit: distance along the ray to what hides it, inf where not known.
    """
    out = [[] for _ in range(5)]
    w = obs.inside.shape[2]
    ring = max(5, round(ring * w / 480))
    for n, i in enumerate(index):
        inside, unknown = obs.inside[i], obs.unknown[i]
        near = cv2.dilate(inside.astype(np.uint8), np.ones((2 * ring + 1, 2 * ring + 1), np.uint8)) > 0
        y, x = np.nonzero(near & (unknown | ~obs.unsure(i)))
        d = np.stack(
            [(x + 0.5 - obs.K[0, 2]) / obs.K[0, 0], (y + 0.5 - obs.K[1, 2]) / obs.K[1, 1], np.ones(len(x))], -1
        )
        length = np.linalg.norm(d, axis=1)
        out[0].append(np.full(len(x), n))
        out[1].append(d / length[:, None])
        out[2].append(obs.frames[i][y, x] / 255.0)
        out[3].append(np.where(unknown[y, x], -1.0, inside[y, x]))
        depth = np.full(len(x), np.inf) if obs.occluder_depth is None else obs.occluder_depth[i][y, x]
        out[4].append(np.where(unknown[y, x], depth * length, np.inf))
    t = lambda k: torch.from_numpy(np.concatenate(out[k]).astype(np.float32))  # noqa: E731
    return torch.from_numpy(np.concatenate(out[0])), t(1), t(2), t(3), t(4)


def _compose(base: Tensor, xi: Tensor, center: Tensor, radius: float) -> Tensor:
    """base @ (rotation about the object's centre, then translation by xi[3:] * radius)."""
    r = so3_exp(xi[:, :3])
    out = torch.eye(4).repeat(len(base), 1, 1)
    out[:, :3, :3] = base[:, :3, :3] @ r
    shift = center + radius * xi[:, 3:] - (r @ center[:, None])[..., 0]
    out[:, :3, 3] = (base[:, :3, :3] @ shift[..., None])[..., 0] + base[:, :3, 3]
    return out


def _object_rays(base, xi, center, radius, f, direction):
    """Origins and unit directions in the object frame of camera rays `direction` of frames `f`."""
    pose = _compose(base, xi, center, radius)
    r, t = pose[:, :3, :3], pose[:, :3, 3]
    origin = -(r.transpose(1, 2) @ t[..., None])[..., 0]
    return origin[f], (direction[:, None] @ r[f])[:, 0]


def _rotate(r_cam, normal):
    r, base = r_cam
    if r is not None:
        normal = (r @ normal[..., None])[..., 0]
    return (base @ normal[..., None])[..., 0]


def _render(grid: SdfGrid, o: Tensor, d: Tensor, limit: Tensor, beta: float, generator: torch.Generator):
    """Premultiplied colour (N,3), coverage up to `limit` (N,), unit normal at the expected depth (N,3)."""
    t0, t1, _ = grid.march(o, d, 0.6 * grid.h, 5 * beta)
    t1 = torch.minimum(t1, torch.maximum(limit, t0 + 1e-4 * grid.h))
    jitter = torch.rand(len(o), _SAMPLES, generator=generator)
    t = t0[:, None] + (t1 - t0)[:, None] * ((torch.arange(_SAMPLES) + jitter) / _SAMPLES)
    rgb, acc, depth = grid.render(o, d, t, beta)
    with torch.no_grad():
        x = o + d * (depth / acc.clamp(min=1e-3))[:, None]
        _, normal = grid.sample(x)
    return rgb, acc, F.normalize(normal, dim=-1, eps=1e-6)
