"""Torch twins of the grid ops: the specification of `csrc/{grid,render}_isa.h`, and the path without a compiler.

Plain functions, any dtype and device, differentiable where the op is. `data` is (R,R,R,4): signed distance and three
raw colour channels; voxel (i,j,k) lies at lo + h (i,j,k).
"""

from __future__ import annotations

import torch
from torch import Tensor

NEUS_EPS = 1e-6
MAX_STEPS = 256
MISS = 1e9


def sample(data: Tensor, lo: Tensor, h: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Trilinear value (N,4) and gradient of channel 0 (N,3) at x (N,3). Outside, x is clamped to the grid."""
    R = data.shape[0]
    p = ((x - lo) / h).clamp(0, R - 1.0001)
    i = p.detach().floor().long().clamp(max=R - 2)
    u, v, w = (p - i).unbind(-1)
    corner = {}
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                corner[a, b, c] = data[i[:, 0] + a, i[:, 1] + b, i[:, 2] + c]
    u, v, w = u[:, None], v[:, None], w[:, None]
    along_z = {(a, b): corner[a, b, 0] * (1 - w) + corner[a, b, 1] * w for a in (0, 1) for b in (0, 1)}
    low, high = (along_z[a, 0] * (1 - v) + along_z[a, 1] * v for a in (0, 1))
    gx = (high - low)[:, :1]
    gy = ((along_z[0, 1] - along_z[0, 0]) * (1 - u) + (along_z[1, 1] - along_z[1, 0]) * u)[:, :1]
    step = {(a, b): corner[a, b, 1] - corner[a, b, 0] for a in (0, 1) for b in (0, 1)}
    gz = (step[0, 0] * (1 - u) * (1 - v) + step[0, 1] * (1 - u) * v + step[1, 0] * u * (1 - v) + step[1, 1] * u * v)[
        :, :1
    ]
    return low * (1 - u) + high * u, torch.cat([gx, gy, gz], -1) / h


@torch.no_grad()
def march(data: Tensor, lo: Tensor, h: float, o: Tensor, d: Tensor, min_step: float, band: float):
    """See `SdfGrid.march`."""
    R = data.shape[0]
    safe = torch.where(d.abs() > 1e-12, d, torch.full_like(d, 1e-12))
    p, q = (lo - o) / safe, (lo + (R - 1) * h - o) / safe
    a = torch.minimum(p, q).amax(-1).clamp(min=0)
    b = torch.maximum(p, q).amin(-1).clamp(max=MISS)
    best, best_t = torch.full_like(a, MISS), 0.5 * (a + b)
    tin, tout, s = torch.full_like(a, -1), torch.full_like(a, -1), a.clone()
    inside = torch.zeros_like(a, dtype=torch.bool)
    left = torch.nonzero(s < b)[:, 0]
    sdf = data[..., :1]
    for _ in range(MAX_STEPS):
        if len(left) == 0:
            break
        t = s[left]
        f = sample(sdf, lo, h, o[left] + t[:, None] * d[left])[0][:, 0]
        closer = f < best[left]
        best[left] = torch.where(closer, f, best[left])
        best_t[left] = torch.where(closer, t, best_t[left])
        jump = ((f - band) * 0.9).clamp(min=min_step)
        entering = ~inside[left] & (f < band)
        tin[left] = torch.where(entering, torch.maximum(a[left], t - 0.5 * min_step), tin[left])
        now_in = inside[left] | entering
        tout[left] = torch.where(now_in, t, tout[left])
        grazed = now_in & (f > band) & (best[left] > 0.6 * band)
        stop = now_in & ((f < -band) | ((f > band) & ~grazed))
        inside[left] = now_in & ~grazed
        s[left] = t + torch.where(now_in & ~grazed, torch.full_like(t, min_step), jump)
        left = left[~stop & (s[left] < b[left])]
    miss = tin < 0
    tin = torch.where(miss, best_t - min_step, tin)
    tout = torch.where(miss, best_t + min_step, tout)
    return tin, tout + 0.5 * min_step, best


def regularizers(data: Tensor, h: float, band: float) -> tuple[Tensor, Tensor]:
    """Means over inner voxels with |sdf| <= band of (|grad| - 1)^2 and of (h Laplacian)^2, central differences."""
    f = data[..., 0]
    c = f[1:-1, 1:-1, 1:-1]
    xp, xm = f[2:, 1:-1, 1:-1], f[:-2, 1:-1, 1:-1]
    yp, ym = f[1:-1, 2:, 1:-1], f[1:-1, :-2, 1:-1]
    zp, zm = f[1:-1, 1:-1, 2:], f[1:-1, 1:-1, :-2]
    mask = (c.abs() <= band).to(f.dtype)
    square = ((xp - xm) ** 2 + (yp - ym) ** 2 + (zp - zm) ** 2) / (4 * h * h)
    norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)  # sqrt has no gradient at 0
    lap = (xp + xm + yp + ym + zp + zm - 6 * c) / h
    count = mask.sum().clamp(min=1)
    return (mask * (norm - 1) ** 2).sum() / count, (mask * lap**2).sum() / count


def blur(field: Tensor, iterations: int) -> Tensor:
    """[1 2 1]/4 along each axis of (R,R,R), `iterations` times; an axis leaves its two border layers alone."""
    f = field.clone()
    for _ in range(iterations):
        for axis in (2, 1, 0):
            n = f.shape[axis]
            mid = 0.25 * (f.narrow(axis, 0, n - 2) + 2 * f.narrow(axis, 1, n - 2) + f.narrow(axis, 2, n - 2))
            f = torch.cat([f.narrow(axis, 0, 1), mid, f.narrow(axis, n - 1, 1)], axis)
    return f


def adam(data, grad, m, v, lr_sdf: float, lr_color: float, b1: float, b2: float, step: int, rel_eps: float) -> None:
    """In place on (V,4) views; see `SdfGrid.adam`."""
    c1, c2 = 1 / (1 - b1**step), 1 / (1 - b2**step)
    seen = v[::7, 0]
    seen = seen[seen > 0]
    eps = torch.full((4,), 1e-12, dtype=data.dtype, device=data.device)
    eps[0] = 1e-20 + (rel_eps * (seen.double().mean() * c2).sqrt().to(data.dtype) if len(seen) else 0.0)
    lr = torch.tensor([lr_sdf, lr_color, lr_color, lr_color], dtype=data.dtype, device=data.device)
    touched = (grad != 0).any(-1)
    g = grad[touched]
    m[touched] = m[touched] * b1 + g * (1 - b1)
    v[touched] = v[touched] * b2 + g * g * (1 - b2)
    data[touched] -= lr * (m[touched] * c1) / ((v[touched] * c2).sqrt() + eps)
    grad.zero_()


def render(data: Tensor, lo: Tensor, h: float, o: Tensor, d: Tensor, t: Tensor, beta: Tensor | float):
    """See `SdfGrid.render`: rgb (N,3), acc (N,), depth (N,)."""
    n, S = t.shape
    val = sample(data, lo, h, (o[:, None] + t[..., None] * d[:, None]).reshape(-1, 3))[0].reshape(n, S, 4)
    s = torch.sigmoid(val[..., 0] / beta)
    alpha = ((s[:, :-1] - s[:, 1:] + NEUS_EPS) / (s[:, :-1] + NEUS_EPS)).clamp(0, 1)
    T = torch.cumprod(torch.cat([torch.ones_like(alpha[:, :1]), 1 - alpha[:, :-1]], 1), 1)
    w = alpha * T
    color = torch.sigmoid(0.5 * (val[:, :-1, 1:] + val[:, 1:, 1:]))
    mid = 0.5 * (t[:, :-1] + t[:, 1:]).detach()
    return (w[..., None] * color).sum(1), w.sum(1), (w * mid).sum(1)
