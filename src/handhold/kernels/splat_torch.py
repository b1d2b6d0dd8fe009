"""Torch twin of the splatting rasteriser: the specification of `csrc/splat_*_isa.h`, and the path without a compiler.

Plain autograd, any dtype and device; dense over the Gaussians that reach each tile of 16x16 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
NEAR = 0.01  # metres
DILATION = 0.3  # pixels^2 added to the projected covariance
ALPHA_MAX, ALPHA_MIN, STOP = 0.999, 1.0 / 255.0, 1e-4
SH_C1 = 0.4886025119029199


def rotations(quats: Tensor) -> Tensor:
    """(N,3,3) from quaternions wxyz of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(-1, 3, 3)


def sh_basis(degree: int, d: Tensor) -> Tensor:
    """(N,(degree+1)^2) real spherical harmonics of unit directions (N,3), in the 3DGS order and signs."""
    x, y, z = d.unbind(-1)
    out = [torch.full_like(x, 0.28209479177387814)]
    if degree > 0:
        out += [-SH_C1 * y, SH_C1 * z, -SH_C1 * x]
    xx, yy, zz, xy, yz, xz = x * x, y * y, z * z, x * y, y * z, x * z
    if degree > 1:
        a = 1.0925484305920792
        out += [a * xy, -a * yz, 0.31539156525252005 * (2 * zz - xx - yy), -a * xz, 0.5462742152960396 * (xx - yy)]
    if degree > 2:
        a, b = -0.5900435899266435, -0.4570457994644658
        out += [
            a * y * (3 * xx - yy), 2.890611442640554 * xy * z, b * y * (4 * zz - xx - yy),
            0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy), b * x * (4 * zz - xx - yy),
            1.445305721320277 * z * (xx - yy), a * x * (xx - 3 * yy),
        ]  # fmt: skip
    return torch.stack(out, -1)


def shade(means: Tensor, colors: Tensor, viewmat: Tensor, sh_degree: int | None) -> Tensor:
    """(N,3) colours seen from the camera: as given, or spherical harmonics + 0.5, clamped at 0."""
    if sh_degree is None:
        return colors
    center = -viewmat[:3, :3].T @ viewmat[:3, 3]
    direction = torch.nn.functional.normalize(means - center, dim=-1)
    basis = sh_basis(sh_degree, direction)
    return (torch.einsum("nk,nkc->nc", basis, colors[:, : basis.shape[1]]) + 0.5).clamp(min=0)


def project(means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor, width: int, height: int):
    """Camera points (N,3), centres (N,2) px, covariances (N,3) as xx, xy, yy px^2 (EWA, Zwicker et al. 2001)."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    p = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    z = torch.where(p[:, 2] >= NEAR, p[:, 2], torch.ones_like(p[:, 2]))
    u, v = p[:, 0] / z, p[:, 1] / z
    # The Jacobian is taken no further out than 15 % of the image beyond its edge, where it would blow up.
    mx, my = 0.15 * width / fx, 0.15 * height / fy
    uc, vc = u.clamp(-cx / fx - mx, (width - cx) / fx + mx), v.clamp(-cy / fy - my, (height - cy) / fy + my)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * uc / z, zero, fy / z, -fy * vc / z], -1).reshape(-1, 2, 3)
    M = rotations(quats) * scales[:, None]
    T = J @ viewmat[:3, :3] @ M
    cov = T @ T.transpose(1, 2)
    return (
        p,
        torch.stack([fx * u + cx, fy * v + cy], -1),
        cov[:, [0, 0, 1], [0, 1, 1]] + cov.new_tensor([DILATION, 0, DILATION]),
    )


def rasterize(means, quats, scales, opacities, colors, viewmat, K, width, height, sh_degree=None, ids=None, n_ids=0):
    """See `handhold.kernels.splat.rasterize`."""
    p, center, cov = project(means, quats, scales, viewmat, K, width, height)
    det = cov[:, 0] * cov[:, 2] - cov[:, 1] ** 2
    seen = (p[:, 2] >= NEAR) & (opacities >= ALPHA_MIN) & (det > 0) & torch.isfinite(center).all(-1)
    keep = torch.nonzero(seen)[:, 0]
    keep = keep[torch.argsort(p[keep, 2].detach(), stable=True)]
    depth, center, cov, det, opacity = p[keep, 2], center[keep], cov[keep], det[keep], opacities[keep]
    conic = torch.stack([cov[:, 2], -cov[:, 1], cov[:, 0]], -1) / det[:, None]
    feature = [shade(means, colors, viewmat, sh_degree)[keep], depth[:, None]]
    if n_ids:
        feature.append((ids[keep, None] == torch.arange(n_ids, device=means.device)).to(means.dtype))
    feature = torch.cat(feature, -1)
    s_max = torch.log(255 * opacity)
    with torch.no_grad():
        reach = torch.sqrt(2 * s_max[:, None] * cov[:, [0, 2]])
        lo, hi = center - reach, center + reach
    grid = {"dtype": means.dtype, "device": means.device}
    rows_out, rows_alpha = [], []
    for y in range(0, height, TILE):
        h = min(TILE, height - y)
        out_row, alpha_row = [], []
        near_row = (hi[:, 1] >= y) & (lo[:, 1] <= y + h)
        for x in range(0, width, TILE):
            w = min(TILE, width - x)
            i = torch.nonzero(near_row & (hi[:, 0] >= x) & (lo[:, 0] <= x + w))[:, 0]
            py, px = torch.meshgrid(torch.arange(h, **grid) + y + 0.5, torch.arange(w, **grid) + x + 0.5, indexing="ij")
            dx, dy = px.reshape(-1, 1) - center[i, 0], py.reshape(-1, 1) - center[i, 1]  # (pixels, gaussians)
            a, b, c = conic[i].unbind(-1)
            sigma = dx * (0.5 * a * dx + b * dy) + 0.5 * c * dy * dy
            hit = (sigma >= 0) & (sigma <= s_max[i])
            alpha = (opacity[i] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
            thin = torch.where(hit, torch.log1p(-alpha), torch.zeros_like(alpha))
            after = torch.cumsum(thin, 1)
            go_on = (
                torch.exp(after.detach()) > STOP
            )  # the Gaussian that would bring T to 1e-4 is not drawn, nor any behind it
            weight = torch.where(hit & go_on, alpha * torch.exp(after - thin), torch.zeros_like(alpha))
            T = torch.exp(torch.where(go_on, thin, torch.zeros_like(thin)).sum(1))
            out_row.append((weight @ feature[i]).reshape(h, w, -1))
            alpha_row.append((1 - T).reshape(h, w))
        rows_out.append(torch.cat(out_row, 1))
        rows_alpha.append(torch.cat(alpha_row, 1))
    return torch.cat(rows_out, 0), torch.cat(rows_alpha, 0)
