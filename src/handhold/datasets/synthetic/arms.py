"""Forearms, sleeves, bands and bystanders' shapes: what belongs to a person in the picture beside the hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RINGS = 14  # of the bare arm and of the sleeve
BAND_RINGS = 4


@dataclass(frozen=True, eq=False)
class ArmSpec:
    """Forearms of B hands, in the frame of the (right) hand: fingers along -x, back of the hand +y. Metres, radians."""

    bend: Tensor  # (B,2) direction of the forearm away from +x, towards +y and +z
    length: Tensor  # (B,)
    radii: Tensor  # (B,2) half axes (y, z) at the elbow end
    sleeve_start: Tensor  # (B,) along the arm; beyond `length` there is no sleeve
    sleeve_gap: Tensor  # (B,2) of the cloth from the skin, at the cuff and at the far end
    folds: Tensor  # (B,3) amplitude, waves along the arm, phase
    band_start: Tensor  # (B,) where a watch or bracelet begins; beyond `length` there is none
    band_width: Tensor  # (B,)


def sample_arms(n: int, generator: torch.Generator) -> ArmSpec:
    """Seven in ten with a sleeve, from tight to wide, one in six with a band."""

    def u(lo: float, hi: float, *shape: int) -> Tensor:
        return lo + (hi - lo) * torch.rand(n, *shape, generator=generator)

    length = u(0.22, 0.5)
    none = torch.full((n,), 9.0)
    long = torch.rand(n, generator=generator) < 0.6
    start = torch.where(long, u(-0.004, 0.035), u(0.03, 0.16))
    wide = torch.rand(n, generator=generator) < 0.4
    gap = torch.stack([u(0.001, 0.008), torch.where(wide, u(0.01, 0.05), u(0.002, 0.015))], -1)
    return ArmSpec(
        bend=0.38 * torch.randn(n, 2, generator=generator).clamp(-1.8, 1.8) * torch.tensor([1.0, 0.6]),
        length=length,
        radii=torch.stack([u(0.032, 0.05), u(0.036, 0.056)], -1),
        sleeve_start=torch.where(torch.rand(n, generator=generator) < 0.7, start, none),
        sleeve_gap=gap,
        folds=torch.stack([u(0.0, 0.006) * u(0, 1), u(20.0, 90.0), u(0, 2 * math.pi)], -1),
        band_start=torch.where(torch.rand(n, generator=generator) < 0.17, u(0.012, 0.05), none),
        band_width=u(0.006, 0.03),
    )


def _tube_faces(rings: int, around: int, first: int = 0) -> Tensor:
    """(2 (rings-1) around, 3) outward triangles of a tube whose rings follow each other from vertex `first`."""
    i, j = torch.meshgrid(torch.arange(rings - 1), torch.arange(around), indexing="ij")
    a, b = i * around + j, i * around + (j + 1) % around
    c, d = a + around, b + around
    return torch.stack([torch.stack([a, b, c], -1), torch.stack([b, d, c], -1)], 2).reshape(-1, 3) + first


@lru_cache(maxsize=4)
def arm_faces(around: int = 20) -> tuple[Tensor, Tensor]:
    """Faces (T,3) of arm, sleeve and band for the vertices of `arm_vertices`, and the part (T,) of each: 0, 1, 2."""
    parts = [_tube_faces(RINGS, around), _tube_faces(RINGS + 1, around), _tube_faces(BAND_RINGS, around)]
    first = [0, RINGS * around, (2 * RINGS + 1) * around]
    faces = torch.cat([p + f for p, f in zip(parts, first, strict=True)])
    return faces, torch.cat([torch.full((len(p),), k) for k, p in enumerate(parts)])


def arm_vertices(spec: ArmSpec, ring: Tensor) -> tuple[Tensor, Tensor]:
    """The forearm that continues a hand.

    ring: (B,R,3) the hand's open wrist, in order, in the hand's frame. Returns vertices (B,N,3) in that frame, and the
    coordinates (B,N,3) at which textures are evaluated: metres round the arm, and along it. What is absent is shrunk to
    a point inside the arm, which draws nothing.
    """
    b, r = ring.shape[:2]
    center = ring.mean(1)  # (B,3)
    offset = ring - center[:, None]
    angle = torch.atan2(offset[..., 1], offset[..., 2])  # (B,R)
    direction = torch.nn.functional.normalize(
        torch.cat([torch.ones_like(spec.bend[:, :1]), torch.tan(spec.bend.clamp(-1.1, 1.1))], 1), dim=-1
    )

    def rings(s: Tensor, radius: Tensor | None, extra: Tensor) -> Tensor:
        """s (B,S) along the arm, extra (B,S,R) beyond the skin -> (B,S,R,3); the skin where radius is None."""
        share = (s / 0.07).clamp(0, 1)
        share = share * share * (3 - 2 * share)  # the wrist turns into the bent forearm
        axis = torch.nn.functional.normalize(
            torch.lerp(direction.new_tensor([1.0, 0.0, 0.0]).expand(b, 1, 3), direction[:, None], share[..., None]),
            dim=-1,
        )
        middle = center[:, None] + s[..., None] * torch.lerp(
            direction.new_tensor([1.0, 0.0, 0.0]).expand(b, 1, 3), direction[:, None], (0.5 + 0.5 * share)[..., None]
        )
        y = direction.new_tensor([0.0, 1.0, 0.0]).expand_as(axis)
        y = torch.nn.functional.normalize(y - (y * axis).sum(-1, keepdim=True) * axis, dim=-1)
        z = torch.linalg.cross(axis, y)
        t = (s / spec.length[:, None]).clamp(0, 1)
        grown = (1 - (1 - t).square())[..., None]  # most of the growth is near the wrist
        wrist = offset[..., 1:].norm(dim=-1)[:, None]  # (B,1,R)
        c, d = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
        elbow = 1 / torch.sqrt((d / spec.radii[:, None, :1]).square() + (c / spec.radii[:, None, 1:]).square())
        rho = torch.lerp(wrist.expand(b, s.shape[1], r), elbow.expand(b, s.shape[1], r), grown) + extra
        out = middle[:, :, None] + rho[..., None] * (d[..., None] * y[:, :, None] + c[..., None] * z[:, :, None])
        lean = (offset[..., 0])[:, None] * (1 - share)[..., None]  # the wrist's ring is not quite flat
        return out + lean[..., None] * axis[:, :, None]

    steps = torch.linspace(0, 1, RINGS, device=ring.device, dtype=ring.dtype)
    length = spec.length[:, None]
    s_arm = steps.square() * 0.6 * length + steps * 0.4 * length
    arm = rings(s_arm, None, ring.new_zeros(b, RINGS, r))
    has = (spec.sleeve_start < spec.length)[:, None]
    s0 = torch.minimum(spec.sleeve_start, spec.length)[:, None]
    s_sleeve = s0 + (length - s0) * steps * 1.02
    gap = torch.lerp(spec.sleeve_gap[:, :1], spec.sleeve_gap[:, 1:], steps)
    amp, waves, phase = spec.folds.unbind(-1)
    fold = amp[:, None, None] * torch.sin(
        waves[:, None, None] * s_sleeve[..., None] + phase[:, None, None] + 2 * angle[:, None]
    )
    extra = (gap[..., None] + fold).clamp(min=0.0008)
    lip = rings(s_sleeve[:, :1] + 0.004, None, torch.full_like(extra[:, :1], 0.0003))  # turned in at the cuff
    cloth = torch.cat([lip, rings(s_sleeve, None, extra)], 1)
    inner = (center + 0.5 * spec.length[:, None] * direction)[:, None, None]
    cloth = torch.where(has[..., None, None], cloth, inner)
    s_lip = torch.cat([s_sleeve[:, :1] + 0.004, s_sleeve], 1)
    worn = (spec.band_start < spec.length)[:, None]
    u = torch.linspace(0, 1, BAND_RINGS, device=ring.device, dtype=ring.dtype)
    s_band = torch.minimum(spec.band_start, spec.length)[:, None] + u * spec.band_width[:, None]
    thick = ring.new_tensor([0.0002, 0.0025, 0.0025, 0.0002])[None, :, None].expand(b, BAND_RINGS, r)
    band = torch.where(worn[..., None, None], rings(s_band, None, thick), inner)
    vertices = torch.cat([x.reshape(b, -1, 3) for x in (arm, cloth, band)], 1)
    around = 0.035 * angle[:, None]

    def chart(s: Tensor) -> Tensor:
        a = around.expand(b, s.shape[1], r)
        depth = 0.03 * torch.sin(angle)[:, None].expand_as(a)
        return torch.stack([s[..., None].expand_as(a), depth, a], -1).reshape(b, -1, 3)

    return vertices, torch.cat([chart(s_arm), chart(s_lip), chart(s_band)], 1)


@lru_cache(maxsize=4)
def sphere(level: int = 3) -> tuple[Tensor, Tensor]:
    """Unit sphere by subdivision of an octahedron: vertices (V,3) and outward faces (T,3)."""
    v = [[1.0, 0, 0], [-1, 0, 0], [0, 1.0, 0], [0, -1, 0], [0, 0, 1.0], [0, 0, -1]]
    f = [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
    for _ in range(level):
        middle: dict[tuple[int, int], int] = {}

        def half(a: int, b: int, middle=middle) -> int:
            key = (min(a, b), max(a, b))
            if key not in middle:
                p = [(x + y) / 2 for x, y in zip(v[a], v[b], strict=True)]
                n = math.sqrt(sum(x * x for x in p))
                middle[key] = len(v)
                v.append([x / n for x in p])
            return middle[key]

        f = [
            t
            for a, b, c in f
            for t in (
                [a, half(a, b), half(a, c)],
                [half(a, b), b, half(b, c)],
                [half(a, c), half(b, c), c],
                [half(a, b), half(b, c), half(a, c)],
            )
        ]
    return torch.tensor(v), torch.tensor(f)
