"""gsplat 1.5.3's own torch maths (`gsplat.cuda._torch_impl`) made to run on a CPU.

As shipped it has no CPU rasteriser: the pairs of a pixel and a Gaussian come from a CUDA kernel, the sums along rays
from nerfacc (CUDA too), and the tile lists from a Python loop over Gaussians. Those three are replaced here by torch
on whole tensors; covariance, projection, spherical harmonics and `accumulate` are gsplat's, called as they are.
"""

from __future__ import annotations

import sys
import types

import gsplat.cuda._torch_impl as gs
import torch
from scenes import ALPHA_MAX, ALPHA_MIN, STOP, TILE, SplatScene, tile_lists
from torch import Tensor


def render_weight_from_alpha(alphas: Tensor, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
    """nerfacc's: weights and transmittances of samples sorted by ray, front to back."""
    log = torch.log1p(-alphas).double()  # one sum runs over every ray, which float32 would not survive
    before = torch.cumsum(log, 0) - log
    first = torch.ones_like(ray_indices, dtype=torch.bool)
    first[1:] = ray_indices[1:] != ray_indices[:-1]
    start = before[first][torch.cumsum(first, 0) - 1]
    trans = torch.exp(before - start).to(alphas.dtype)
    return alphas * trans, trans


def accumulate_along_rays(weights: Tensor, values: Tensor | None, ray_indices: Tensor, n_rays: int) -> Tensor:
    """nerfacc's: (n_rays,D) sum of weights (M,) times values (M,D), or of the weights alone."""
    src = weights[:, None] if values is None else weights[:, None] * values
    return src.new_zeros(n_rays, src.shape[1]).index_add(0, ray_indices, src)


@torch.no_grad()
def indices(means, conics, opacities, ids, starts, width, height) -> tuple[Tensor, Tensor]:
    """`rasterize_to_indices_in_range` over all: gaussian_ids (M,), pixel_ids (M,), by pixel, front to back."""
    across = -(-width // TILE)
    y, x = (t.reshape(-1, 1) for t in torch.meshgrid(torch.arange(TILE), torch.arange(TILE), indexing="ij"))
    features = torch.cat([means, conics, opacities[:, None]], -1)[ids].T.contiguous()
    gaussian_ids, pixel_ids = [], []
    for tile, (start, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if start == end:
            continue
        mx, my, a, b, c, opacity = features[:, start:end]
        px, py = x + tile % across * TILE, y + tile // across * TILE
        dx, dy = px + 0.5 - mx, py + 0.5 - my
        alpha = (opacity * torch.exp(-(dx * (0.5 * a * dx + b * dy) + (0.5 * c) * dy * dy))).clamp_(max=ALPHA_MAX)
        hit = (alpha >= ALPHA_MIN) & (px < width) & (py < height)
        hit &= torch.cumprod(1 - alpha * hit, 1) > STOP
        pixel, k = torch.nonzero(hit, as_tuple=True)
        gaussian_ids.append(ids[start + k])
        pixel_ids.append((py * width + px)[pixel, 0])
    empty = ids[:0]
    return torch.cat([*gaussian_ids, empty]), torch.cat([*pixel_ids, empty])


def render(scene: SplatScene) -> tuple[Tensor, Tensor]:
    """color (H,W,3), alpha (H,W)."""
    means, quats, scales, opacities, sh, view = scene.leaves.values()
    covars, _ = gs._quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    radii, means2d, depths, conics, _ = gs._fully_fused_projection(
        means, covars, view[None], scene.K[None], scene.width, scene.height
    )
    center = -view[:3, :3].T @ view[:3, 3]
    colors = (gs._spherical_harmonics(3, means - center, sh) + 0.5).clamp(min=0)
    center, conic = means2d[0].detach(), conics[0].detach()
    ids, starts = tile_lists(center, radii[0].float(), depths[0].detach(), scene.width, scene.height)
    gaussian, pixel = indices(center, conic, opacities, ids.long(), starts.tolist(), scene.width, scene.height)
    image = torch.zeros_like(gaussian)
    _provide_nerfacc()
    color, alpha = gs.accumulate(
        means2d, conics, opacities[None], colors[None], gaussian, pixel, image, scene.width, scene.height
    )
    return (color + (1 - alpha) * scene.background)[0], alpha[0, ..., 0]


def _provide_nerfacc() -> None:
    stand_in = types.ModuleType("nerfacc")
    stand_in.render_weight_from_alpha, stand_in.accumulate_along_rays = render_weight_from_alpha, accumulate_along_rays
    sys.modules.setdefault("nerfacc", stand_in)
