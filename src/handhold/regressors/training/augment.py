"""Crops of hands made harder: colour, blur, lost resolution, noise, and things in front. Batched, on any device.

Pictures are (N,3,H,W) sRGB in [0,1]. All randomness comes from a generator on their device; every crop draws its own
strengths, so that a batch holds clean and spoilt ones side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AugmentConfig:
    """How strongly, and how often, training crops are changed."""

    color: float = 1.0
    """Strength of gain, contrast, white balance, saturation and gamma."""
    gray: float = 0.04
    """Share of crops without colour."""
    blur: float = 0.3
    """Share of blurred crops, by up to 2.5 pixels."""
    motion: float = 0.15
    """Share of crops blurred along a line, by up to a twelfth of their size."""
    coarse: float = 0.25
    """Share of crops with lost resolution, down to a quarter."""
    noise: float = 0.05
    """Largest standard deviation of the noise."""
    cover: float = 0.35
    """Share of crops with something in front: parts of other crops, flat or noisy patches."""
    cover_size: tuple[float, float] = (0.06, 0.3)
    """Half axes of what is in front, as shares of the crop's size."""


def augment_crops(image: Tensor, generator: torch.Generator, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """(N,3,H,W) -> the same, changed, and (N,H,W) bool: where something was put in front."""
    with torch.no_grad():
        draw = _Draw(generator, len(image), image.device)
        image, covered = cover(image, draw, config)
        image = blur(image, draw, config)
        image = recolor(image, draw, config)
        sigma = config.noise * draw.uniform() ** 2
        noise = torch.randn(image.shape, generator=generator, device=image.device, dtype=image.dtype)
        return (image + sigma * noise).clamp(0, 1), covered


def hide_points(visible: Tensor, points: Tensor, covered: Tensor) -> Tensor:
    """visible (N,P) without the points (N,P,2) pixels that lie on `covered` (N,H,W)."""
    h, w = covered.shape[1:]
    x, y = points.nan_to_num(0.0, 0.0, 0.0).floor().long().unbind(-1)
    under = covered.flatten(1).gather(1, y.clamp(0, h - 1) * w + x.clamp(0, w - 1))
    return visible & ~under


class _Draw:
    """Random numbers for N pictures, each (N,*shape,1,1) so that they broadcast over pixels."""

    def __init__(self, generator: torch.Generator, n: int, device: torch.device):
        self.generator, self.n, self.device = generator, n, device

    def uniform(self, channels: int = 1, low: float = 0.0, high: float = 1.0) -> Tensor:
        u = torch.rand(self.n, channels, 1, 1, generator=self.generator, device=self.device)
        return low + (high - low) * u

    def normal(self, channels: int = 1, sigma: float = 1.0) -> Tensor:
        return sigma * torch.randn(self.n, channels, 1, 1, generator=self.generator, device=self.device)

    def chance(self, p: float, channels: int = 1) -> Tensor:
        return self.uniform(channels) < p


def recolor(image: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    """Gamma, gain, white balance, contrast about the picture's mean, saturation; strong for one crop in four."""
    s = config.color * (1 + draw.chance(0.25).float())
    image = image.clamp(1e-4, 1) ** torch.exp(0.15 * s * draw.normal())
    image = image * torch.exp(0.15 * s * draw.normal() + 0.06 * s * draw.normal(3))
    mean = image.mean((2, 3), keepdim=True)
    image = mean + (image - mean) * torch.exp(0.15 * s * draw.normal())
    saturation = torch.exp(0.25 * s * draw.normal()) * ~draw.chance(config.gray)
    luma = 0.299 * image[:, :1] + 0.587 * image[:, 1:2] + 0.114 * image[:, 2:]
    return luma + (image - luma) * saturation + 0.03 * s * draw.normal()


def blur(image: Tensor, draw: _Draw, config: AugmentConfig) -> Tensor:
    """Out of focus, moved, or of too few pixels."""
    h, w = image.shape[-2:]
    # between the picture and two fixed blurs of 1.2 and 2.5 pixels
    amount = 2 * draw.uniform() * draw.chance(config.blur)
    near, far = _gaussian(image, 1.2), _gaussian(image, 2.5)
    image = torch.where(amount < 1, torch.lerp(image, near, amount.clamp(max=1)), torch.lerp(near, far, amount - 1))
    moved = image
    length = draw.chance(config.motion) * draw.uniform() / 6  # of the [-1,1] square: a twelfth of the size
    angle = draw.uniform(high=math.pi)
    step = torch.cat([torch.cos(angle), torch.sin(angle)], -1) * length  # (N,1,1,2)
    eye = torch.eye(2, 3, device=image.device).expand(len(image), 2, 3)
    grid = F.affine_grid(eye, [len(image), 1, h, w], align_corners=False)
    taps = [F.grid_sample(image, (grid + t * step).to(image.dtype), padding_mode="border", align_corners=False)
            for t in (-0.5, -0.25, 0.25, 0.5)]  # fmt: skip
    image = (moved + sum(taps)) / 5
    coarse = draw.chance(config.coarse)
    finest = draw.uniform()
    for factor, low, high in ((2, 0.0, 0.6), (4, 0.6, 1.0)):
        small = F.avg_pool2d(image, factor, ceil_mode=True, count_include_pad=False)
        big = F.interpolate(small, scale_factor=factor, mode="bilinear", align_corners=False)[..., :h, :w]
        image = torch.where(coarse & (finest >= low) & (finest < high), big, image)
    return image


def cover(image: Tensor, draw: _Draw, config: AugmentConfig, count: int = 2) -> tuple[Tensor, Tensor]:
    """Put up to `count` shapes in front of each picture; returns the pictures and where (N,H,W) bool."""
    n, _, h, w = image.shape
    covered = torch.zeros(n, h, w, dtype=torch.bool, device=image.device)
    y = ((torch.arange(h, device=image.device) + 0.5) / h)[:, None]
    x = (torch.arange(w, device=image.device) + 0.5) / w
    low, high = config.cover_size
    any_cover = draw.chance(config.cover)
    for k in range(count):
        there = any_cover & (draw.chance(0.4) if k else draw.chance(1.0))
        cx, cy = draw.uniform(), draw.uniform()
        a = torch.exp(draw.uniform(low=math.log(low), high=math.log(high)))
        b = a * torch.exp(draw.uniform(low=math.log(0.25), high=0.0))  # long ones are like fingers and handles
        turn = draw.uniform(high=math.pi)
        u = (torch.cos(turn) * (x - cx) + torch.sin(turn) * (y - cy)) / a
        v = (torch.cos(turn) * (y - cy) - torch.sin(turn) * (x - cx)) / b
        ragged = F.interpolate(
            torch.randn(n, 1, 7, 7, generator=draw.generator, device=image.device), (h, w), mode="bicubic"
        )
        round_ = u * u + v * v + 0.35 * draw.uniform() * ragged
        inside = (torch.where(draw.chance(0.35), torch.maximum(u.abs(), v.abs()), round_) < 1) & there  # (N,1,H,W)
        # what it looks like: part of another crop, a flat colour with a gradient, or noise
        other = image.roll(k + 1, 0).flip(-1)
        flat = draw.uniform(3) + (u * draw.normal(3, 0.15)) + (v * draw.normal(3, 0.15))
        grain = torch.rand(n, 3, 12, 12, generator=draw.generator, device=image.device)
        grain = F.interpolate(grain, (h, w), mode="nearest")
        pick = draw.uniform()
        paint = torch.where(pick < 0.5, other, torch.where(pick < 0.85, flat.to(image.dtype), grain.to(image.dtype)))
        image = torch.where(inside, paint.clamp(0, 1), image)
        covered = covered | inside[:, 0]
    return image, covered


def _gaussian(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian blur with replicated borders."""
    r = math.ceil(2.5 * sigma)
    k = torch.exp(-0.5 * (torch.arange(-r, r + 1, device=image.device, dtype=image.dtype) / sigma) ** 2)
    k = (k / k.sum()).expand(3, 1, -1)
    image = F.conv2d(F.pad(image, (r, r, 0, 0), mode="replicate"), k[:, :, None, :], groups=3)
    return F.conv2d(F.pad(image, (0, 0, r, r), mode="replicate"), k[..., None], groups=3)
