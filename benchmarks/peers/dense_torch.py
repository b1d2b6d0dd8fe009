"""Splatting as plain torch with autograd: for each tile of 16 x 16 pixels, dense over the Gaussians that reach it."""

from __future__ import annotations

import math

import torch
from scenes import ALPHA_MAX, ALPHA_MIN, STOP, TILE, SplatScene, project, tile_lists
from torch import Tensor

LOG_STOP = math.log(STOP)


def render(scene: SplatScene) -> tuple[Tensor, Tensor]:
    """color (H,W,3), alpha (H,W)."""
    p = project(scene)
    ids, starts = tile_lists(p["means"].detach(), p["reach"], p["depths"], scene.width, scene.height)
    return rasterize(
        p["means"], p["conics"], p["colors"], p["opacities"], ids.long(), starts.tolist(), scene.width, scene.height,
        scene.background,
    )  # fmt: skip


def rasterize(means, conics, colors, opacities, ids, starts, width, height, background) -> tuple[Tensor, Tensor]:
    across, down = -(-width // TILE), -(-height // TILE)
    y, x = (t.reshape(-1, 1) for t in torch.meshgrid(torch.arange(TILE) + 0.5, torch.arange(TILE) + 0.5, indexing="ij"))
    over = torch.cat([background, torch.zeros(1)])
    parts = [means, conics, opacities[:, None], colors, torch.ones_like(colors[:, :1])]
    features = torch.cat(parts, -1)[ids]  # one gather, so one scatter backward
    tiles = []
    sizes = [end - start for start, end in zip(starts[:-1], starts[1:], strict=True)]
    for tile, here in enumerate(features.split(sizes)):  # split, not slices: their backward would be a sum of wholes
        if len(here) == 0:
            tiles.append(over.expand(TILE * TILE, 4))
            continue
        mx, my, a, b, c, opacity = here[:, :6].unbind(-1)
        dx, dy = x + tile % across * TILE - mx, y + tile // across * TILE - my  # (pixels, Gaussians)
        sigma = dx * (0.5 * a * dx + b * dy) + (0.5 * c) * dy * dy
        alpha = (opacity * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
        alpha = torch.where(alpha.detach() >= ALPHA_MIN, alpha, 0)
        log_1_alpha = torch.log1p(-alpha)
        log_after = torch.cumsum(log_1_alpha, 1)
        # The Gaussian that would bring T to 1e-4 is not drawn, nor any behind it.
        weight = torch.where(log_after.detach() > LOG_STOP, alpha * torch.exp(log_after - log_1_alpha), 0)
        out = weight @ here[:, 6:]
        tiles.append(out + (1 - out[:, 3:]) * over)
    image = torch.stack(tiles).reshape(down, across, TILE, TILE, 4).transpose(1, 2)
    image = image.reshape(down * TILE, across * TILE, 4)[:height, :width]
    return image[..., :3], image[..., 3]
