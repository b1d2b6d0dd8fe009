"""Torch twins of the encodings: the specification of `csrc/encode*_isa.h`; they serve float64, CUDA and no compiler.

Plain functions, any dtype and device, differentiable twice. `weights` (L,) scale the levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PRIMES = (1, 2654435761, 805459861)
MAX_LEVELS = 32
MAX_ROWS = 1 << 26
PLANE_AXES = ((0, 1), (0, 2), (1, 2))  # box axes along a plane's columns and rows


@dataclass(frozen=True)
class GridLevels:
    """Where the levels of a multiresolution grid lie in one table (rows, F).

    Level l has `resolution[l]` cells per axis and so (resolution + 1)^3 corners. A dense level keeps corner (i,j,k) in
    row offset + (i (N+1) + j) (N+1) + k; a hashed one has 2^hash_bits rows (Mueller et al., SIGGRAPH 2022, eq. 4).
    """

    resolution: tuple[int, ...]
    hash_bits: tuple[int, ...]  # 0 for a dense level
    smoothstep: bool = False
    sum: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.resolution) <= MAX_LEVELS or len(self.hash_bits) != len(self.resolution):
            raise ValueError(f"a grid has 1 to {MAX_LEVELS} levels, not {len(self.resolution)}")
        if not all(1 <= r <= 1 << 20 for r in self.resolution):
            raise ValueError(f"a level has 1 to 2^20 cells per axis, not {self.resolution}")
        if not all(b == 0 or 1 <= b <= 24 for b in self.hash_bits):
            raise ValueError(f"a hashed level has 2^1 to 2^24 rows, not 2^{self.hash_bits}")
        if self.rows > MAX_ROWS:
            raise ValueError(f"this grid needs {self.rows} rows, more than {MAX_ROWS}; lower its resolution or hash it")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each level."""
        return tuple(1 << b if b else (r + 1) ** 3 for r, b in zip(self.resolution, self.hash_bits, strict=True))

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each level."""
        return tuple(sum(self.sizes[:i]) for i in range(len(self.sizes)))

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def output_dim(self, features: int) -> int:
        return features if self.sum else features * len(self.resolution)


def encode(
    table: Tensor, x: Tensor, levels: GridLevels, lo: Tensor, hi: Tensor, weights: Tensor, jacobian: bool = True
) -> tuple[Tensor, Tensor | None]:
    """table (rows,F), x (N,3), box lo, hi (3,) -> value (N,D) and, if asked, d value / d x (N,D,3).

    Outside the box x is clamped to it, and the derivative along the clamped axis is zero.
    """
    n, L, F = len(x), len(levels.resolution), table.shape[1]
    long = {"dtype": torch.long, "device": x.device}
    res = torch.tensor(levels.resolution, **long)
    u = (x - lo) / (hi - lo)
    inside = ((u >= 0) & (u <= 1)).to(x.dtype)
    p = u.clamp(0, 1)[:, None] * res[:, None]  # (N,L,3)
    i = torch.minimum(p.detach().floor().long(), res[:, None] - 1)
    s = p - i
    slope = (inside / (hi - lo))[:, None] * res[:, None]
    if levels.smoothstep:
        slope = slope * 6 * s * (1 - s)
        s = s * s * (3 - 2 * s)
    corner = torch.stack(torch.meshgrid(*[torch.arange(2, device=x.device)] * 3, indexing="ij"), -1).reshape(8, 3)
    i = i[:, :, None] + corner  # (N,L,8,3)
    dense = (i[..., 0] * (res + 1)[:, None] + i[..., 1]) * (res + 1)[:, None] + i[..., 2]
    hashed = i[..., 0] ^ (i[..., 1] * PRIMES[1]) ^ (i[..., 2] * PRIMES[2])
    bits = torch.tensor(levels.hash_bits, **long)[:, None]
    row = torch.where(bits > 0, hashed & ((1 << bits) - 1), dense) + torch.tensor(levels.offsets, **long)[:, None]
    q = torch.nn.functional.embedding(row, table).view(n, L, 2, 2, 2, F)
    u, v, w = (s[..., k, None] for k in range(3))
    dz = q[..., 1, :] - q[..., 0, :]  # (N,L,2,2,F)
    qz = q[..., 0, :] + dz * w[..., None, None, :]
    dy = qz[:, :, :, 1] - qz[:, :, :, 0]  # (N,L,2,F)
    qy = qz[:, :, :, 0] + dy * v[..., None, :]
    dx = qy[:, :, 1] - qy[:, :, 0]  # (N,L,F)
    scale = weights.to(x)[:, None]
    value = (qy[:, :, 0] + dx * u) * scale
    value = value.sum(1) if levels.sum else value.reshape(n, L * F)
    if not jacobian:
        return value, None
    dy = dy[:, :, 0] + (dy[:, :, 1] - dy[:, :, 0]) * u
    dz = dz[:, :, :, 0] + (dz[:, :, :, 1] - dz[:, :, :, 0]) * v[..., None, :]
    dz = dz[:, :, 0] + (dz[:, :, 1] - dz[:, :, 0]) * u
    jac = torch.stack([dx, dy, dz], -1) * slope[:, :, None] * scale[..., None]
    return value, jac.sum(1) if levels.sum else jac.reshape(n, L * F, 3)


def triplane(
    planes: Tensor, x: Tensor, lo: Tensor, hi: Tensor, sum: bool, align_corners: bool, jacobian: bool = True
) -> tuple[Tensor, Tensor | None]:
    """planes (3,C,R,R), x (N,3) -> value (N,C) summed or (N,3C), and, if asked, d value / d x (N,D,3).

    As `torch.nn.functional.grid_sample` with border padding, whose backward cannot be differentiated again.
    """
    C, R = planes.shape[1:3]
    texels = planes.permute(0, 2, 3, 1).reshape(3 * R * R, C)
    slope = (R - 1 if align_corners else R) / (hi - lo)
    p = (x - lo) * slope - (0 if align_corners else 0.5)
    inside = ((p >= 0) & (p <= R - 1)).to(x.dtype)
    p = p.clamp(0, R - 1)
    i = p.detach().floor().long().clamp(max=R - 2)
    f, slope = p - i, slope * inside
    values, jacobians = [], []
    for k, (a, b) in enumerate(PLANE_AXES):
        at = (k * R + i[:, b]) * R + i[:, a]
        q00, q10, q01, q11 = (torch.nn.functional.embedding(at + step, texels) for step in (0, 1, R, R + 1))
        u, v = f[:, a, None], f[:, b, None]
        low, high = q00 + (q10 - q00) * u, q01 + (q11 - q01) * u
        values.append(low + (high - low) * v)
        if jacobian:
            zero = torch.zeros_like(low)
            columns = [zero, zero, zero]
            columns[a] = ((q10 - q00) * (1 - v) + (q11 - q01) * v) * slope[:, a, None]
            columns[b] = (high - low) * slope[:, b, None]
            jacobians.append(torch.stack(columns, -1))
    if sum:
        return values[0] + values[1] + values[2], jacobians[0] + jacobians[1] + jacobians[2] if jacobian else None
    return torch.cat(values, 1), torch.cat(jacobians, 1) if jacobian else None


def fourier(x: Tensor, weights: Tensor, pi: bool, identity: bool, jacobian: bool) -> tuple[Tensor, Tensor | None]:
    """x (N,d), weights (B,) of the bands -> value (N,D) and, if asked, d value / d x (N,D,d), D = d (identity + 2 B).

    Order: x, then per band sin over the axes, then cos over the axes; frequencies 2^k, times pi if asked.
    """
    n, d = x.shape
    B = len(weights)
    frequency = torch.pi ** int(pi) * 2.0 ** torch.arange(B, dtype=x.dtype, device=x.device)
    angle = x[:, None] * frequency[:, None]  # (N,B,d)
    sin, cos = angle.sin(), angle.cos()
    scale = weights.to(x)[:, None]
    value = torch.stack([sin * scale, cos * scale], 2).reshape(n, 2 * B * d)
    value = torch.cat([x, value], 1) if identity else value
    if not jacobian:
        return value, None
    slope = scale * frequency[:, None]
    diagonal = torch.stack([cos * slope, -sin * slope], 2).reshape(n, 2 * B, d)
    if identity:
        diagonal = torch.cat([torch.ones_like(x)[:, None], diagonal], 1)
    return value, torch.diag_embed(diagonal).reshape(n, value.shape[1], d)
