"""Light: lamps with soft shadows, an environment in spherical harmonics, and dimmed hollows.

Radiance is relative: a white matt surface that faces a lamp of colour 1 has radiance 1. Directions are in the camera's
frame (OpenCV: y down).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .gbuffer import rasterize_batch

SHADOW_SIZE = 128  # pixels of a shadow map
LAMPS = 3
_DISTANCE = 24.0  # of the shadow map's camera, in scene radii: nearly parallel rays


@dataclass(frozen=True, eq=False)
class Light:
    """The light of B pictures. The first lamp casts shadows."""

    direction: Tensor  # (B,L,3) unit, towards the lamp
    color: Tensor  # (B,L,3)
    harmonics: Tensor  # (B,9,3) of the light that a matt surface gets, real spherical harmonics up to order 2
    spread: Tensor  # (B,L) added to a surface's roughness: large lamps have large highlights
    softness: Tensor  # (B) 0 hard to 1 soft shadows
    shadow: Tensor  # (B) strength of the key lamp's shadow
    hollow: Tensor  # (B) strength of ambient occlusion
    plane: Tensor  # (B,3) normal of the surface behind, on which the scene may cast a shadow
    gap: Tensor  # (B) metres between that surface and the lowest visible point
    ground: Tensor  # (B) strength of the shadow on it

    def to(self, device: str | torch.device) -> Light:
        return replace(self, **{k.name: getattr(self, k.name).to(device) for k in fields(self)})


def sample_lights(n: int, generator: torch.Generator, device: str | torch.device = "cpu") -> Light:
    """Lights of n pictures: lamps and windows from above, sometimes the side or the camera; indoors and out."""
    g = generator

    def u(low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=g) * (high - low) + low

    tilt = u(-0.3, 1.3)  # how far the camera looks down
    up = F.normalize(torch.stack([0.15 * torch.randn(n, generator=g), -tilt.cos(), -tilt.sin()], 1), dim=1)
    d = F.normalize(torch.randn(n, LAMPS, 3, generator=g), dim=2)
    d = F.normalize(d + up[:, None] * torch.tensor([1.0, 0.5, 0.3])[:, None], dim=2)
    frontal = F.normalize(torch.tensor([0.0, 0.0, -1.0]) + 0.35 * torch.randn(n, 3, generator=g), dim=1)
    d[:, 0] = torch.where(u(0, 1, 1) < 0.15, frontal, d[:, 0])
    behind = (d[:, 0, 2] > 0.45)[:, None] & (u(0, 1, 1) < 0.7)  # against the light, but seldom
    d[:, 0] = torch.where(behind, d[:, 0] * torch.tensor([1.0, 1.0, -1.0]), d[:, 0])
    warm = temperature(torch.exp(u(math.log(2700), math.log(9500), LAMPS + 1)))
    warm = 1 + (warm - 1) * u(0.2, 1.0, 1, 1)
    key = u(0.05, 1.0) ** 1.3  # share of the light that is the key lamp's
    strength = torch.stack([1.5 * key, 0.5 * u() ** 2, 0.4 * u() ** 2], 1)
    color = warm[:, :LAMPS] * strength[..., None]
    base = 1.0 - 0.75 * key
    env = warm[:, LAMPS] * base[:, None]
    side = F.normalize(torch.randn(n, 3, generator=g), dim=1)
    lean = up * u(0.1, 0.8, 1) + side * u(0.0, 0.4, 1)
    order1 = lean[:, :, None] * env[:, None]
    floor = torch.rand(n, 3, generator=g)  # what the floor reflects
    order1 = order1 - up[:, :, None] * (0.18 * (floor - 0.5) * env)[:, None]
    order2 = 0.09 * torch.randn(n, 5, 3, generator=g) * env[:, None]
    harmonics = torch.cat([env[:, None], order1, order2], 1)
    wall = u() < 0.35
    plane = torch.where(wall[:, None], F.normalize(frontal - torch.tensor([0.0, 0.0, 0.5]), dim=1), up)
    out = Light(
        direction=d, color=color, harmonics=harmonics, spread=u(0.0, 0.25, LAMPS), softness=u() ** 0.8,
        shadow=u(0.5, 1.0), hollow=u(0.4, 1.2), plane=plane, gap=torch.where(u() < 0.4, u(0, 0.02), u(0.02, 0.4)),
        ground=torch.where(u() < 0.6, u(0.3, 1.0), torch.zeros(n)),
    )  # fmt: skip
    return out.to(device)


def temperature(kelvin: Tensor) -> Tensor:
    """(*,3) linear colour of a black body, mean 1 (Planck's law at 610, 545 and 465 nm, against 6500 K)."""
    wave = torch.tensor([610e-9, 545e-9, 465e-9], dtype=kelvin.dtype, device=kelvin.device)
    c2 = 1.4388e-2

    def planck(t: Tensor) -> Tensor:
        return 1 / (torch.exp(c2 / (wave * t[..., None])) - 1)

    rgb = planck(kelvin) / planck(torch.full_like(kelvin, 6500.0))
    return rgb / rgb.mean(-1, keepdim=True)


def ambient(harmonics: Tensor, normal: Tensor) -> Tensor:
    """(*,3) light from the environment on a surface with normal (*,3), harmonics (*,9,3) or broadcastable."""
    x, y, z = normal.unbind(-1)
    basis = torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, 3 * z * z - 1, x * z, x * x - y * y], -1)
    return (basis[..., None] * harmonics).sum(-2).clamp_min(0.0)


def scene_sphere(position: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (B,3) and radius (B) of the visible points (B,P,3), seen (B,P); a metre away where nothing is seen."""
    w = seen.to(position)[..., None]
    n = w.sum(1)
    centre = (position * w).sum(1) / n.clamp_min(1)
    centre = torch.where(n > 0, centre, centre.new_tensor([0.0, 0.0, 1.0]))
    radius = ((position - centre[:, None]).square().sum(2) * w[..., 0]).amax(1).sqrt()
    return centre, (1.1 * radius).clamp(0.06, 0.5)


@dataclass(frozen=True, eq=False)
class ShadowMap:
    """What the key lamp sees, as the first two moments of its depth (Donnelly and Lauritzen, "Variance shadow maps",
    I3D 2006), blurred by the lamp's size."""

    moments: Tensor  # (B,2,S,S) of depth, in radii from the scene's centre
    axes: Tensor  # (B,3,3) rows: right, down and away from the lamp
    centre: Tensor  # (B,3)
    radius: Tensor  # (B)

    def lit(self, points: Tensor, picture: Tensor | None = None) -> Tensor:
        """Share of the key lamp that reaches points (N,3) of picture (N,) or (B,N,3): 0 shadow to 1."""
        if picture is None:
            local = (points - self.centre[:, None]) @ self.axes.transpose(1, 2) / self.radius[:, None, None]
        else:
            axes = self.axes[picture]
            local = (axes @ (points - self.centre[picture])[..., None])[..., 0] / self.radius[picture, None]
        depth = local[..., 2]
        at = local[..., :2] * (_DISTANCE / (_DISTANCE + depth))[..., None]
        if picture is None:
            m = F.grid_sample(self.moments, at[:, :, None], align_corners=False, padding_mode="border")[..., 0]
            mean, square = m[:, 0], m[:, 1]
        else:
            mean, square = _gather_bilinear(self.moments, at, picture)
        over = depth - mean - 0.02
        variance = (square - mean * mean).clamp_min(4e-4)
        chance = variance / (variance + over.clamp_min(0).square())
        return ((chance - 0.15) / 0.85).clamp(0, 1)


def _gather_bilinear(maps: Tensor, at: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Both channels of maps (B,2,S,S) at (N,2) in [-1,1] of picture (N,)."""
    s = maps.shape[-1]
    xy = ((at + 1) * (s / 2) - 0.5).clamp(0, s - 1.001)
    low = xy.long()
    f = xy - low
    i = (picture * s + low[:, 1]) * s + low[:, 0]
    data = maps.permute(0, 2, 3, 1).reshape(-1, 2)
    fx, fy = f[:, :1], f[:, 1:]
    top = data[i] * (1 - fx) + data[i + 1] * fx
    end = data[i + s] * (1 - fx) + data[i + s + 1] * fx
    m = top * (1 - fy) + end * fy
    return m[:, 0], m[:, 1]


def shadow_map(
    vertices: Tensor, faces: Tensor, light: Light, centre: Tensor, radius: Tensor, size: int = SHADOW_SIZE
) -> ShadowMap:
    """The key lamp's map of a scene: vertices (B,V,3), faces (B,T,3), its sphere (`scene_sphere`)."""
    away = -light.direction[:, 0]
    side = torch.where(away[:, 1:2].abs() < 0.9, away.new_tensor([0.0, 1.0, 0.0]), away.new_tensor([1.0, 0.0, 0.0]))
    right = F.normalize(torch.linalg.cross(side, away), dim=1)
    axes = torch.stack([right, torch.linalg.cross(away, right), away], 1)
    local = (vertices - centre[:, None]) @ axes.transpose(1, 2) / radius[:, None, None]
    local = torch.stack([local[..., 0], local[..., 1], local[..., 2] + _DISTANCE], -1)
    K = local.new_tensor([[_DISTANCE * size / 2, 0, size / 2], [0, _DISTANCE * size / 2, size / 2], [0, 0, 1]])
    depth = rasterize_batch(local, faces, K, size, size).depth
    d = torch.where(depth > 0, depth - _DISTANCE, 1.5)
    m = torch.stack([d, d * d], 1)
    levels = []
    for reach in (1, 3, 7):
        for _ in range(2):
            m = _box_blur(m, reach)
        levels.append(m)
    s = light.softness.clamp(0, 1)[:, None, None, None] * (len(levels) - 1)
    moments = sum(v * (1 - (s - k).abs()).clamp_min(0) for k, v in enumerate(levels))
    return ShadowMap(moments, axes, centre, radius)


def _box_blur(x: Tensor, reach: int) -> Tensor:
    """Mean over 2 reach + 1 pixels in both directions, edges repeated."""
    k = 2 * reach + 1
    x = F.avg_pool2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), (1, k), 1)
    return F.avg_pool2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), (k, 1), 1)


def hollows(depth: Tensor, strength: Tensor) -> Tensor:
    """(B,H,W) in (0,1]: darker where a surface lies behind what is around it (after Luft, Colditz and Deussen, "Image
    enhancement by unsharp masking the depth buffer", SIGGRAPH 2006), at two radii. depth (B,H,W), 0 is nothing."""
    mask = (depth > 0).to(depth)
    x = torch.stack([depth, mask], 1)
    half = F.avg_pool2d(x, 2, ceil_mode=True) if min(depth.shape[1:]) >= 64 else x
    total = torch.zeros_like(half[:, 0])
    own = half[:, 0] / half[:, 1].clamp_min(1e-6)
    for reach, limit in ((2, 0.006), (6, 0.02)):
        m = half
        for _ in range(2):
            m = _box_blur(m, reach)
        behind = own - m[:, 0] / m[:, 1].clamp_min(1e-6)
        behind = behind * (behind < 6 * limit)  # a far surface behind an outline is not in a hollow
        total = total + (behind / limit).clamp(0, 1)
    total = F.interpolate(total[:, None], depth.shape[1:], mode="bilinear")[:, 0]
    return torch.exp(-0.55 * strength[:, None, None] * total)
