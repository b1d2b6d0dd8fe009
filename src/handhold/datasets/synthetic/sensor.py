"""From linear light to a photograph: lens, shutter, exposure, noise, resolution, sharpening and JPEG.

All steps are batched, each picture with its own strengths. Strengths are drawn on the CPU from the caller's generator;
noise comes from one tile of normal numbers at random places, so that all devices give the same pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .filters import halved, tent

_TILE = 512


@dataclass(frozen=True, eq=False)
class Sensor:
    """Strengths for B pictures, on the CPU; `sample_sensors` draws them, `develop` applies them."""

    exposure: Tensor  # (B) mean of the picture after exposure, linear
    gains: Tensor  # (B,3) white balance
    kernel: Tensor  # (B,k,k) blur of lens and shutter, sums to 1
    blurred: Tensor  # (B) bool
    vignette: Tensor  # (B)
    shot: Tensor  # (B) noise variance per unit of light
    read: Tensor  # (B) noise deviation in the dark
    chroma: Tensor  # (B) deviation of slow colour noise
    place: Tensor  # (B,3,2) int64 where the noise tile is read, for each channel
    shrink: Tensor  # (B) resolution divided by this
    contrast: Tensor  # (B) exponent of the tone curve about middle grey
    saturation: Tensor  # (B)
    sharpen: Tensor  # (B)
    quality: Tensor  # (B) of JPEG, 0 for none


def sample_sensors(n: int, generator: torch.Generator, strength: float = 1.0, kernel_size: int = 9) -> Sensor:
    """Cameras from good to bad. strength 0 is a plain exposure, 1 the usual mixture."""
    g = generator

    def u(low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=g) * (high - low) + low

    def sometimes(share: float, value: Tensor, none: float = 0.0) -> Tensor:
        return torch.where(u() < share * strength, value, torch.full((n,), none))

    motion = sometimes(0.3, u(1.0, kernel_size * 0.9), 0.0)
    defocus = sometimes(0.4, u(0.3, 1.6) ** 1.5, 0.0)
    noisy = u() ** 4 * strength
    warm = 0.1 * torch.randn(n, 1, generator=g) * torch.tensor([1.0, 0.0, -1.0])
    return Sensor(
        exposure=0.21 * torch.exp(strength * u(-0.6, 0.55)),
        gains=torch.exp(strength * (warm + 0.025 * torch.randn(n, 3, generator=g))),
        kernel=_kernels(motion, 2 * math.pi * u(), defocus, kernel_size),
        blurred=(motion > 0) | (defocus > 0),
        vignette=sometimes(0.4, u(0.1, 0.6)),
        shot=3e-3 * noisy + 2e-4 * strength,
        read=0.015 * noisy + 0.001 * strength,
        chroma=sometimes(0.3, 0.02 * u()),
        place=torch.randint(_TILE, (n, 3, 2), generator=g),
        shrink=sometimes(0.25, torch.tensor([1.5, 2.0, 3.0])[torch.randint(3, (n,), generator=g)], 1.0),
        contrast=torch.exp(strength * u(-0.2, 0.35)),
        saturation=torch.exp(strength * u(-0.35, 0.3)),
        sharpen=sometimes(0.3, u(0.2, 1.2)),
        quality=sometimes(0.65, u(25, 96)),
    )


def expose(image: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """(B,3,H,W) linear light -> sRGB in [0,1], in steps of 1/255, as a random camera gives it."""
    return develop(image, sample_sensors(len(image), generator, strength))


@torch.no_grad()
def develop(image: Tensor, sensor: Sensor) -> Tensor:
    """(B,3,H,W) linear light -> sRGB in [0,1] in steps of 1/255."""
    n, _, h, w = image.shape
    if image.device.type != "cpu" or n == 1:
        return _develop(image.clone(), sensor)
    step = max(1, (1 << 16) // (h * w))  # what fits the caches
    parts = []
    for i in range(0, n, step):
        rows = {k.name: getattr(sensor, k.name)[i : i + step] for k in fields(sensor)}
        parts.append(_develop(image[i : i + step].clone(), replace(sensor, **rows)))
    return torch.cat(parts)


def _develop(x: Tensor, sensor: Sensor) -> Tensor:
    h, w = x.shape[-2:]
    s = replace(sensor, **{k.name: _on(getattr(sensor, k.name), x.device) for k in fields(sensor)})
    # Which pictures a step touches is known on the CPU.
    if len(some := _which(sensor.blurred, x)):
        x[some] = _convolve(x[some], s.kernel[some])
    for factor in sensor.shrink.unique().tolist():
        if factor > 1:
            some = _which(sensor.shrink == factor, x)
            small = F.interpolate(x[some], (round(h / factor), round(w / factor)), mode="bilinear", antialias=True)
            x[some] = F.interpolate(small, (h, w), mode="bilinear")
    gain = s.exposure / (0.5 * x.mean((1, 2, 3)) + 0.5 * x[:, 1, ::2, ::2].square().mean((1, 2)).sqrt()).clamp_min(1e-4)
    y = torch.linspace(-1, 1, h, device=x.device)[:, None].square() + torch.linspace(-1, 1, w, device=x.device).square()
    x *= (1 - s.vignette[:, None, None] * 0.5 * y)[:, None]
    x *= (gain[:, None] * s.gains)[..., None, None]
    x = _grade(srgb_from_linear(_noise(x, s)), s)
    if len(some := _which(sensor.sharpen > 0, x)):
        part = x[some]
        x[some] = part + (part - tent(part)) * s.sharpen[some][:, None, None, None]
    x = x.clamp_(0, 1)
    if len(some := _which(sensor.quality > 0, x)):
        x[some] = jpeg(x[some], s.quality[some])
    return x.mul_(255).round_().div_(255)


def _on(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=True)


def _which(mask: Tensor, x: Tensor) -> Tensor:
    return torch.nonzero(mask)[:, 0].to(x.device, non_blocking=True)


def srgb_from_linear(x: Tensor) -> Tensor:
    """sRGB of linear light by a fit within 0.004 of the standard's, highlights rolled off above 0.8 to end at 1."""
    x = x.clamp_min(0)
    over = (x - 0.8).clamp_min(0)
    x = x - over * over / (over + 0.2)
    a = x.sqrt()
    b = a.sqrt()
    return (0.662002687 * a + 0.684122060 * b - 0.323583601 * b.sqrt() - 0.022541147 * x).clamp_min(0)


def _kernels(motion: Tensor, angle: Tensor, defocus: Tensor, size: int) -> Tensor:
    """(B,k,k) blur kernels: a line of `motion` pixels thickened by a Gaussian of `defocus` pixels."""
    r = torch.arange(size) - size // 2
    y, x = torch.meshgrid(r.float(), r.float(), indexing="ij")
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    along, across = (c * x + s * y).abs(), -s * x + c * y
    beyond = (along - motion[:, None, None] / 2).clamp_min(0)
    sigma = defocus.clamp_min(0.4)[:, None, None]
    k = torch.exp(-(beyond.square() + across.square()) / (2 * sigma * sigma))
    return k / k.sum((1, 2), keepdim=True)


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    n, c, h, w = x.shape
    k = kernel.shape[-1]
    x = F.pad(x, (k // 2,) * 4, mode="replicate").reshape(1, n * c, h + k - 1, w + k - 1)
    return F.conv2d(x, kernel.repeat_interleave(c, 0)[:, None], groups=n * c).reshape(n, c, h, w)


@lru_cache(maxsize=4)
def _tile(device: str) -> Tensor:
    return torch.randn(_TILE, _TILE, generator=torch.Generator().manual_seed(71)).to(device)


def _noise(x: Tensor, s: Sensor) -> Tensor:
    n, _, h, w = x.shape
    tile = _tile(str(x.device))
    iy = (s.place[..., 0, None] + torch.arange(h, device=x.device)) % _TILE
    ix = (s.place[..., 1, None] + torch.arange(w, device=x.device)) % _TILE
    if n == 1:
        z = torch.stack([tile.index_select(0, iy[0, k]).index_select(1, ix[0, k]) for k in range(3)])[None]
    else:
        z = tile.reshape(-1)[(iy * _TILE)[..., None] + ix[..., None, :]]
    light = x.clamp(0, 1)
    slow = z[:, :, :: max(1, h // 32), :: max(1, w // 32)] * s.chroma[:, None, None, None]
    x = x + z * (light * s.shot[:, None, None, None] + s.read.square()[:, None, None, None]).sqrt_()
    return x + F.interpolate(slow, (h, w), mode="bilinear") * (light * 0.7 + 0.3)


def _grade(x: Tensor, s: Sensor) -> Tensor:
    """Contrast about middle grey and saturation."""
    contrast, saturation = s.contrast[:, None, None, None], s.saturation[:, None, None, None]
    grey = 0.3 * x[:, :1] + 0.59 * x[:, 1:2] + 0.11 * x[:, 2:]
    return x * (contrast * saturation) + (grey * (contrast * (1 - saturation)) + 0.45 * (1 - contrast))


_LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
         (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
         (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))  # fmt: skip
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))


@lru_cache(maxsize=8)
def _jpeg_tables(device: str) -> tuple[Tensor, ...]:
    k, x = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    dct = torch.cos((2 * x + 1) * k * math.pi / 16) * 0.5
    dct[0] *= 2**-0.5
    chroma = torch.full((8, 8), 99.0)
    chroma[:4, :4] = torch.tensor(_CHROMA, dtype=torch.float32)
    ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    tables = (
        torch.kron(dct, dct),
        torch.tensor(_LUMA, dtype=torch.float32).reshape(64),
        chroma.reshape(64),
        ycc,
        torch.linalg.inv(ycc),
    )
    return tuple(t.to(device) for t in tables)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """What JPEG of quality (B) in 1 to 100 leaves of sRGB pictures (B,3,H,W) in [0,1]: 8x8 cosine transform, the
    tables of annex K of ITU-T T.81 scaled as libjpeg does, colour at half resolution. No entropy coding is needed."""
    h, w = x.shape[-2:]
    dct, luma, chroma, ycc, rgb = _jpeg_tables(str(x.device))
    x = F.pad(x, (0, -w % 16, 0, -h % 16), mode="replicate")
    y = torch.einsum("ij,njhw->nihw", ycc, x * 255)
    scale = torch.where(quality < 50, 5000 / quality.clamp_min(1), 200 - 2 * quality) / 100
    first = _quantise(y[:, :1] - 128, dct, luma, scale)
    rest = F.interpolate(_quantise(halved(y[:, 1:]), dct, chroma, scale), scale_factor=2, mode="nearest")
    back = torch.einsum("ij,njhw->nihw", rgb, torch.cat([first + 128, rest], 1))
    return (back / 255).clamp(0, 1)[..., :h, :w]


def _quantise(x: Tensor, dct: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4).reshape(n, -1, 64)
    step = (table * scale[:, None]).round().clamp(1, 255)[:, None]
    blocks = torch.round((blocks @ dct.T) / step) * step @ dct
    return blocks.reshape(n, c, h // 8, w // 8, 8, 8).transpose(3, 4).reshape(n, c, h, w)
