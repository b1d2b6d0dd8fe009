"""A signed-distance grid fitted to masked pixels, coarse to fine, with the views' poses refined along if wished.

The loop that methods with a grid share. Rendering is NeuS (Wang et al., NeurIPS 2021, eq. 13) in a marched band; where
the pixels come from and what the grid starts as is the caller's. Four things keep shape and poses from drifting
(measured by benchmarks/recon.py):
- colour is compared as the mean colour of what the ray meets, inside the outline, not as colour times coverage: else
  every pixel of the mask asks for more coverage and none of the background for less, and the object grows;
- what all poses do together (a rigid motion of the object's frame, a common scale) changes no picture and is taken out
  of every pose step: else an object too large for its masks moves away from the camera, and the scale is lost;
- poses are moved along the camera's axes, where the badly told distance is apart from the well told rest;
- poses answer for colour and for the outline, not for what is missing inside it, hidden, or far on the wrong side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.rigid import so3_exp
from ..kernels.grid import SdfGrid


@dataclass(frozen=True)
class Pixels:
    """Pixels of all views, a row each."""

    view: Tensor  # (N,) int, row of the poses
    direction: Tensor  # (N,3) unit, camera frame
    color: Tensor  # (N,3) in [0,1]
    label: Tensor  # (N,) 1 object, 0 background, -1 hidden by something else
    clear: Tensor  # (N,) 1 where the colour is the object's alone, 0 elsewhere: a pixel on the outline mixes two
    outline: Tensor  # (N,) bool, beside background or background itself: tells where the object ends
    limit: Tensor  # (N,) distance along the ray to what hides it, inf where not known


@dataclass(frozen=True)
class SurfacePoints:
    """Triangulated points of the surface, a row for each time one was seen: the ray to it is empty."""

    position: Tensor  # (N,3) object frame
    towards: Tensor  # (N,3) unit, object frame, from the point to the camera that saw it


@dataclass(frozen=True)
class Stage:
    """One level of the coarse-to-fine fit."""

    resolution: int
    iterations: int
    beta: tuple[float, float]  # logistic width in voxels, start and end
    image_scale: float


@dataclass(frozen=True)
class SdfFitConfig:
    """How the fit is done; lengths in voxels or radii, so that it does not depend on the object's size."""

    rays: int = 3072  # per iteration
    samples: int = 16  # per ray, all in the band
    pose_lr: float = 5e-3  # radians, and object radii, per step; 0: poses stay
    silhouette: float = 0.2  # weight of the cross entropy of coverage and mask, beside 1 for colour
    hidden: float = 0.2  # weight of coverage where something at an unknown depth hides the object
    points: float = 0.03  # weight of the distance, in voxels, between the surface and points known to lie on it
    eikonal: float = 0.02
    smooth: float = 4e-3
    seed: int = 0


DEFAULT_FIT = SdfFitConfig()
EMPTY_RAY = 0.3  # of the object's radius: the last part of a ray to a surface point that is taken as empty
_STILL = 0.3  # share of the rays that leave the poses alone, while poses are refined
_POINTS = 768  # surface points per iteration
_SLANT = 0.3  # least cosine between the surface's normal and the ray that a point is seen along
_FAR = 0.05  # coverage this far on the wrong side of its mask moves no pose


@dataclass(frozen=True)
class SdfFit:
    """What `fit_sdf` found."""

    grid: SdfGrid
    cam_from_object: Tensor  # (V,4,4)
    light: Tensor  # (9,), see `shading`
    error: Tensor  # (V,) running mean of colour + silhouette error; NaN for views without pixels


def fit_sdf(
    grid: SdfGrid,
    pixels: Callable[[float], Pixels],
    cam_from_object: Tensor,
    center: Tensor,
    radius: float,
    stages: tuple[Stage, ...],
    config: SdfFitConfig = DEFAULT_FIT,
    weight: Tensor | None = None,
    light: Tensor | None = None,
    empty: Tensor | None = None,
    cell: float = 0.0,
    points: SurfacePoints | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> SdfFit:
    """Fit `grid` (left as it is; a copy is returned) and, with config.pose_lr > 0, the poses.

    pixels(image_scale) gives the pixels of a stage; cam_from_object (V,4,4); center (3,), radius: the ball in the
    object's frame about which poses turn, in the poses' units; weight (V,) of each view; light (9,) to start from;
    empty (E,3): middles of cubes of side `cell` where the object is known not to be; points: known to lie on the
    surface. Deterministic for config.seed.
    """
    if cam_from_object.ndim != 3 or cam_from_object.shape[1:] != (4, 4) or not cam_from_object.isfinite().all():
        raise ValueError(f"cam_from_object must be finite (V,4,4), not {tuple(cam_from_object.shape)}")
    if not stages:
        raise ValueError("fit_sdf needs a stage or more")
    device = grid.data.device
    base, center = cam_from_object.float().to(device), center.to(device)
    views = len(base)
    if weight is not None and weight.shape != (views,):
        raise ValueError(f"weight is one number per view, ({views},), not {tuple(weight.shape)}")
    weight = torch.ones(views, device=device) if weight is None else weight.to(device)
    light = (torch.zeros(9) if light is None else light).to(device, copy=True).requires_grad_(True)
    xi = torch.zeros(views, 6, device=device, requires_grad=True)
    empty = None if empty is None else empty.to(device)
    if points is not None:
        points = SurfacePoints(points.position.float().to(device), points.towards.float().to(device))
    opt = torch.optim.Adam([{"params": [xi], "lr": config.pose_lr}, {"params": [light], "lr": 5e-3}], betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(config.seed)  # on the CPU: the same draws on every device
    moves = config.pose_lr > 0
    share_still = _STILL if moves else 1.0
    modes = gauge_modes(base, center, radius)
    error = torch.full((views,), float("nan"), device=device)
    total, done, scale, data = sum(s.iterations for s in stages), 0, None, None
    for n, stage in enumerate(stages):
        if scale != stage.image_scale:
            scale, data = stage.image_scale, _on(device, pixels(stage.image_scale))
        if n == 0 or grid.R != stage.resolution:
            grid = grid.upsampled(stage.resolution)
        h = grid.h
        for k in range(stage.iterations):
            share = k / stage.iterations
            fading = 0.2**share if stage is stages[-1] else 1.0
            beta = stage.beta[0] * (stage.beta[1] / stage.beta[0]) ** share * h
            opt.param_groups[0]["lr"] = config.pose_lr * 0.03 ** (done / total)
            pick = torch.randint(len(data.view), (config.rays,), generator=generator).to(device)
            f, label, limit = data.view[pick], data.label[pick], data.limit[pick]
            pose = compose(base, xi if moves else xi.detach(), center, radius)
            o, d = object_rays(pose, f, data.direction[pick])
            # What is missing inside the outline, or too much behind a hand, is the shape's fault: were poses to answer
            # for it, they would move to cover a hole. So a ray either tells the shape where the object is, or moves
            # poses too: by its colour, and near the outline by its coverage. Hidden pixels move no pose.
            inner = (label > 0) & ~data.outline[pick]
            shape_only = torch.rand(len(pick), generator=generator).to(device) < share_still
            still = shape_only | (label < 0)
            if moves:
                o, d = (torch.where(still[:, None], x.detach(), x) for x in (o, d))
            rgb, acc, normal = render_band(grid, o, d, limit, beta, config.samples, generator)
            n_cam = (pose[f, :3, :3] @ normal[..., None])[..., 0]
            predicted = rgb / acc.clamp(min=0.05)[:, None] * shading(n_cam, light)[:, None]
            seen = label.clamp(min=0)
            color = (predicted - data.color[pick]).abs().mean(-1) * data.clear[pick]
            # where something may hide the object nothing is known, but what no view needs should not be there
            # (in front of a known occluder it cannot be at all, or it would be seen)
            weak = (label < 0) & ~limit.isfinite()
            # a mask pixel far on the wrong side moves no pose either: a leak, a bite, or a part that is not there yet
            edge = torch.where(still, 1e-3, _FAR)
            bce = F.binary_cross_entropy(torch.minimum(acc.clamp(min=edge), 1 - edge), seen, reduction="none")
            bce = bce * torch.where(shape_only, 1 / share_still, torch.where(inner, 0.0, 1.0))
            silhouette = torch.where(weak, config.hidden * acc, bce)
            w = weight[f]
            loss = (w * (color + config.silhouette * silhouette)).mean() + 1e-3 * light.square().sum()
            if empty is not None and len(empty):
                at = empty[torch.randint(len(empty), (512,), generator=generator).to(device)]
                at = at + cell * (torch.rand(at.shape, generator=generator).to(device) - 0.5)
                loss = loss + 2.0 * (grid.sample(at)[0][:, 0] / (4 * h)).clamp(max=0).square().mean()
            if points is not None and len(points.position):
                distance = lambda x: grid.sample(x)[0][:, 0]  # noqa: E731, B023
                loss = loss + config.points * off_points(distance, points, h, EMPTY_RAY * radius, generator)
            loss.backward()
            with torch.no_grad():
                e = color + config.silhouette * silhouette.clamp(max=2)
                count = torch.bincount(f, minlength=views)
                mean = torch.zeros_like(error).index_add(0, f, e) / count.clamp(min=1)
                new = torch.where(error.isnan(), mean, 0.95 * error + 0.05 * mean)
                error = torch.where(count > 0, new, error)
            grid.update(config.eikonal, config.smooth, 8 * h, 0.05 * h * fading, 0.1 * 0.3 ** (done / total))
            opt.step()
            opt.zero_grad()
            if moves:
                with torch.no_grad():
                    xi.copy_(without(xi, modes, weight))
            done += 1
            if progress and done % 25 == 0:
                progress(done / total, f"object shape and pose, error {loss.item():.3f}")
    return SdfFit(grid, compose(base, xi.detach(), center, radius), light.detach(), error)


def off_points(
    sdf: Callable[[Tensor], Tensor], points: SurfacePoints, h: float, reach: float, generator: torch.Generator
) -> Tensor:
    """How far the surface is from a draw of points, in units of h: the distance at the points, what fills the rays to
    them on their last `reach`, and what is empty just behind them (within h).

    sdf: points (N,3) -> distances (N,), in the points' units as h and reach.
    """
    device = points.position.device
    pick = torch.randint(len(points.position), (_POINTS,), generator=generator).to(device)
    x, u = points.position[pick], points.towards[pick]
    along = torch.rand(2, _POINTS, 1, generator=generator).to(device)
    free, behind = h + reach * along[0], h * along[1]
    value = sdf(torch.cat([x, x + free * u, x - behind * u])).reshape(3, _POINTS)
    want = (_SLANT * free[:, 0]).clamp(max=2 * h)
    out = value[0].abs() + (want - value[1]).clamp(min=0) + (_SLANT * behind[:, 0] + value[2]).clamp(min=0)
    return out.mean() / h


def _on(device: torch.device, pixels: Pixels) -> Pixels:
    return Pixels(**{f.name: getattr(pixels, f.name).to(device) for f in fields(Pixels)})


def shading(normal: Tensor, light: Tensor) -> Tensor:
    """Positive factor (N,) at unit normals (N,3).

    Second-order spherical-harmonic irradiance (Ramamoorthi and Hanrahan, 2001).
    """
    x, y, z = normal.unbind(-1)
    basis = torch.stack([torch.ones_like(x), y, z, x, x * y, y * z, 3 * z * z - 1, x * z, x * x - y * y], -1)
    return (1.0 + basis @ light).clamp(0.1, 3.0)


def compose(base: Tensor, xi: Tensor, center: Tensor, radius: float) -> Tensor:
    """(V,4,4): base, then turned by the rotation vector xi[:, :3] about the object's centre and moved by xi[:, 3:] *
    radius, both along the camera's axes.

    (Along these what pictures tell well, place and turn in the image, is apart from what they tell badly, the distance;
    Adam scales each number by itself.)
    """
    r = so3_exp(xi[:, :3]) @ base[:, :3, :3]
    at = (base[:, :3, :3] @ center[:, None])[..., 0] + base[:, :3, 3] + radius * xi[:, 3:]
    out = torch.eye(4, device=base.device).repeat(len(base), 1, 1)
    out[:, :3, :3] = r
    out[:, :3, 3] = at - (r @ center[:, None])[..., 0]
    return out


def gauge_modes(base: Tensor, center: Tensor, radius: float) -> Tensor:
    """(V,6,7) what `compose`'s numbers do, to first order, when the object's frame turns (3), moves (3) or grows (1).

    Growth by s moves the object's centre, seen at c in the camera's frame, by s c.
    """
    modes = torch.zeros(len(base), 6, 7, device=base.device)
    modes[:, :3, :3] = modes[:, 3:, 3:6] = base[:, :3, :3]
    modes[:, 3:, 6] = ((base[:, :3, :3] @ center[:, None])[..., 0] + base[:, :3, 3]) / radius
    return modes


def without(xi: Tensor, modes: Tensor, weight: Tensor) -> Tensor:
    """(V,6) less the part of it that `modes` (V,6,M) explain, by least squares with a weight (V,) per view."""
    a = modes * weight[:, None, None]
    normal = torch.einsum("vim,vin->mn", a, modes)
    normal = normal + (1e-6 * normal.diagonal().mean() + 1e-30) * torch.eye(len(normal), device=normal.device)
    return xi - modes @ torch.linalg.solve(normal, torch.einsum("vim,vi->m", a, xi))


def object_rays(pose: Tensor, view: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and unit directions (N,3) in the object's frame of camera rays (N,3) of the poses (V,4,4)[view]."""
    r, t = pose[:, :3, :3], pose[:, :3, 3]
    origin = -(r.transpose(1, 2) @ t[..., None])[..., 0]
    return origin[view], (direction[:, None] @ r[view])[:, 0]


def render_band(
    grid: SdfGrid, o: Tensor, d: Tensor, limit: Tensor, beta: float, samples: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Premultiplied colour (N,3), coverage up to `limit` (N,), unit normal at the expected depth (N,3)."""
    t0, t1, _ = grid.march(o, d, 0.6 * grid.h, 5 * beta)
    t1 = torch.minimum(t1, torch.maximum(limit, t0 + 1e-4 * grid.h))
    jitter = torch.rand(len(o), samples, generator=generator).to(o.device)
    t = t0[:, None] + (t1 - t0)[:, None] * ((torch.arange(samples, device=o.device) + jitter) / samples)
    rgb, acc, depth = grid.render(o, d, t, beta)
    with torch.no_grad():
        x = o + d * (depth / acc.clamp(min=1e-3))[:, None]
        _, normal = grid.sample(x)
    return rgb, acc, F.normalize(normal, dim=-1, eps=1e-6)
