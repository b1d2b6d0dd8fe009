"""Backgrounds: rooms, tables, shelves and clutter drawn once from a seed, and the user's own pictures; cropped, turned,
recoloured, blurred and lit anew each time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import UnusableInput
from . import prints
from .filters import halved, tent
from .textures import linear_from_srgb


@dataclass(frozen=True, eq=False)
class Backgrounds:
    """A bank of pictures. `images` are the user's; `user_share` of the samples use them where there are any."""

    images: Tensor | None = None  # (M,3,h,w) uint8 sRGB
    n_rooms: int = 128
    size: int = 256
    seed: int = 0
    user_share: float = 0.6

    def sample(
        self, n: int, height: int, width: int, generator: torch.Generator, device: str | torch.device = "cpu"
    ) -> Tensor:
        """(n,3,H,W) linear radiance, mean about 0.2 to 0.4, never negative; drawn on the CPU from `generator`."""
        g = generator

        def u(low: float = 0.0, high: float = 1.0, *shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=g) * (high - low) + low

        rooms = _rooms(self.n_rooms, self.size, self.seed, str(device))
        first = torch.randint(len(rooms), (n,), generator=g)
        pick_user = u() < (self.user_share if self.images is not None and len(self.images) else 0.0)
        user = torch.randint(max(1, len(self.images) if self.images is not None else 1), (n,), generator=g)
        theta = _affine(u, width / height)
        mix, slope, amount = _grades(u, pick_user)
        out = torch.empty(n, 3, height, width, device=device)
        step = n if out.device.type != "cpu" else max(1, (1 << 16) // (height * width))  # what fits the caches
        for i in range(0, n, step):
            some = slice(i, i + step)
            grid = _grid(theta[some].to(device), height, width)
            x = _look_up(rooms, first[some], grid)
            at = torch.nonzero(pick_user[some])[:, 0]
            if len(at):
                x[at.to(device)] = _look_up(self.images, user[some][at], grid[at.to(device)])
            x = torch.einsum("nij,njhw->nihw", mix[some].to(x), linear_from_srgb(x.clamp_(0, 255).div_(255)))
            x = _defocus(_lit(x, slope[some].to(x)), amount[some])
            out[some] = x.clamp_min_(0)
        return out


def _look_up(pictures: Tensor, index: Tensor, grid: Tensor) -> Tensor:
    picked = pictures[index.to(pictures.device)].to(grid.device).float()
    return F.grid_sample(picked, grid, padding_mode="reflection", align_corners=False)


def _grid(theta: Tensor, height: int, width: int) -> Tensor:
    """(n,H,W,2) as `affine_grid` gives it, for theta (n,2,3)."""
    x = (torch.arange(width, device=theta.device) * 2 + 1) / width - 1
    y = (torch.arange(height, device=theta.device) * 2 + 1) / height - 1
    down = theta[:, None, :, 1] * y[:, None] + theta[:, None, :, 2]  # (n,H,2)
    return theta[:, None, None, :, 0] * x[:, None] + down[:, :, None]


@lru_cache(maxsize=12)
def _rooms(n: int, size: int, seed: int, device: str) -> Tensor:
    x = torch.from_numpy(prints.room_pictures(n, size, seed)).permute(0, 3, 1, 2).contiguous()
    return x.to(device)


def _affine(u, aspect: float) -> Tensor:
    """(n,2,3) of a crop of the bank's picture: turned, mirrored, scaled, shifted."""
    n = len(u())
    turn = torch.where(u() < 0.7, 0.12 * (u() - 0.5), 2 * math.pi * u())
    scale = 0.35 + 0.65 * u()
    sx = scale * torch.where(u() < 0.5, 1.0, -1.0) * min(aspect, 1.5) ** 0.5 * (0.85 + 0.3 * u())
    sy = scale / min(aspect, 1.5) ** 0.5
    c, s = turn.cos(), turn.sin()
    room = (1.05 - scale).clamp_min(0)
    rows = torch.stack([c * sx, -s * sy, room * u(-1, 1), s * sx, c * sy, room * u(-1, 1)], 1)
    return rows.reshape(n, 2, 3)


def _grades(u, user: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of n pictures: colour matrices (n,3,3) that exchange channels, take colour away and change the gain, slopes of
    light (n,2) and defocus (n) in levels. user (n): pictures whose channels stay in place."""
    n = len(user)
    order = u(0, 1, 3).argsort(1)
    order = torch.where((u(0, 1, 1) < 0.85) | user[:, None], torch.arange(3), order)
    mix = F.one_hot(order, 3).float()
    keep = (u(0.2, 1.0, 1, 1) ** 1.5).where(~user[:, None, None], u(0.7, 1.0, 1, 1))
    grey = torch.tensor([0.3, 0.5, 0.2]).expand(n, 3, 3)
    mix = (mix * keep + grey @ mix * (1 - keep)) * u(0.4, 1.5, 1, 1) * (1 + 0.06 * u(-1, 1, 3, 1))
    return mix, u(-0.5, 0.5, 2), torch.where(u() < 0.5, 0.6 * u(), 2.0 * u())


def _lit(x: Tensor, slope: Tensor) -> Tensor:
    gy = torch.linspace(-1, 1, x.shape[2], device=x.device)
    gx = torch.linspace(-1, 1, x.shape[3], device=x.device)
    return x * torch.exp(slope[:, :1] * gx)[:, None, None] * torch.exp(slope[:, 1:] * gy)[:, None, :, None]


def _defocus(x: Tensor, amount: Tensor) -> Tensor:
    """Blurred by a per-picture depth of field: three levels, between which each picture lies."""
    h, w = x.shape[2:]
    some = torch.nonzero(amount > 0.15)[:, 0].to(x.device)
    if len(some) == 0:
        return x
    y = x[some]
    level = amount[amount > 0.15].clamp(max=2)
    mixed = y * (1 - level).clamp_min(0).to(x)[:, None, None, None]
    for k in (1, 2):
        if min(h, w) >> k < 4:
            return x
        y = tent(tent(halved(y)))
        share = (1 - (level - k).abs()).clamp_min(0)
        if bool((share > 0).any()):
            mixed += F.interpolate(y, (h, w), mode="bilinear") * share.to(x)[:, None, None, None]
    x[some] = mixed
    return x


def read_images(folder: str | Path, size: int = 256, limit: int = 4096) -> Tensor:
    """(M,3,s,s) uint8 sRGB of the pictures in a folder and those below it, their middle square, M at most `limit`.

    Raises `UnusableInput` where there is none that can be read.
    """
    suffixes = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
    found = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in suffixes)
    pictures = []
    for path in found[:: max(1, len(found) // limit)][:limit]:
        img = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if img is None:
            continue
        h, w = img.shape[:2]
        s = min(h, w)
        y, x = (h - s) // 2, (w - s) // 2
        square = cv2.resize(img[y : y + s, x : x + s], (size, size), interpolation=cv2.INTER_AREA)
        pictures.append(torch.from_numpy(square[..., ::-1].copy()).permute(2, 0, 1))
    if not pictures:
        raise UnusableInput(f"{folder} holds no picture that can be read; give a folder of JPEG or PNG files.")
    return torch.stack(pictures)
