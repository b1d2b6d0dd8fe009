"""The bodies of a clip as one medium: hands, object and background rendered together (HOLD, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..render.medium import LaplaceDensity, LogisticDepth
from ..render.samplers import Bounds, Rays, Samples, camera_rays, error_bounded, march_band, sphere_bounds, stratified
from ..render.volume import Along, Body, Matter, Points, Rendered, composite, evaluate
from .hold_canonical import RigidPoses, SkinnedPoses
from .hold_fields import Background, Field, GridField, field_mesh

DensityKind = Literal["neus", "laplace"]


class Density(nn.Module):
    """Optical depth of a distance field on an interval: VolSDF's Laplace density or NeuS, of one width per body.

    The width is learned in units of the body's size, or (`learned` False) set from outside, wide to narrow.
    """

    def __init__(self, kind: DensityKind, width: float, unit: float, learned: bool):
        """width, unit: metres."""
        super().__init__()
        self.kind, self.unit = kind, unit
        relative = width / unit
        self.law = LaplaceDensity(relative, 1e-4) if kind == "laplace" else LogisticDepth(1 / relative)
        self.law.requires_grad_(learned)

    @property
    def width(self) -> Tensor:
        """Metres."""
        return self.unit * (self.law.beta if isinstance(self.law, LaplaceDensity) else 1 / self.law.inv_s)

    @torch.no_grad()
    def set(self, width: float) -> None:
        """Metres."""
        relative = width / self.unit
        laplace = isinstance(self.law, LaplaceDensity)
        self.law.raw.fill_(relative - self.law.least if laplace else float(np.log(1 / relative)) / 10)

    def forward(self, sdf: Tensor, slope: Tensor, length: Tensor) -> Tensor:
        """tau (M,) of intervals with these distances at their middle and slopes along the ray."""
        s, length = sdf / self.unit, length / self.unit
        if isinstance(self.law, LaplaceDensity):
            return self.law(s) * length
        half = 0.5 * length * slope
        return self.law(s - half, s + half)


@dataclass(frozen=True)
class Sampling:
    """Where along a ray a body is asked."""

    cached: bool  # in a band of the cached distance (`fast`), or error-bounded (`paper`)
    edges: int = 14  # of the band
    reach: float = 0.006  # metres, least half width of a band; a hand's field may be this far from its template
    bounded: int = 64  # error-bounded: by inverse CDF
    extra: int = 34  # error-bounded: of the refined set


@dataclass(frozen=True)
class HoldBody:
    """One body: poses, field and density. `name` is "object", "right" or "left"."""

    name: str
    poses: RigidPoses | SkinnedPoses
    field: Field
    density: Density
    sampling: Sampling

    @property
    def scale(self) -> Tensor | float:
        return self.poses.scale if isinstance(self.poses, RigidPoses) else 1.0

    def sdf(self, x: Tensor, frame: Tensor) -> Tensor:
        """Signed distance (M,) in world metres at points (M,3) of the frames (M,): field and poses both learn from it.

        Far from a hand it is `hold_canonical.FAR`.
        """
        at = self.poses.to_canonical(x, frame)
        return torch.where(at.known, self.scale * self.field.sdf(at.points), torch.full_like(x[:, 0], 0.1))

    def matter(self, p: Points) -> Matter:
        """What `render.volume` asks: a similarity of scale s makes distances s times as large."""
        at = self.poses.to_canonical(p.x, p.frame)
        sdf, gradient, rgb = self.field(at.points, p.frame, at.jacobian)
        sdf, gradient = self.scale * sdf, self.scale * (at.jacobian.mT @ gradient[..., None])[..., 0]
        tau = self.density(sdf, (gradient * p.d).sum(-1), p.length)
        return Matter(torch.where(at.known, tau, torch.zeros_like(tau)), rgb, gradient)

    def ball(self, frame: Tensor) -> tuple[Tensor, float]:
        """Centre (N,3) in the world of a ball round the body, and its radius."""
        if isinstance(self.poses, RigidPoses):
            lo, hi = self.field.box()
            middle = 0.5 * (lo + hi).to(frame.device)
            return self.poses.to_world(middle.expand(len(frame), 3), frame), float(
                self.poses.scale.detach()
            ) * self.field.radius
        frames, row = torch.unique(frame, return_inverse=True)
        v = self.poses.posed(frames).vertices
        middle = v.mean(1)
        return middle[row], float((v - middle[:, None]).norm(dim=-1).max()) + 0.02

    @torch.no_grad()
    def sample(self, rays: Rays, jitter: bool = False, generator: torch.Generator | None = None) -> Samples:
        """Where the body may be along rays; frames without a pose give none."""
        s, known = self.sampling, self.poses.known[rays.frame]
        width = float(self.density.width)
        if not s.cached:
            centre, radius = self.ball(rays.frame)
            bounds = sphere_bounds(rays, radius, centre, near=1e-3)
            bounds = Bounds(bounds.near, torch.where(known, bounds.far, bounds.near))
            query = lambda x, ray: self.sdf(x, rays.frame[ray])  # noqa: E731
            return error_bounded(query, rays, bounds, width, s.bounded, s.extra, jitter, generator, more=128)
        band = 5 * width
        if isinstance(self.poses, RigidPoses) and isinstance(self.field, GridField):
            scale = float(self.poses.scale.detach())
            grid = self.field.grid
            local = self.poses.rays(rays)
            found = march_band(grid, local, s.edges, band / scale, 0.6 * grid.h, jitter, generator)
            return Samples(found.t * scale, found.live & known[:, None])
        t, met = self.poses.trace(rays, max(band, s.reach))
        far = torch.where(met & known, t + 3 * max(band, s.reach), t)
        return stratified(Bounds(t, far), s.edges, jitter, generator)


@dataclass
class HoldScene:
    """All bodies of a clip, column by column of what is rendered, and what is behind them."""

    bodies: list[HoldBody]
    background: Background | None = None
    shared: bool = False  # every body asked on all bodies' intervals; see `render.volume.evaluate`

    @property
    def names(self) -> list[str]:
        return [b.name for b in self.bodies]

    def modules(self) -> nn.ModuleList:
        """Everything that learns."""
        parts = [m for b in self.bodies for m in (b.poses, b.field, b.density)]
        return nn.ModuleList(parts + ([] if self.background is None else [self.background]))

    def along(self, rays: Rays, jitter: bool = False, generator: torch.Generator | None = None) -> Along:
        """What the rays meet, before it is composited."""
        medium = [Body(b.matter, lambda r, b=b: b.sample(r, jitter, generator)) for b in self.bodies]
        return evaluate(rays, medium, self.shared)

    def only(self, *names: str) -> HoldScene:
        """The scene without the other bodies."""
        return replace(self, bodies=[b for b in self.bodies if b.name in names])


@dataclass(frozen=True)
class HoldView:
    """A picture of a frame from any camera."""

    rgb: np.ndarray  # (H,W,3) in [0,1]
    opacity: np.ndarray  # (H,W)
    depth: np.ndarray  # (H,W) metres along the camera's z, 0 where nothing is
    normal: np.ndarray  # (H,W,3) unit, in the viewing camera's frame, or 0
    shares: dict[str, np.ndarray]  # name -> (H,W) visible share of the body: the soft mask
    amodal: dict[str, np.ndarray]  # name -> (H,W) opacity of the body without the others


@torch.no_grad()
def render_view(
    scene: HoldScene,
    K: np.ndarray,
    size: tuple[int, int],
    frame: int,
    frame_from_view: np.ndarray | None = None,
    only: Sequence[str] | None = None,
    background: tuple[float, float, float] = (1.0, 1.0, 1.0),
    chunk: int = 8192,
) -> HoldView:
    """Colour, depth, normals and masks of one frame, from its own camera or a novel one.

    K (3,3) of the view; size (width, height); frame_from_view (4,4): where the viewing camera is in the frame's camera
    (identity without it); only: names of the bodies to show. Where the scene has no NeRF++ background, `background`.
    """
    scene = scene if only is None else scene.only(*only)
    device = scene.modules()[0].known.device
    pose = (
        torch.eye(4) if frame_from_view is None else torch.as_tensor(np.asarray(frame_from_view), dtype=torch.float32)
    )
    w, h = size
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    xy = torch.stack([x, y], -1).reshape(-1, 2)
    rays = camera_rays(torch.as_tensor(np.asarray(K), dtype=torch.float32), pose, xy)
    parts: list[Rendered] = []
    for k in range(0, len(xy), chunk):
        o, d = rays.o[k : k + chunk].to(device), rays.d[k : k + chunk].to(device)
        some = Rays(o, d, torch.full((len(o),), frame, device=device))
        behind = torch.tensor(background, device=device) if scene.background is None else scene.background(some)
        parts.append(composite(scene.along(some), behind))
    image = lambda get: torch.cat([get(p) for p in parts]).cpu().reshape(h, w, -1).numpy()  # noqa: E731
    z = (rays.d @ pose[:3, 2]).reshape(h, w).numpy()
    opacity = image(lambda p: p.opacity)[..., 0]
    column = lambda a: {n: a[..., k] for k, n in enumerate(scene.names)}  # noqa: E731
    return HoldView(
        image(lambda p: p.rgb).clip(0, 1),
        opacity,
        image(lambda p: p.depth)[..., 0] * z * (opacity > 0.5),
        image(lambda p: p.normal) @ pose[:3, :3].numpy(),
        column(image(lambda p: p.shares)),
        column(image(lambda p: p.alone)),
    )


def meshes(scene: HoldScene, resolution: int = 96) -> dict:
    """Name -> canonical watertight mesh of each field with its albedo, and its `Report`."""
    return {b.name: field_mesh(b.field, resolution) for b in scene.bodies}
