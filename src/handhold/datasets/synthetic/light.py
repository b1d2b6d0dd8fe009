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

from .filters import halved, pick, tent
from .gbuffer import rasterize_batch

SHADOW_SIZE = 128  # pixels of a shadow map
LAMPS = 2
_EMPTY = 1.5  # depth where the lamp sees nothing, in scene radii
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
    d = F.normalize(d + up[:, None] * torch.tensor([1.0, 0.4])[:, None], dim=2)
    frontal = F.normalize(torch.tensor([0.0, 0.0, -1.0]) + 0.35 * torch.randn(n, 3, generator=g), dim=1)
    d[:, 0] = torch.where(u(0, 1, 1) < 0.15, frontal, d[:, 0])
    behind = (d[:, 0, 2] > 0.45)[:, None] & (u(0, 1, 1) < 0.7)  # against the light, but seldom
    d[:, 0] = torch.where(behind, d[:, 0] * torch.tensor([1.0, 1.0, -1.0]), d[:, 0])
    warm = temperature(torch.exp(u(math.log(2700), math.log(9500), LAMPS + 1)))
    warm = 1 + (warm - 1) * u(0.2, 1.0, 1, 1)
    key = u(0.05, 1.0) ** 1.3  # share of the light that is the key lamp's
    strength = torch.stack([1.5 * key, 0.6 * u() ** 2], 1)
    color = warm[:, :LAMPS] * strength[..., None]
    base = 1.0 - 0.75 * key
    env = warm[:, LAMPS] * base[:, None]
    mean = color.sum(1) * 0.5 + env  # the camera's white balance takes out most of what all lamps have in common
    balance = (mean / mean.mean(1, keepdim=True)) ** -u(0.5, 1.0, 1)
    color, env = color * balance[:, None], env * balance
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


def per_point(x: Tensor, picture: Tensor) -> Tensor:
    """(*,N) of each point's picture, from x (B,*); of one picture it is only a view (*,1)."""
    return x[0][..., None] if len(x) == 1 else pick(x, picture).movedim(0, -1)


def ambient(harmonics: Tensor, normal: Tensor, picture: Tensor) -> Tensor:
    """(3,N) light from the environment on a surface with normal (3,N), harmonics (B,9,3), picture (N,)."""
    x, y, z = normal
    basis = torch.stack([torch.ones_like(x), x, y, z, x * y, y * z, 3 * z * z - 1, x * z, x * x - y * y])
    if len(harmonics) == 1:
        return (harmonics[0].T @ basis).clamp_min(0)
    h = pick(harmonics, picture)
    return torch.stack([(basis * h[..., k].T).sum(0) for k in range(3)]).clamp_min(0)


def scene_sphere(depth: Tensor, ray: Tensor) -> tuple[Tensor, Tensor]:
    """Centre (B,3) and radius (B) of the visible points of depth (B,H,W), 0 where nothing is seen, along rays
    (B,3,H,W); a metre away where nothing is seen. Every fourth pixel is looked at."""
    z, d = depth[:, 2::4, 2::4].flatten(1), ray[:, :, 2::4, 2::4].flatten(2)
    w = (z > 0).to(z)[:, None]
    position = d * z[:, None]
    n = w.sum(2)
    centre = (position * w).sum(2) / n.clamp_min(1)
    centre = torch.where(n > 0, centre, centre.new_tensor([0.0, 0.0, 1.0]))
    radius = ((position - centre[..., None]).square().sum(1) * w[:, 0]).amax(1).sqrt()
    return centre, (1.15 * radius).clamp(0.06, 0.5)


@dataclass(frozen=True, eq=False)
class ShadowMap:
    """What the key lamp sees, as the first two moments of its depth (Donnelly and Lauritzen, "Variance shadow maps",
    I3D 2006), blurred by the lamp's size."""

    moments: Tensor  # (2,B*S*S) of depth, in radii from the scene's centre
    size: int  # S
    axes: Tensor  # (B,3,3) rows: right, down and away from the lamp
    centre: Tensor  # (B,3)
    radius: Tensor  # (B)

    def lit(self, points: Tensor, picture: Tensor) -> Tensor:
        """Share of the key lamp that reaches points (3,N) of picture (N,): 0 shadow to 1."""
        away = (points - per_point(self.centre, picture)) / per_point(self.radius, picture)
        if len(self.axes) == 1:
            x, y, depth = self.axes[0] @ away
        else:
            axes = pick(self.axes, picture)
            x, y, depth = ((axes[:, k].T * away).sum(0) for k in range(3))
        s = self.size
        shrink = (s / 2) * _DISTANCE / (_DISTANCE + depth)
        x, y = x * shrink + (s / 2 - 0.5), y * shrink + (s / 2 - 0.5)
        outside = torch.maximum((x - (s / 2 - 0.5)).abs(), (y - (s / 2 - 0.5)).abs()) > s / 2 - 2
        x, y = x.clamp(0, s - 1.001), y.clamp(0, s - 1.001)
        x0, y0 = x.int(), y.int()
        fx, fy = x - x0, y - y0
        i = y0 * s + x0 + (picture * (s * s) if len(self.axes) > 1 else 0)
        data = self.moments
        top = torch.lerp(pick(data, i, 1), pick(data, i + 1, 1), fx)
        low = torch.lerp(pick(data, i + s, 1), pick(data, i + (s + 1), 1), fx)
        mean, square = torch.lerp(top, low, fy)
        over = (depth.clamp(max=_EMPTY - 0.1) - mean - 0.02).clamp_min(0)
        variance = (square - mean * mean).clamp_min(4e-4)
        return ((variance / (variance + over * over) - 0.15) / 0.85).clamp(0, 1).maximum(outside.to(over))


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
    d = torch.where(depth > 0, depth - _DISTANCE, _EMPTY)
    m = torch.stack([d, d * d], 1)
    levels = [tent(m)]
    for k in (2, 4):
        small = tent(tent(halved(m) if k == 2 else halved(halved(m))))
        levels.append(F.interpolate(small, (size, size), mode="bilinear"))
    s = light.softness.clamp(0, 1)[:, None, None, None] * (len(levels) - 1)
    moments = sum(v * (1 - (s - k).abs()).clamp_min(0) for k, v in enumerate(levels))
    return ShadowMap(moments.movedim(1, 0).reshape(2, -1), size, axes, centre, radius)


def hollows(depth: Tensor, strength: Tensor) -> Tensor:
    """(B,H,W) in (0,1]: darker where a surface lies behind what is around it (after Luft, Colditz and Deussen, "Image
    enhancement by unsharp masking the depth buffer", SIGGRAPH 2006), at two radii. depth (B,H,W), 0 is nothing."""
    near = halved(torch.stack([depth, (depth > 0).to(depth)], 1))
    own = near[:, 0] / near[:, 1].clamp_min(1e-6)
    total = torch.zeros_like(own)
    far = near
    for limit in (0.006, 0.02):
        far = tent(tent(halved(far)))
        around = F.interpolate(far, own.shape[1:], mode="bilinear")
        behind = own - around[:, 0] / around[:, 1].clamp_min(1e-6)
        behind = behind * (behind < 6 * limit)  # a far surface behind an outline is not in a hollow
        total = total + (behind / limit).clamp(0, 1)
    shade = torch.exp(-0.55 * strength[:, None, None] * total)
    return F.interpolate(shade[:, None], depth.shape[1:], mode="bilinear")[:, 0]
