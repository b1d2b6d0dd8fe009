"""3D Gaussians as plain tensors, and how they move: affinely (skinning), by a similarity, to the other hand's side."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..geometry.rigid import matrix_from_quat, nearest_rotation, quat_from_matrix, quat_multiply, so3_exp
from ..kernels.splat_torch import sh_basis

# Spherical harmonics that change sign with x, among the 16 of degrees 0-3 in the 3DGS order.
_ODD_IN_X = (3, 4, 7, 10, 13, 15)


@dataclass(frozen=True)
class Gaussians:
    """N anisotropic Gaussians in one frame, metres, with the values a renderer takes (no logits, no logarithms)."""

    means: Tensor  # (N,3) metres
    quats: Tensor  # (N,4) wxyz, any length
    scales: Tensor  # (N,3) standard deviations, metres
    opacities: Tensor  # (N,) in [0,1]
    colors: Tensor  # (N,3) in [0,1], or (N,K,3) spherical-harmonic coefficients, K = (degree + 1)^2
    ids: Tensor  # (N,) int64 body id

    def __len__(self) -> int:
        return len(self.means)

    def with_values(self, **kw) -> Gaussians:
        return replace(self, **kw)

    def chosen(self, which: Tensor) -> Gaussians:
        """Those at indices, or where a (N,) mask is True."""
        names = ("means", "quats", "scales", "opacities", "colors", "ids")
        return Gaussians(**{k: getattr(self, k)[which] for k in names})

    def to(self, *args, **kw) -> Gaussians:
        """All float tensors moved or cast as by `Tensor.to`; ids follow the device and keep their type."""
        floats = {k: getattr(self, k).to(*args, **kw) for k in ("means", "quats", "scales", "opacities", "colors")}
        return Gaussians(**floats, ids=self.ids.to(floats["means"].device))

    def arrays(self) -> dict[str, np.ndarray]:
        """All but the ids, as arrays."""
        names = ("means", "quats", "scales", "opacities", "colors")
        return {k: getattr(self, k).detach().cpu().numpy() for k in names}

    def covariance(self) -> Tensor:
        """(N,3,3) R S S^T R^T, square metres."""
        half = matrix_from_quat(self.quats / self.quats.norm(dim=-1, keepdim=True)) * self.scales[:, None]
        return half @ half.transpose(1, 2)

    def similar(self, rotation: Tensor, translation: Tensor, scale: Tensor | float = 1.0) -> Gaussians:
        """Under x -> scale rotation x + translation: rotation (3,3), translation (3,), scale a number or (). Exact."""
        quat = quat_from_matrix(rotation)[None]
        return self.with_values(
            means=scale * self.means @ rotation.T + translation,
            quats=quat_multiply(quat, self.quats),
            scales=scale * self.scales,
            colors=rotate_sh(self.colors, rotation),
        )

    def transformed(self, linear: Tensor, translation: Tensor) -> Gaussians:
        """Under x -> linear x + translation, linear (3,3) or (N,3,3): the blended matrices of linear blend skinning.

        means' = M means + t and covariance' = M covariance M^T, with all of M, not only its rotation. The new scales
        are in descending order, so a disk's normal stays third. Colours of degree > 0 turn with the nearest rotation.
        Gradients reach everything; where two new scales are equal the turn between their axes, which does nothing, is
        given none. Raises ValueError on other shapes.
        """
        if linear.shape not in ((3, 3), (len(self), 3, 3)):
            raise ValueError(f"linear is {tuple(linear.shape)}, not (3,3) or ({len(self)},3,3)")
        M = linear.expand(len(self), 3, 3)
        cov = M @ self.covariance() @ M.transpose(1, 2)
        quats, scales = axes_of(cov)
        colors = self.colors
        if colors.ndim == 3 and colors.shape[1] > 1:
            colors = rotate_sh(colors, nearest_rotation(linear))
        means = (M @ self.means[..., None])[..., 0] + translation
        return self.with_values(means=means, quats=quats, scales=scales, colors=colors)

    def mirrored(self) -> Gaussians:
        """Seen in a mirror across the plane x = 0, as the other hand is. New tensors; these stay as they are."""
        flip = self.means.new_tensor([-1.0, 1.0, 1.0])
        colors = self.colors
        if colors.ndim == 3:
            sign = torch.ones(colors.shape[1], 1, dtype=colors.dtype, device=colors.device)
            sign[[i for i in _ODD_IN_X if i < len(sign)]] = -1
            colors = colors * sign
        quats = self.quats * self.quats.new_tensor([1.0, 1.0, -1.0, -1.0])
        return self.with_values(means=self.means * flip, quats=quats, colors=colors)


def axes_of(cov: Tensor) -> tuple[Tensor, Tensor]:
    """Quaternions (N,4) wxyz and scales (N,3), descending, whose covariance is `cov` (N,3,3), symmetric.

    The eigenvectors are constants; the gradient goes through the first-order change of both around them, which is exact
    and, unlike that of `eigh`, finite where eigenvalues meet.
    """
    with torch.no_grad():
        axes = _eigenvectors(cov.double()).to(cov)
    local = axes.transpose(1, 2) @ cov @ axes  # diagonal, but for the change that autograd sees
    variance = local.diagonal(dim1=1, dim2=2)
    scales = variance.clamp(min=torch.finfo(cov.dtype).tiny).sqrt()
    if not cov.requires_grad:
        return quat_from_matrix(axes), scales
    turn = []
    for i, j in ((2, 1), (0, 2), (1, 0)):  # R(w) = axes (1 + [w]x) turns axis j towards axis i by w_k
        gap = (variance[:, j] - variance[:, i]).detach()
        damp = (1e-5 * variance.detach().amax(1)).square() + torch.finfo(cov.dtype).tiny
        turn.append(local[:, i, j] * gap / (gap.square() + damp))
    turn = torch.stack(turn, -1)
    quats = quat_from_matrix(axes @ so3_exp(turn - turn.detach()))
    return quats, scales


def _eigenvectors(m: Tensor, sweeps: int = 4) -> Tensor:
    """(N,3,3) right-handed columns, by descending eigenvalue, of symmetric (N,3,3): the cyclic Jacobi method (Golub and
    Van Loan, "Matrix Computations", 8.5), over all matrices at once, which LAPACK's `eigh` takes one by one.
    """
    a = {(i, j): m[:, i, j] for i in range(3) for j in range(i, 3)}
    v = list(torch.eye(3, dtype=m.dtype, device=m.device)[:, :, None].expand(3, 3, len(m)))
    for _ in range(sweeps):
        for p, q, r in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
            pr, qr = (min(p, r), max(p, r)), (min(q, r), max(q, r))
            off, gap = a[p, q], a[q, q] - a[p, p]
            below = gap.abs() + torch.hypot(gap, 2 * off)
            t = torch.where(below > 0, 2 * off / below, 0.0) * torch.where(gap < 0, -1.0, 1.0)
            c = torch.rsqrt(1 + t * t)
            s = t * c
            a[p, p], a[q, q], a[p, q] = a[p, p] - t * off, a[q, q] + t * off, torch.zeros_like(off)
            a[pr], a[qr] = c * a[pr] - s * a[qr], s * a[pr] + c * a[qr]
            v[p], v[q] = c * v[p] - s * v[q], s * v[p] + c * v[q]
    order = torch.stack([a[k, k] for k in range(3)], 1).argsort(1, descending=True)
    first, second = torch.stack(v, -1).permute(1, 0, 2).gather(2, order[:, None, :2].expand(-1, 3, -1)).unbind(-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


@functools.cache
def _directions() -> Tensor:
    """(48,3) spread evenly over the sphere: a Fibonacci spiral."""
    i = torch.arange(48, dtype=torch.float64) + 0.5
    z, phi = 1 - 2 * i / 48, i * math.pi * (1 + math.sqrt(5))
    r = (1 - z * z).sqrt()
    return torch.stack([r * phi.cos(), r * phi.sin(), z], -1)


def rotate_sh(colors: Tensor, rotation: Tensor) -> Tensor:
    """Coefficients (N,K,3) of the colours turned by rotation (3,3) or (N,3,3): seen along R d they are the old along d.

    Colours (N,3) and degree 0 stay as they are. Each degree's space is closed under rotation, so the coefficients that
    match the turned function in 48 directions are exact.
    """
    if colors.ndim == 2 or colors.shape[1] == 1:
        return colors
    degree = math.isqrt(colors.shape[1]) - 1
    if (degree + 1) ** 2 != colors.shape[1] or degree > 3:
        raise ValueError(f"colors is {tuple(colors.shape)}; its second size must be 1, 4, 9 or 16")
    d = _directions().to(rotation)
    back = torch.linalg.pinv(sh_basis(degree, d))
    return back @ sh_basis(degree, d @ rotation) @ colors


def concatenate(parts: list[Gaussians]) -> Gaussians:
    """One set out of several, in order; all must be in the same frame."""
    names = ("means", "quats", "scales", "opacities", "colors", "ids")
    return Gaussians(**{k: torch.cat([getattr(p, k) for p in parts]) for k in names})
