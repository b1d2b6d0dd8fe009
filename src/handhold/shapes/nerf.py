"""Radiance fields: NeRF's coordinate network, and the coordinates of NeRF++ for all that is outside a sphere.

`render.volume.density_body` renders a `Nerf`; `render.volume.inverted_sphere` one with `d_in=4` as the background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def fourier(x: Tensor, bands: int, pi: bool = False) -> Tensor:
    """(...,D) -> (..., D (1 + 2 bands)): x, then for each band k sin(2^k x) and cos(2^k x).

    Mildenhall et al., ECCV 2020, eq. 4, with the frequencies of IDR and HOLD; with `pi`, the paper's 2^k pi.
    """
    scale = math.pi if pi else 1.0
    parts = [x]
    for k in range(bands):
        parts += [torch.sin(scale * 2**k * x), torch.cos(scale * 2**k * x)]
    return torch.cat(parts, -1)


def fourier_size(d: int, bands: int) -> int:
    return d * (1 + 2 * bands)


class Nerf(nn.Module):
    """Density and colour of a point seen along a direction (Mildenhall et al., ECCV 2020, figure 7).

    Eight layers of 256 with the encoded point joined again before the fifth, then one of 128 with the encoded
    direction. d_in = 4 takes NeRF++'s (x/r, 1/r). code: width of a per-frame vector given with each call. The density
    is softplus of the network's output minus 1 (no dead start, unlike ReLU), times `density_scale`: about the inverse
    of the scene's size where that is far from 1.
    """

    def __init__(
        self,
        d_in: int = 3,
        width: int = 256,
        depth: int = 8,
        skips: Sequence[int] = (4,),
        bands: int = 10,
        view_bands: int = 4,
        color_width: int = 128,
        code: int = 0,
        density_scale: float = 1.0,
        pi: bool = False,
    ):
        super().__init__()
        if any(not 0 < k < depth for k in skips):
            raise ValueError(f"a skip joins before layer 1 to {depth - 1}, not {tuple(skips)}")
        self.d_in, self.bands, self.view_bands, self.pi = d_in, bands, view_bands, pi
        self.skips, self.code, self.density_scale = frozenset(skips), code, density_scale
        e = fourier_size(d_in, bands)
        sizes = [e] + [width] * (depth - 1)
        self.layers = nn.ModuleList(nn.Linear(n + (e if k in self.skips else 0), width) for k, n in enumerate(sizes))
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.view = nn.Linear(width + fourier_size(3, view_bands) + code, color_width)
        self.color = nn.Linear(color_width, 3)

    def forward(self, x: Tensor, d: Tensor, code: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (M,d_in), d (M,3) unit, code (M,code) -> density (M,), rgb (M,3) in [0,1]."""
        if x.shape[-1] != self.d_in or (self.code > 0) != (code is not None):
            raise ValueError(f"points have {self.d_in} coordinates, and a code of {self.code}; got {tuple(x.shape)}")
        e = fourier(x, self.bands, self.pi)
        h = e
        for k, layer in enumerate(self.layers):
            h = torch.relu(layer(torch.cat([h, e], -1) if k in self.skips else h))
        sigma = nn.functional.softplus(self.density(h)[..., 0] - 1) * self.density_scale
        v = [self.feature(h), fourier(d, self.view_bands, self.pi)] + ([] if code is None else [code])
        return sigma, torch.sigmoid(self.color(torch.relu(self.view(torch.cat(v, -1)))))


def inverted_sphere_points(o: Tensor, d: Tensor, s: Tensor, radius: float) -> Tensor:
    """(...,4) = (x / r, s) of the ray's point x at distance r = radius / s from the origin, on its way out (NeRF++).

    o, d (...,3), d unit; s (...) in [0,1], finite down to s = 0, which is the direction itself. The point is written
    as s x = s o + (s t) d, with s t the larger root of |s x| = radius: nothing is divided by s.
    """
    b = (o * d).sum(-1)
    root = (s * s * (b * b - (o * o).sum(-1)) + radius**2).clamp(min=0).sqrt()
    x = s[..., None] * o + (root - s * b)[..., None] * d
    return torch.cat([x / radius, s[..., None]], -1)
