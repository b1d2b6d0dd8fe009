"""Rotations and rigid motions: SO(3), SE(3), similarities. Pure functions on torch tensors, batched over leading axes.

Every function is differentiable, also at the identity (Taylor branches) and close to half turns (through quaternions).
Quaternions are wxyz with w >= 0; rotation vectors are axis times angle in radians. References: Sola et al., "A micro
Lie theory" (2018), section 4 and appendices; Zhou et al., "On the continuity of rotation representations" (CVPR 2019)
for the 6D form; Umeyama, PAMI 1991, for similarities.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hat(w: Tensor) -> Tensor:
    """(*B,3) vector -> (*B,3,3) cross-product matrix, hat(w) @ x = w x x."""
    x, y, z = w.unbind(-1)
    o = torch.zeros_like(x)
    return torch.stack([o, -z, y, z, o, -x, -y, x, o], -1).reshape(*w.shape[:-1], 3, 3)


def _small(t2: Tensor) -> tuple[Tensor, Tensor]:
    """Where the squared angle is too small for the closed forms, and a squared angle that is safe to divide by."""
    small = t2 < (1e-2 if t2.dtype == torch.float32 else 1e-4)
    return small, torch.where(small, torch.ones_like(t2), t2)


def so3_exp(w: Tensor) -> Tensor:
    """Rotation vector (*B,3) -> rotation (*B,3,3) (Rodrigues); smooth at zero."""
    t2 = (w * w).sum(-1)[..., None, None]
    small, safe = _small(t2)
    t = safe.sqrt()
    a = torch.where(small, 1 - t2 / 6 * (1 - t2 / 20 * (1 - t2 / 42)), t.sin() / t)
    b = torch.where(small, 0.5 * (1 - t2 / 12 * (1 - t2 / 30 * (1 - t2 / 56))), (1 - t.cos()) / safe)
    k = hat(w)
    return torch.eye(3, dtype=w.dtype, device=w.device) + a * k + b * (k @ k)


def so3_log(rot: Tensor) -> Tensor:
    """Rotation (*B,3,3) -> rotation vector (*B,3), angle in [0, pi]."""
    q = quat_from_matrix(rot)
    w, v = q[..., :1], q[..., 1:]
    n2 = (v * v).sum(-1, keepdim=True)
    small, safe = _small(n2)
    n = safe.sqrt()
    w_safe = torch.where(small, w, torch.ones_like(w))
    r2 = n2 / (w_safe * w_safe)  # tan^2 of the half angle
    taylor = 2 / w_safe * (1 - r2 / 3 * (1 - 3 * r2 / 5 * (1 - 5 * r2 / 7)))
    return v * torch.where(small, taylor, 2 * torch.atan2(n, w) / n)


def right_jacobian(w: Tensor) -> Tensor:
    """(*B,3) -> (*B,3,3) J with exp(w + dw) = exp(w) exp(J dw) to first order."""
    t2 = (w * w).sum(-1)[..., None, None]
    small, safe = _small(t2)
    t = safe.sqrt()
    b = torch.where(small, 0.5 * (1 - t2 / 12 * (1 - t2 / 30)), (1 - t.cos()) / safe)
    c = torch.where(small, (1 - t2 / 20 * (1 - t2 / 42)) / 6, (t - t.sin()) / (safe * t))
    k = hat(w)
    return torch.eye(3, dtype=w.dtype, device=w.device) - b * k + c * (k @ k)


def quat_from_matrix(rot: Tensor) -> Tensor:
    """Rotation (*B,3,3) -> unit quaternion (*B,4) wxyz, w >= 0; picks the best-conditioned of the four forms."""
    m = rot
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    four_sq = torch.stack([1 + m00 + m11 + m22, 1 + m00 - m11 - m22, 1 - m00 + m11 - m22, 1 - m00 - m11 + m22], -1)
    best = four_sq.argmax(-1, keepdim=True)
    d = torch.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], -1)
    s01, s02, s12 = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    rows = torch.stack(
        [
            torch.stack([four_sq[..., 0], d[..., 0], d[..., 1], d[..., 2]], -1),
            torch.stack([d[..., 0], four_sq[..., 1], s01, s02], -1),
            torch.stack([d[..., 1], s01, four_sq[..., 2], s12], -1),
            torch.stack([d[..., 2], s02, s12, four_sq[..., 3]], -1),
        ],
        -2,
    )
    q = rows.gather(-2, best[..., None].expand(*best.shape, 4)).squeeze(-2)
    q = q / q.norm(dim=-1, keepdim=True)
    return torch.where(q[..., :1] < 0, -q, q)


def matrix_from_quat(q: Tensor) -> Tensor:
    """Quaternion (*B,4) wxyz of any length -> rotation (*B,3,3)."""
    w, x, y, z = (q / q.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, -1).reshape(*q.shape[:-1], 3, 3)


def quat_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Hamilton product of wxyz quaternions (*B,4)."""
    aw, av, bw, bv = a[..., :1], a[..., 1:], b[..., :1], b[..., 1:]
    av, bv = torch.broadcast_tensors(av, bv)
    return torch.cat([aw * bw - (av * bv).sum(-1, keepdim=True), aw * bv + bw * av + torch.linalg.cross(av, bv)], -1)


def matrix_from_6d(x: Tensor) -> Tensor:
    """6D form (*B,6), the first two *columns* one after the other -> rotation (*B,3,3) by Gram-Schmidt."""
    a, b = x[..., :3], x[..., 3:]
    e1 = torch.nn.functional.normalize(a, dim=-1)
    e2 = torch.nn.functional.normalize(b - (e1 * b).sum(-1, keepdim=True) * e1, dim=-1)
    return torch.stack([e1, e2, torch.linalg.cross(e1, e2)], -1)


def sixd_from_matrix(rot: Tensor) -> Tensor:
    """Rotation (*B,3,3) -> 6D form (*B,6)."""
    return torch.cat([rot[..., 0], rot[..., 1]], -1)


def nearest_rotation(m: Tensor) -> Tensor:
    """The rotation closest to any (*B,3,3) matrix in the Frobenius norm (Kabsch)."""
    u, _, vt = torch.linalg.svd(m)
    sign = torch.ones_like(m[..., 0])
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    return (u * sign[..., None, :]) @ vt


def geodesic(a: Tensor, b: Tensor) -> Tensor:
    """Angle in radians between rotations (*B,3,3); accurate near 0 and near pi."""
    q = quat_from_matrix(a.mT @ b)
    return 2 * torch.atan2(q[..., 1:].norm(dim=-1), q[..., 0])


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """Point at share t in [0,1] of the shortest path from rotation a to rotation b, (*B,3,3); t (*B) or a number."""
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    return a @ so3_exp(t[..., None] * so3_log(a.mT @ b))


def mean_rotation(rot: Tensor, weights: Tensor | None = None, iterations: int = 10) -> Tensor:
    """Weighted geodesic (Karcher) mean of rotations (N,3,3) -> (3,3); weights (N,)."""
    w = torch.ones_like(rot[:, 0, 0]) if weights is None else weights
    w = (w / w.sum())[:, None]
    mean = nearest_rotation((w[..., None] * rot).sum(0))
    for _ in range(iterations):
        mean = mean @ so3_exp((w * so3_log(mean.mT @ rot)).sum(0))
    return mean


def rigid(rot: Tensor, t: Tensor) -> Tensor:
    """Rotation (*B,3,3) and translation (*B,3) -> transform (*B,4,4)."""
    batch = torch.broadcast_shapes(rot.shape[:-2], t.shape[:-1])
    top = torch.cat([rot.expand(*batch, 3, 3), t.expand(*batch, 3)[..., None]], -1)
    bottom = torch.cat([top.new_zeros(3), top.new_ones(1)]).expand(*batch, 1, 4)
    return torch.cat([top, bottom], -2)


def compose(*transforms: Tensor) -> Tensor:
    """a_from_b, b_from_c, ... -> a_from_c, each (*B,4,4)."""
    out = transforms[0]
    for m in transforms[1:]:
        out = out @ m
    return out


def invert(t: Tensor) -> Tensor:
    """Inverse of rigid transforms (*B,4,4) (not of similarities)."""
    r = t[..., :3, :3].mT
    return rigid(r, -(r @ t[..., :3, 3:])[..., 0])


def apply(t: Tensor, x: Tensor) -> Tensor:
    """Transform (*B,4,4) applied to points (*B,N,3)."""
    return x @ t[..., :3, :3].mT + t[..., None, :3, 3]


def se3_exp(xi: Tensor) -> Tensor:
    """Twist (*B,6) = (rho, w) -> transform (*B,4,4)."""
    w = xi[..., 3:]
    left = right_jacobian(-w)
    return rigid(so3_exp(w), (left @ xi[..., :3, None])[..., 0])


def se3_log(t: Tensor) -> Tensor:
    """Transform (*B,4,4) -> twist (*B,6) = (rho, w), inverse of `se3_exp`."""
    w = so3_log(t[..., :3, :3])
    rho = torch.linalg.solve(right_jacobian(-w), t[..., :3, 3:])[..., 0]
    return torch.cat([rho, w], -1)


def umeyama(a: Tensor, b: Tensor, weights: Tensor | None = None, scale: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity s (*B), R (*B,3,3), t (*B,3) that minimises sum_i w_i |s R a_i + t - b_i|^2; a, b (*B,N,3), w
    (*B,N)."""
    a, b = torch.broadcast_tensors(a, b)
    w = torch.ones_like(a[..., 0]) if weights is None else weights.expand(a.shape[:-1])
    w = (w / w.sum(-1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny))[..., None]
    ma, mb = (w * a).sum(-2), (w * b).sum(-2)
    x, y = a - ma[..., None, :], b - mb[..., None, :]
    u, d, vt = torch.linalg.svd((w * y).mT @ x)
    sign = torch.ones_like(d)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    rot = (u * sign[..., None, :]) @ vt
    s = torch.ones_like(d[..., 0])
    if scale:
        s = (d * sign).sum(-1) / (w * x * x).sum((-1, -2)).clamp_min(torch.finfo(a.dtype).tiny)
    return s, rot, mb - s[..., None] * (rot @ ma[..., None])[..., 0]
