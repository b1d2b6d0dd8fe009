"""The scenes that `render.py` times, the inputs of the raster stage, and how much work they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 16
NEAR, DILATION = 0.01, 0.3  # metres, px^2
ALPHA_MAX, ALPHA_MIN, STOP = 0.999, 1.0 / 255.0, 1e-4


@dataclass(frozen=True)
class SplatScene:
    """N Gaussians before one camera, and the gradients that arrive at the image."""

    leaves: dict[str, Tensor]  # means (N,3), quats (N,4), scales (N,3), opacities (N,), sh (N,16,3), viewmat (4,4)
    K: Tensor  # (3,3) pixels
    width: int
    height: int
    background: Tensor  # (3,)
    v_color: Tensor  # (H,W,3) dLoss/dcolor
    v_alpha: Tensor  # (H,W)


@dataclass(frozen=True)
class RasterScene:
    """What the raster stage starts from: projected Gaussians and depth-sorted lists of tiles of 16 x 16 pixels."""

    width: int
    height: int
    means: Tensor  # (N,2) px
    conics: Tensor  # (N,3) inverse covariance as xx, xy, yy, px^-2
    colors: Tensor  # (N,3)
    opacities: Tensor  # (N,)
    background: Tensor  # (3,)
    ids: Tensor  # (M,) int32 Gaussian of each intersection, tile by tile, front to back
    starts: Tensor  # (tiles+1,) int32 first intersection of each tile, rows of tiles first
    v_color: Tensor
    v_alpha: Tensor


def bumpy_sphere(n: int, px: int, seed: int = 0) -> SplatScene:
    """n surfels on a bumpy sphere of 50 mm radius that covers about 35 % of px x px pixels, SH degree 3."""
    g = torch.Generator().manual_seed(seed)
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    view = torch.eye(4)
    view[2, 3] = 0.3
    leaves = {
        "means": d * 0.05 * (1 + 0.1 * torch.sin(6 * d[:, :1]) * torch.cos(5 * d[:, 1:2])),
        "quats": torch.randn(n, 4, generator=g),
        "scales": torch.exp(torch.randn(n, 3, generator=g) * 0.3) * 0.025 * math.sqrt(4 * math.pi / n),
        "opacities": torch.sigmoid(torch.randn(n, generator=g) + 1),
        "sh": torch.randn(n, 16, 3, generator=g) * 0.2,
        "viewmat": view,
    }
    return SplatScene(
        {name: t.requires_grad_() for name, t in leaves.items()},
        torch.tensor([[2.0 * px, 0, px / 2], [0, 2.0 * px, px / 2], [0, 0, 1]]),
        px, px,
        torch.tensor([0.2, 0.4, 0.6]),
        torch.randn(px, px, 3, generator=g),
        torch.randn(px, px, generator=g),
    )  # fmt: skip


def rotations(quats: Tensor) -> Tensor:
    """(N,3,3) from wxyz of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(-1, 3, 3)


def sh_colors(sh: Tensor, d: Tensor) -> Tensor:
    """(N,3) from coefficients (N,16,3) of degree 3 and unit directions (N,3), 3DGS order and signs, before clamping."""
    x, y, z = d.unbind(-1)
    xx, yy, zz, xy = x * x, y * y, z * z, x * y
    basis = [
        torch.full_like(x, 0.28209479177387814), -0.4886025119029199 * y, 0.4886025119029199 * z,
        -0.4886025119029199 * x, 1.0925484305920792 * xy, -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * zz - xx - yy), -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * xy * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy), 0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy), 1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
    ]  # fmt: skip
    return torch.einsum("nk,nkc->nc", torch.stack(basis, -1), sh) + 0.5


def project(scene: SplatScene) -> dict[str, Tensor]:
    """The Gaussians on the image (EWA, Zwicker et al. 2001), differentiable in `scene.leaves`.

    means (N,2) px, conics (N,3), colors (N,3), opacities (N,), and without gradient depths (N,), reach (N,2) px: the
    half extent of where alpha can be seen, 0 for a Gaussian that cannot be seen at all.
    """
    means, quats, scales, opacities, sh, view = scene.leaves.values()
    fx, fy, cx, cy = scene.K[0, 0], scene.K[1, 1], scene.K[0, 2], scene.K[1, 2]
    p = means @ view[:3, :3].T + view[:3, 3]
    seen = (p[:, 2] >= NEAR) & (opacities >= ALPHA_MIN)
    z = torch.where(seen, p[:, 2], torch.ones_like(p[:, 2]))
    u, v = p[:, 0] / z, p[:, 1] / z
    margin_x, margin_y = 0.15 * scene.width / fx, 0.15 * scene.height / fy
    uc = u.clamp(-cx / fx - margin_x, (scene.width - cx) / fx + margin_x)
    vc = v.clamp(-cy / fy - margin_y, (scene.height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * uc / z, zero, fy / z, -fy * vc / z], -1).reshape(-1, 2, 3)
    T = J @ view[:3, :3] @ (rotations(quats) * scales[:, None])
    cov = T @ T.transpose(1, 2)
    a, b, c = cov[:, 0, 0] + DILATION, cov[:, 0, 1], cov[:, 1, 1] + DILATION
    center = -view[:3, :3].T @ view[:3, 3]
    colors = sh_colors(sh, torch.nn.functional.normalize(means - center, dim=-1)).clamp(min=0)
    with torch.no_grad():
        s_max = torch.log(255 * opacities).clamp(min=0)
        reach = torch.sqrt(2 * s_max[:, None] * torch.stack([a, c], -1)) * seen[:, None]
    return {
        "means": torch.stack([fx * u + cx, fy * v + cy], -1),
        "conics": torch.stack([c, -b, a], -1) / (a * c - b * b)[:, None],
        "colors": colors,
        "opacities": opacities,
        "depths": p[:, 2].detach(),
        "reach": reach,
    }


@torch.no_grad()
def tile_lists(means: Tensor, reach: Tensor, depths: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """ids (M,), starts (tiles+1,) int32, as in `RasterScene`."""
    across, down = -(-width // TILE), -(-height // TILE)
    limit = torch.tensor([across, down])
    low = torch.floor((means - reach) / TILE).clamp(min=0).minimum(limit).long()
    high = (torch.floor((means + reach) / TILE) + 1).clamp(min=0).minimum(limit).long()
    size = (high - low).clamp(min=0) * (reach > 0)
    order = torch.argsort(depths, stable=True)
    count = size.prod(-1)[order]
    owner = torch.repeat_interleave(order, count)
    k = torch.arange(len(owner)) - torch.repeat_interleave(torch.cumsum(count, 0) - count, count)
    tile = (low[owner, 1] + k // size[owner, 0].clamp(min=1)) * across + low[owner, 0] + k % size[owner, 0].clamp(min=1)
    tile, order = torch.sort(tile, stable=True)  # stable: each tile keeps the order of depth
    starts = torch.searchsorted(tile, torch.arange(across * down + 1))
    return owner[order].int(), starts.int()


def raster_scene(scene: SplatScene, projected: dict[str, Tensor] | None = None) -> RasterScene:
    p = {name: t.detach().contiguous() for name, t in (projected or project(scene)).items()}
    ids, starts = tile_lists(p["means"], p["reach"], p["depths"], scene.width, scene.height)
    return RasterScene(
        scene.width, scene.height, p["means"], p["conics"], p["colors"], p["opacities"], scene.background,
        ids, starts, scene.v_color, scene.v_alpha,
    )  # fmt: skip


@torch.no_grad()
def count_work(r: RasterScene) -> dict[str, int]:
    """Tile intersections, and pairs of a pixel and a Gaussian that add to the image."""
    across, pairs = -(-r.width // TILE), 0
    y, x = torch.meshgrid(torch.arange(TILE) + 0.5, torch.arange(TILE) + 0.5, indexing="ij")
    for tile, (start, end) in enumerate(zip(r.starts[:-1].tolist(), r.starts[1:].tolist(), strict=True)):
        if start == end:
            continue
        i = r.ids[start:end].long()
        x0, y0 = tile % across * TILE, tile // across * TILE
        dx, dy = (x + x0).reshape(-1, 1) - r.means[i, 0], (y + y0).reshape(-1, 1) - r.means[i, 1]
        a, b, c = r.conics[i].unbind(-1)
        alpha = (r.opacities[i] * torch.exp(-(0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy))).clamp(max=ALPHA_MAX)
        hit = (alpha >= ALPHA_MIN) & ((x + x0 < r.width) & (y + y0 < r.height)).reshape(-1, 1)
        drawn = hit & (torch.cumprod(1 - alpha * hit, 1) > STOP)
        pairs += int(drawn.sum())
    return {"gaussians": len(r.means), "intersections": len(r.ids), "pairs": pairs}
