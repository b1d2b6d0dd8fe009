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
    noisy = u() ** 3 * strength
    return Sensor(
        exposure=0.19 * torch.exp(strength * u(-0.7, 0.6)),
        gains=torch.exp(strength * 0.1 * torch.randn(n, 3, generator=g)),
        kernel=_kernels(motion, 2 * math.pi * u(), defocus, kernel_size),
        blurred=(motion > 0) | (defocus > 0),
        vignette=sometimes(0.4, u(0.1, 0.6)),
        shot=4e-3 * noisy + 2e-4 * strength,
        read=0.02 * noisy + 0.001 * strength,
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
    x = image.clone()
    s = replace(sensor, **{k.name: _on(getattr(sensor, k.name), image.device) for k in fields(sensor)})
    # Which pictures a step touches is known on the CPU.
    some = _which(sensor.blurred, x)
    if len(some):
        x[some] = _convolve(x[some], s.kernel[some])
    for factor in sensor.shrink.unique().tolist():
        if factor > 1:
            some = _which(sensor.shrink == factor, x)
            small = F.interpolate(x[some], (round(h / factor), round(w / factor)), mode="bilinear", antialias=True)
            x[some] = F.interpolate(small, (h, w), mode="bicubic").clamp_min(0)
    level = x.mean((1, 2, 3)).clamp_min(1e-4)
    bright = x.amax(1).flatten(1).mean(1)
    gain = s.exposure / (0.7 * level + 0.3 * bright)
    x = x * (gain[:, None] * s.gains)[..., None, None]
    y = torch.linspace(-1, 1, h, device=x.device)[:, None].square() + torch.linspace(-1, 1, w, device=x.device).square()
    x = x * (1 - s.vignette[:, None, None, None] * 0.5 * y)
    x = _noise(x, s)
    x = srgb_from_linear(x)
    x = _grade(x, s)
    some = _which(sensor.sharpen > 0, x)
    if len(some):
        part = x[some]
        soft = F.avg_pool2d(F.pad(part, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x[some] = part + (part - soft) * s.sharpen[some][:, None, None, None]
    x = x.clamp(0, 1)
    some = _which(sensor.quality > 0, x)
    if len(some):
        x[some] = jpeg(x[some], s.quality[some])
    return torch.round(x.clamp(0, 1) * 255) / 255


def _on(x: Tensor, device: torch.device) -> Tensor:
    return x.to(device, non_blocking=True)


def _which(mask: Tensor, x: Tensor) -> Tensor:
    return torch.nonzero(mask)[:, 0].to(x.device, non_blocking=True)


def srgb_from_linear(x: Tensor) -> Tensor:
    """The inverse of `textures.linear_from_srgb`, highlights rolled off above 0.8."""
    x = x.clamp_min(0)
    x = torch.where(x > 0.8, 0.8 + 0.2 * torch.tanh((x - 0.8) / 0.2 * 0.6), x)
    return x.clamp_min(1e-6).pow(1 / 2.2)


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
    x = F.pad(x, (k // 2,) * 4, mode="replicate").transpose(0, 1)  # (3,n,...): groups are pictures
    return F.conv2d(x, kernel[:, None], groups=n).transpose(0, 1)


@lru_cache(maxsize=4)
def _tile(device: str) -> Tensor:
    return torch.randn(_TILE, _TILE, generator=torch.Generator().manual_seed(71)).to(device)


def _noise(x: Tensor, s: Sensor) -> Tensor:
    n, _, h, w = x.shape
    tile = _tile(str(x.device))
    iy = (s.place[..., 0, None] + torch.arange(h, device=x.device)) % _TILE
    ix = (s.place[..., 1, None] + torch.arange(w, device=x.device)) % _TILE
    z = tile.reshape(-1)[iy[..., None] * _TILE + ix[..., None, :]]
    sigma = (s.shot[:, None, None, None] * x.clamp(0, 1) + s.read.square()[:, None, None, None]).sqrt()
    slow = F.interpolate(z[:, :, :: max(1, h // 32), :: max(1, w // 32)], (h, w), mode="bilinear")
    return x + sigma * z + s.chroma[:, None, None, None] * slow * x.clamp(0, 1).sqrt()


def _grade(x: Tensor, s: Sensor) -> Tensor:
    grey = (x * x.new_tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    x = grey + (x - grey) * s.saturation[:, None, None, None]
    return 0.45 + (x - 0.45) * s.contrast[:, None, None, None]


_LUMA = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
         (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
         (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))  # fmt: skip
_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))


@lru_cache(maxsize=8)
def _jpeg_tables(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, x = torch.arange(8.0)[:, None], torch.arange(8.0)[None]
    dct = torch.cos((2 * x + 1) * k * math.pi / 16) * 0.5
    dct[0] *= 2**-0.5
    chroma = torch.full((8, 8), 99.0)
    chroma[:4, :4] = torch.tensor(_CHROMA, dtype=torch.float32)
    ycc = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    tables = torch.kron(dct, dct), torch.tensor(_LUMA, dtype=torch.float32).reshape(64), chroma.reshape(64), ycc
    return tuple(t.to(device) for t in tables)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """What JPEG of quality (B) in 1 to 100 leaves of sRGB pictures (B,3,H,W) in [0,1]: 8x8 cosine transform, the
    tables of annex K of ITU-T T.81 scaled as libjpeg does, colour at half resolution. No entropy coding is needed."""
    h, w = x.shape[-2:]
    dct, luma, chroma, ycc = _jpeg_tables(str(x.device))
    x = F.pad(x, (0, -w % 16, 0, -h % 16), mode="replicate")
    y = torch.einsum("ij,njhw->nihw", ycc, x * 255)
    scale = torch.where(quality < 50, 5000 / quality.clamp_min(1), 200 - 2 * quality) / 100
    first = _quantise(y[:, :1] - 128, dct, luma, scale)
    rest = F.interpolate(_quantise(F.avg_pool2d(y[:, 1:], 2), dct, chroma, scale), scale_factor=2, mode="nearest")
    back = torch.einsum("ij,njhw->nihw", torch.linalg.inv(ycc), torch.cat([first + 128, rest], 1))
    return (back / 255).clamp(0, 1)[..., :h, :w]


def _quantise(x: Tensor, dct: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4).reshape(n, -1, 64)
    step = (table * scale[:, None]).round().clamp(1, 255)[:, None]
    blocks = torch.round((blocks @ dct.T) / step) * step @ dct
    return blocks.reshape(n, c, h // 8, w // 8, 8, 8).transpose(3, 4).reshape(n, c, h, w)
