"""Torch twin of the splatting rasteriser: the specification of `csrc/splat_*_isa.h`, and the path without a compiler.

Plain autograd, any dtype and device; dense over the Gaussians that reach each tile of 16x16 pixels. A footprint (3D or
2D Gaussians) gives, for some Gaussians and pixels, sigma (alpha = opacity exp(-sigma)) and the camera z that is seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

TILE = 16
NEAR, FAR = 0.01, 1e10  # metres
DILATION = 0.3  # pixels^2 added to the projected covariance
ALPHA_MAX, ALPHA_MIN, STOP = 0.999, 1.0 / 255.0, 1e-4
SH_C1 = 0.4886025119029199

# of Gaussians i at pixels px, py (P,1): sigma (P,len(i)), camera z broadcastable to it
Evaluate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def largest(quats: Tensor, dim: int) -> Tensor:
    """The largest absolute entry along dim, a constant: divided by it first, squares neither overflow nor vanish."""
    return quats.detach().abs().amax(dim, keepdim=True).clamp(min=torch.finfo(quats.dtype).tiny)


def rotations(quats: Tensor) -> Tensor:
    """(N,3,3) from quaternions wxyz of any length."""
    w, x, y, z = torch.nn.functional.normalize(quats / largest(quats, -1), dim=-1).unbind(-1)
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


def project_3d(p: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor, width: int, height: int):
    """Centres (N,2) px, covariances (N,3) as xx, xy, yy px^2, their determinants (EWA, Zwicker et al. 2001).

    p (N,3): centres in the camera's frame, z > 0.
    """
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    z = p[:, 2]
    u, v = p[:, 0] / z, p[:, 1] / z
    # The Jacobian is taken no further out than 15 % of the image beyond its edge, where it would blow up.
    mx, my = 0.15 * width / fx, 0.15 * height / fy
    uc = torch.minimum(torch.maximum(u, -cx / fx - mx), (width - cx) / fx + mx)
    vc = torch.minimum(torch.maximum(v, -cy / fy - my), (height - cy) / fy + my)
    zero = torch.zeros_like(z)
    J = torch.stack([fx / z, zero, -fx * uc / z, zero, fy / z, -fy * vc / z], -1).reshape(-1, 2, 3)
    B = J @ viewmat[:3, :3] @ (rotations(quats) * scales[:, None])
    cov = (B @ B.transpose(1, 2))[:, [0, 0, 1], [0, 1, 1]]
    # |b0 x b1|^2 = cov_xx cov_yy - cov_xy^2, which does not cancel for needles
    det = torch.linalg.cross(B[:, 0], B[:, 1]).square().sum(-1) + DILATION * (cov[:, 0] + cov[:, 2] + DILATION)
    cov = cov + cov.new_tensor([DILATION, 0, DILATION])
    return torch.stack([fx * u + cx, fy * v + cy], -1), cov, det


def footprint_3d(p, quats, scales, s_max, viewmat, K, width, height):
    """Which Gaussians can be seen (N,), their boxes lo, hi (N,2) px, and `Evaluate`."""
    center, cov, det = project_3d(p, quats, scales, viewmat, K, width, height)
    conic = torch.stack([cov[:, 2], -cov[:, 1], cov[:, 0]], -1) / det[:, None]

    def evaluate(i: Tensor, px: Tensor, py: Tensor):
        dx, dy = px - center[i, 0], py - center[i, 1]
        a, b, c = conic[i].unbind(-1)
        return dx * (0.5 * a * dx + b * dy) + 0.5 * c * dy * dy, p[i, 2]

    with torch.no_grad():
        reach = torch.sqrt(2 * s_max[:, None] * cov[:, [0, 2]])
    return torch.isfinite(center).all(-1) & (det < 1e30), center - reach, center + reach, evaluate


def planes(p: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """Projected centres (N,2) px and, from there, the matrices (N,3,3) that take (u, v, 1) on a disk to pixels times z.

    Huang et al. 2024, eq. 4 and 8. (u, v) are standard deviations along the disk's axes.
    """
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    T = torch.cat([(viewmat[:3, :3] @ rotations(quats) * scales[:, None])[:, :, :2], p[:, :, None]], 2)
    ratio = p[:, :2] / p[:, 2:]
    # The last column of the first two rows is 0 by construction.
    rows = [fx * (T[:, 0] - ratio[:, :1] * T[:, 2]), fy * (T[:, 1] - ratio[:, 1:] * T[:, 2]), T[:, 2]]
    return ratio * torch.stack([fx, fy]) + torch.stack([cx, cy]), torch.stack(rows, 1)


def meet(center: Tensor, M: Tensor, px: Tensor, py: Tensor) -> tuple[Tensor, Tensor]:
    """sigma and camera z where rays of pixels (...) meet disks `center` (...,2), `M` (...,3,3) of `planes`, broadcast.

    The two planes through the pixel, x = px and y = py, meet the disk's plane in one point (their eq. 9-10). Where that
    is behind the near plane, or where the screen-space filter (their eq. 11, 1/sqrt(2) px) is wider, the filter counts,
    at the centre's z.
    """
    dx, dy = px - center[..., 0], py - center[..., 1]
    hu, hv = dx[..., None] * M[..., 2, :] - M[..., 0, :], dy[..., None] * M[..., 2, :] - M[..., 1, :]
    nu, nv, cz = torch.linalg.cross(hu, hv).unbind(-1)
    flat = 2 * (dx * dx + dy * dy)
    centre_z = M[..., 2, 2].expand_as(cz)
    with torch.no_grad():
        u, v = nu / cz, nv / cz
        met = (M[..., 2, 0] * u + M[..., 2, 1] * v + centre_z >= NEAR) & (u * u + v * v <= flat)
    safe = torch.where(met, cz, torch.ones_like(cz))
    u, v = torch.where(met, nu, torch.zeros_like(nu)) / safe, torch.where(met, nv, torch.zeros_like(nv)) / safe
    z = M[..., 2, 0] * u + M[..., 2, 1] * v + centre_z  # u = v = 0 where the filter counts
    return 0.5 * torch.where(met, u * u + v * v, flat), z


def footprint_2d(p, quats, scales, s_max, viewmat, K, width, height):
    """As `footprint_3d`."""
    center, M = planes(p, quats, scales, viewmat, K)

    def evaluate(i: Tensor, px: Tensor, py: Tensor):
        return meet(center[i], M[i], px, py)

    with torch.no_grad():
        # The disk of radius^2 2 s_max in the image, by its dual conic: a box while it stays in front of the camera.
        weight = torch.stack([2 * s_max, 2 * s_max, -torch.ones_like(s_max)], -1)
        dot = lambda a, b: (weight * M[:, a] * M[:, b]).sum(-1)  # noqa: E731
        d = dot(2, 2)
        inside = d < -1e-3 * p[:, 2] ** 2
        d = torch.where(inside, d, -torch.ones_like(d))
        mid = torch.stack([dot(0, 2), dot(1, 2)], -1) / d[:, None]
        half = (mid * mid - torch.stack([dot(0, 0), dot(1, 1)], -1) / d[:, None]).clamp(min=0).sqrt() * 1.001
        flat = torch.sqrt(s_max)[:, None] + 0.01
        huge = torch.full_like(mid, math.inf)
        lo = center + torch.where(inside[:, None], torch.minimum(mid - half, -flat), -huge)
        hi = center + torch.where(inside[:, None], torch.maximum(mid + half, flat), huge)
    return torch.isfinite(center).all(-1) & torch.isfinite(M).flatten(1).all(1), lo, hi, evaluate


FOOTPRINTS = {"3d": footprint_3d, "2d": footprint_2d}


def rasterize(
    means, quats, scales, opacities, colors, viewmat, K, width, height, sh_degree=None, ids=None, n_ids=0,
    features=None, kind="3d",
):  # fmt: skip
    """See `handhold.kernels.splat.rasterize`."""
    p = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    with torch.no_grad():
        seen = (p[:, 2] >= NEAR) & (p[:, 2] <= FAR) & (opacities >= ALPHA_MIN) & (quats != 0).any(-1)
        keep = torch.nonzero(seen)[:, 0]
        keep = keep[torch.argsort(p[keep, 2], stable=True)]
    p, opacity = p[keep], opacities[keep]
    with torch.no_grad():
        s_max = torch.log(255 * opacity)
    ok, lo, hi, evaluate = FOOTPRINTS[kind](p, quats[keep], scales[keep], s_max, viewmat, K, width, height)
    feature = [shade(means[keep], colors[keep], viewmat, sh_degree)]
    if features is not None:
        feature.append(features[keep])
    if n_ids:
        feature.append((ids[keep, None] == torch.arange(n_ids, device=means.device)).to(means.dtype))
    feature = torch.cat(feature, -1)
    grid = {"dtype": means.dtype, "device": means.device}
    rows: list[tuple[Tensor, ...]] = []
    for y in range(0, height, TILE):
        h = min(TILE, height - y)
        tiles = []
        near_row = ok & (hi[:, 1] >= y) & (lo[:, 1] <= y + h)
        for x in range(0, width, TILE):
            w = min(TILE, width - x)
            i = torch.nonzero(near_row & (hi[:, 0] >= x) & (lo[:, 0] <= x + w))[:, 0]
            py, px = torch.meshgrid(torch.arange(h, **grid) + y + 0.5, torch.arange(w, **grid) + x + 0.5, indexing="ij")
            sigma, z = evaluate(i, px.reshape(-1, 1), py.reshape(-1, 1))  # (pixels, gaussians)
            hit = (sigma >= 0) & (sigma <= s_max[i])
            alpha = (opacity[i] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
            thin = torch.where(hit, torch.log1p(-alpha), torch.zeros_like(alpha))
            after = torch.cumsum(thin, 1)
            # The Gaussian that would bring the transmittance to 1e-4 is not drawn, nor any behind it.
            go_on = torch.exp(after.detach()) > STOP
            weight = torch.where(hit & go_on, alpha * torch.exp(after - thin), torch.zeros_like(alpha))
            T = torch.exp(torch.where(go_on, thin, torch.zeros_like(thin)).sum(1))
            painted = weight @ feature[i]
            out = torch.cat([painted[:, :3], (weight * z).sum(1, keepdim=True), painted[:, 3:]], 1)
            half = after.detach() <= math.log(0.5)
            if len(i):
                median = torch.where(half.any(1), keep[i][half.to(torch.int8).argmax(1)], -1)
            else:
                median = torch.full((h * w,), -1, device=means.device)
            tiles.append((out.reshape(h, w, -1), (1 - T).reshape(h, w), median.to(torch.int32).reshape(h, w)))
        rows.append(tuple(torch.cat(parts, 1) for parts in zip(*tiles, strict=True)))
    return tuple(torch.cat(parts, 0) for parts in zip(*rows, strict=True))
