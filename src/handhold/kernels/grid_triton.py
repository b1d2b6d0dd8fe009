"""The dense signed-distance + colour grid on CUDA in Triton: the specification is `grid_torch`.

Functions of `grid_torch`'s names and arguments, without autograd: `sample` and `render` with their analytic backward
passes, `march` and `adam`. Gradients to the grid are added by atomics, since thousands of samples share a voxel and
sorting them would cost more than the rest: the last bits of the grid's gradient differ from run to run. All else is
deterministic. No host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import on

NEUS_EPS = tl.constexpr(1e-6)
MISS = tl.constexpr(1e9)
MAX_STEPS = tl.constexpr(256)
POINTS = 128  # per program


@triton.jit
def _along(x, n, axis: tl.constexpr, lo, h, valid, R):
    """Cell, place in the cell in [0,1], and whether x was not clamped; along one axis."""
    p = (tl.load(x + 3 * n + axis, valid, 0.0) - tl.load(lo + axis)) / h
    return _cell(p, R)


@triton.jit
def _cell(p, R):
    hi = R - 1.0001
    q = tl.minimum(tl.maximum(p, 0.0), hi)
    i = tl.minimum(q.to(tl.int32), R - 2)
    return i.to(tl.int64), q - i.to(tl.float32), (p >= 0) & (p <= hi)


@triton.jit
def _side(u, a: tl.constexpr):
    return u if a == 1 else 1.0 - u


@triton.jit(do_not_specialize=["count"])
def sample_forward(data, lo, x, val, grad, count, R, h, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = n < count
    i, u, _ = _along(x, n, 0, lo, h, valid, R)
    j, v, _ = _along(x, n, 1, lo, h, valid, R)
    k, w, _ = _along(x, n, 2, lo, h, valid, R)
    channel = tl.arange(0, 4)
    total = tl.zeros((BLOCK, 4), tl.float32)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy, gz = gx, gx
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            for c in tl.static_range(2):
                at = data + (((i + a) * R + j + b) * R + k + c) * 4
                wa, wb, wc = _side(u, a), _side(v, b), _side(w, c)
                total += (wa * wb * wc)[:, None] * tl.load(at[:, None] + channel[None, :], valid[:, None], 0.0)
                f = tl.load(at, valid, 0.0)
                gx += (2 * a - 1) * wb * wc * f
                gy += wa * (2 * b - 1) * wc * f
                gz += wa * wb * (2 * c - 1) * f
    tl.store(val + n[:, None] * 4 + channel[None, :], total, valid[:, None])
    tl.store(grad + 3 * n, gx / h, valid)
    tl.store(grad + 3 * n + 1, gy / h, valid)
    tl.store(grad + 3 * n + 2, gz / h, valid)


@triton.jit(do_not_specialize=["count"])
def sample_backward_kernel(
    data, lo, x, v_val, v_grad, v_data, v_x, count, R, h,
    HAS_GRAD: tl.constexpr, WANTS_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value and gradient are linear in the grid: a corner gets its weight times v_val plus its slope times v_grad."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = n < count
    i, u, u_free = _along(x, n, 0, lo, h, valid, R)
    j, v, v_free = _along(x, n, 1, lo, h, valid, R)
    k, w, w_free = _along(x, n, 2, lo, h, valid, R)
    channel = tl.arange(0, 4)
    vv = tl.load(v_val + n[:, None] * 4 + channel[None, :], valid[:, None], 0.0)
    gx = tl.zeros((BLOCK,), tl.float32)
    gy, gz, du, dv, dw = gx, gx, gx, gx, gx
    if HAS_GRAD:
        gx = tl.load(v_grad + 3 * n, valid, 0.0) / h
        gy = tl.load(v_grad + 3 * n + 1, valid, 0.0) / h
        gz = tl.load(v_grad + 3 * n + 2, valid, 0.0) / h
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            for c in tl.static_range(2):
                at = (((i + a) * R + j + b) * R + k + c) * 4
                wa, wb, wc = _side(u, a), _side(v, b), _side(w, c)
                slope = (2 * a - 1) * wb * wc * gx + wa * (2 * b - 1) * wc * gy + wa * wb * (2 * c - 1) * gz
                add = (wa * wb * wc)[:, None] * vv + tl.where(channel[None, :] == 0, slope[:, None], 0.0)
                tl.atomic_add(v_data + at[:, None] + channel[None, :], add, valid[:, None] & (add != 0), sem="relaxed")
                if WANTS_X:
                    row = tl.load(data + at[:, None] + channel[None, :], valid[:, None], 0.0)
                    e = tl.sum(vv * row, 1)
                    f = tl.load(data + at, valid, 0.0)
                    sa, sb, sc = 2 * a - 1, 2 * b - 1, 2 * c - 1
                    du += sa * wb * wc * e + sa * f * (sb * wc * gy + wb * sc * gz)
                    dv += wa * sb * wc * e + sb * f * (sa * wc * gx + wa * sc * gz)
                    dw += wa * wb * sc * e + sc * f * (sa * wb * gx + wa * sb * gy)
    if WANTS_X:
        tl.store(v_x + 3 * n, tl.where(u_free, du / h, 0.0), valid)
        tl.store(v_x + 3 * n + 1, tl.where(v_free, dv / h, 0.0), valid)
        tl.store(v_x + 3 * n + 2, tl.where(w_free, dw / h, 0.0), valid)


@triton.jit
def _sdf(data, R, i, u, j, v, k, w, active):
    f = u * 0.0
    for a in tl.static_range(2):
        for b in tl.static_range(2):
            at = data + (((i + a) * R + j + b) * R + k) * 4
            f0, f1 = tl.load(at, active, 0.0), tl.load(at + 4, active, 0.0)
            f += _side(u, a) * _side(v, b) * (f0 + w * (f1 - f0))
    return f


@triton.jit(do_not_specialize=["count"])
def march_kernel(data, lo, o, d, t0, t1, phi, count, R, h, min_step, band, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = n < count
    near, far = tl.zeros((BLOCK,), tl.float32), tl.full((BLOCK,), MISS, tl.float32)
    for axis in tl.static_range(3):
        from_lo = tl.load(lo + axis) - tl.load(o + 3 * n + axis, valid, 0.0)
        dk = tl.load(d + 3 * n + axis, valid, 1.0)
        dk = tl.where(tl.abs(dk) > 1e-12, dk, 1e-12)
        p, q = from_lo / dk, (from_lo + (R - 1) * h) / dk
        near, far = tl.maximum(near, tl.minimum(p, q)), tl.minimum(far, tl.maximum(p, q))
    lo0, lo1, lo2 = tl.load(lo), tl.load(lo + 1), tl.load(lo + 2)
    o0, o1, o2 = _point(o, n, valid)
    d0, d1, d2 = _point(d, n, valid)
    best, best_t = tl.full((BLOCK,), MISS, tl.float32), 0.5 * (near + far)
    t_in, t_out, s = near * 0.0 - 1.0, near * 0.0 - 1.0, near
    inside, active = valid & (near < -1.0), valid & (near < far)
    step = 0
    while (step < MAX_STEPS) & (tl.max(active.to(tl.int32)) > 0):
        i, u, _ = _cell((o0 + s * d0 - lo0) / h, R)
        j, v, _ = _cell((o1 + s * d1 - lo1) / h, R)
        k, w, _ = _cell((o2 + s * d2 - lo2) / h, R)
        f = _sdf(data, R, i, u, j, v, k, w, active)
        closer = active & (f < best)
        best, best_t = tl.where(closer, f, best), tl.where(closer, s, best_t)
        entering = active & ~inside & (f < band)
        t_in = tl.where(entering, tl.maximum(near, s - 0.5 * min_step), t_in)
        now_in = active & (inside | entering)
        t_out = tl.where(now_in, s, t_out)
        grazed = now_in & (f > band) & (best > 0.6 * band)
        stop = now_in & ((f < -band) | ((f > band) & ~grazed))
        inside = now_in & ~grazed
        s += tl.where(inside, min_step, tl.maximum((f - band) * 0.9, min_step))
        active = active & ~stop & (s < far)
        step += 1
    miss = t_in < 0
    tl.store(t0 + n, tl.where(miss, best_t - min_step, t_in), valid)
    tl.store(t1 + n, tl.where(miss, best_t + min_step, t_out) + 0.5 * min_step, valid)
    tl.store(phi + n, best, valid)


@triton.jit
def _point(x, n, valid):
    return tl.load(x + 3 * n, valid, 0.0), tl.load(x + 3 * n + 1, valid, 0.0), tl.load(x + 3 * n + 2, valid, 0.0)


@triton.jit
def _alpha(s0, s1):
    """NeuS (NeurIPS 2021, eq. 13) between two samples' logistic values."""
    return tl.minimum(tl.maximum((s0 - s1 + NEUS_EPS) / (s0 + NEUS_EPS), 0.0), 1.0)


@triton.jit
def _weights(val, beta, at, interval, later):
    """Per interval: distances at both ends, their logistic values, alpha, transmittance. `later`: not the first."""
    f0, f1 = tl.load(val + at * 4, interval, 0.0), tl.load(val + at * 4 + 4, interval, 0.0)
    before = tl.load(val + at * 4 - 4, interval & later, 0.0)
    s0, s1, s = tl.sigmoid(f0 / beta), tl.sigmoid(f1 / beta), tl.sigmoid(before / beta)
    alpha = tl.where(interval, _alpha(s0, s1), 0.0)
    T = tl.cumprod(tl.where(interval & later, 1.0 - _alpha(s, s0), 1.0), 1)
    return f0, f1, s0, s1, alpha, T


@triton.jit
def _color(val, at, interval, c: tl.constexpr):
    both = tl.load(val + at * 4 + 1 + c, interval, 0.0) + tl.load(val + at * 4 + 5 + c, interval, 0.0)
    return tl.sigmoid(0.5 * both)


@triton.jit
def _middle(t, at, interval):
    return 0.5 * (tl.load(t + at, interval, 0.0) + tl.load(t + at + 1, interval, 0.0))


@triton.jit(do_not_specialize=["count"])
def composite_forward(val, t, beta, rgb, acc, depth, count, S, RAYS: tl.constexpr, SP: tl.constexpr):
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    i = tl.arange(0, SP)[None, :]
    interval = (ray < count)[:, None] & (i < S - 1)
    at = ray[:, None] * S + i
    f0, f1, s0, s1, alpha, T = _weights(val, tl.load(beta), at, interval, i > 0)
    w = alpha * T
    for c in tl.static_range(3):
        tl.store(rgb + 3 * ray + c, tl.sum(w * _color(val, at, interval, c), 1), ray < count)
    tl.store(acc + ray, tl.sum(w, 1), ray < count)
    tl.store(depth + ray, tl.sum(w * _middle(t, at, interval), 1), ray < count)


@triton.jit(do_not_specialize=["count"])
def composite_backward(
    val, t, beta, v_rgb, v_acc, v_depth, left, right, v_beta, count, S, RAYS: tl.constexpr, SP: tl.constexpr
):
    """Gradients (count,S,4) to the samples as the left and as the right end of an interval, and to beta per ray."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    i = tl.arange(0, SP)[None, :]
    live = ray < count
    interval, sample = live[:, None] & (i < S - 1), live[:, None] & (i < S)
    at = ray[:, None] * S + i
    b = tl.load(beta)
    f0, f1, s0, s1, alpha, T = _weights(val, b, at, interval, i > 0)
    w = alpha * T
    g = tl.load(v_acc + ray, live, 0.0)[:, None] + tl.load(v_depth + ray, live, 0.0)[:, None] * _middle(t, at, interval)
    for c in tl.static_range(3):
        color, v_c = _color(val, at, interval, c), tl.load(v_rgb + 3 * ray + c, live, 0.0)[:, None]
        g += v_c * color
        q = tl.where(interval, 0.5 * w * v_c * color * (1.0 - color), 0.0)
        tl.store(left + at * 4 + 1 + c, q, sample)
        tl.store(right + at * 4 + 5 + c, q, interval)
        tl.store(right + at * 4 + 1 + c, 0.0, sample & (i == 0))
    wg = w * g
    behind = tl.cumsum(wg, 1, reverse=True) - wg
    v_alpha = T * g - behind / tl.maximum(1.0 - alpha, 1e-10)
    raw = (s0 - s1 + NEUS_EPS) / (s0 + NEUS_EPS)
    v_alpha = tl.where(interval & (raw >= 0) & (raw <= 1), v_alpha, 0.0)
    inv = 1.0 / (s0 + NEUS_EPS)
    l, r = v_alpha * s1 * inv * inv * s0 * (1.0 - s0) / b, -v_alpha * inv * s1 * (1.0 - s1) / b
    tl.store(left + at * 4, l, sample)
    tl.store(right + at * 4 + 4, r, interval)
    tl.store(right + at * 4, 0.0, sample & (i == 0))
    tl.store(v_beta + ray, tl.sum(-(l * f0 + r * f1), 1) / b, live)


@triton.jit(do_not_specialize=["count"])
def adam_kernel(data, grad, m, v, rms, count, lr_sdf, lr_color, b1, b2, c1, c2, rel_eps, BLOCK: tl.constexpr):
    """One lane per voxel; voxels without a gradient are left alone."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, 4)[None, :]
    at = n[:, None] * 4 + channel
    inside = (n < count)[:, None]
    g = tl.load(grad + at, inside, 0.0)
    touched = inside & (tl.max((g != 0).to(tl.int32), 1) > 0)[:, None]
    m_new = tl.load(m + at, touched, 0.0) * b1 + g * (1.0 - b1)
    v_new = tl.load(v + at, touched, 0.0) * b2 + g * g * (1.0 - b2)
    eps = tl.where(channel == 0, rel_eps * tl.load(rms) + 1e-20, 1e-12)
    step = tl.where(channel == 0, lr_sdf, lr_color) * (m_new * c1) / (tl.sqrt(v_new * c2) + eps)
    tl.store(data + at, tl.load(data + at, touched, 0.0) - step, touched)
    tl.store(m + at, m_new, touched)
    tl.store(v + at, v_new, touched)
    tl.store(grad + at, 0.0, touched)


def _float(t: Tensor) -> Tensor:
    return t.detach().to(torch.float32).contiguous()


def sample(data: Tensor, lo: Tensor, h: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid_torch.sample`: value (N,4) and gradient of the distance (N,3) at x (N,3). No autograd."""
    x, n = _float(x), len(x)
    val, grad = x.new_empty(n, 4), x.new_empty(n, 3)
    if n:
        with on(x):
            sample_forward[(triton.cdiv(n, POINTS),)](
                data, lo, x, val, grad, n, data.shape[0], h, BLOCK=POINTS, num_warps=4
            )
    return val, grad


def sample_backward(
    data: Tensor, lo: Tensor, h: float, x: Tensor, v_val: Tensor, v_grad: Tensor | None, v_data: Tensor, wants_x: bool
) -> Tensor | None:
    """Adds to v_data (R,R,R,4) and returns v_x (N,3), with the second-order terms of v_grad; None unless wants_x."""
    x, n = _float(x), len(x)
    v_x = torch.empty_like(x) if wants_x else None
    if n:
        with on(x):
            sample_backward_kernel[(triton.cdiv(n, POINTS),)](
                data, lo, x, v_val.contiguous(), None if v_grad is None else v_grad.contiguous(), v_data, v_x,
                n, data.shape[0], h, HAS_GRAD=v_grad is not None, WANTS_X=wants_x, BLOCK=POINTS, num_warps=4,
            )  # fmt: skip
    return v_x


def march(data: Tensor, lo: Tensor, h: float, o: Tensor, d: Tensor, min_step: float, band: float):
    """As `grid_torch.march`, in one launch: t0, t1, phi_min (N,)."""
    o, d, n = _float(o), _float(d), len(o)
    t0, t1, phi = o.new_empty(3, n).unbind(0)
    if n:
        with on(o):
            march_kernel[(triton.cdiv(n, 32),)](
                data, lo, o, d, t0, t1, phi, n, data.shape[0], h, min_step, band, BLOCK=32, num_warps=1
            )
    return t0, t1, phi


def _rays_per_program(S: int) -> tuple[int, int]:
    """Rays of a program and lanes of a ray."""
    lanes = max(2, 1 << (S - 1).bit_length())
    return max(1, 256 // lanes), lanes


def render(data: Tensor, lo: Tensor, h: float, o: Tensor, d: Tensor, t: Tensor, beta: Tensor):
    """As `grid_torch.render`: rgb (N,3), acc (N,), depth (N,), and the samples' values (N S,4) for the way back."""
    o, d, t, beta = _float(o), _float(d), _float(t), _float(beta)
    n, S = t.shape
    val, _ = sample(data, lo, h, (o[:, None] + t[..., None] * d[:, None]).reshape(-1, 3))
    rgb, acc, depth = o.new_empty(n, 3), o.new_empty(n), o.new_empty(n)
    rays, lanes = _rays_per_program(S)
    if n:
        with on(o):
            composite_forward[(triton.cdiv(n, rays),)](
                val, t, beta, rgb, acc, depth, n, S, RAYS=rays, SP=lanes, num_warps=4
            )
    return rgb, acc, depth, val


def render_backward(
    data: Tensor, lo: Tensor, h: float, o: Tensor, d: Tensor, t: Tensor, beta: Tensor, val: Tensor,
    v_rgb: Tensor, v_acc: Tensor, v_depth: Tensor, v_data: Tensor, wants_ray: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Adds to v_data; returns v_o, v_d (N,3) (None unless wants_ray) and v_beta (scalar)."""
    o, d, t, beta = _float(o), _float(d), _float(t), _float(beta)
    n, S = t.shape
    if n == 0:
        zero = torch.zeros_like(o) if wants_ray else None
        return zero, zero, torch.zeros_like(beta)
    left, right, v_beta = o.new_empty(n, S, 4), o.new_empty(n, S, 4), o.new_empty(n)
    rays, lanes = _rays_per_program(S)
    with on(o):
        composite_backward[(triton.cdiv(n, rays),)](
            val, t, beta, v_rgb.contiguous(), v_acc.contiguous(), v_depth.contiguous(), left, right, v_beta, n, S,
            RAYS=rays, SP=lanes, num_warps=4,
        )  # fmt: skip
    x = (o[:, None] + t[..., None] * d[:, None]).reshape(-1, 3)
    v_x = sample_backward(data, lo, h, x, (left + right).view(-1, 4), None, v_data, wants_ray)
    v_beta = v_beta.sum(dtype=torch.float64).to(torch.float32).reshape(beta.shape)
    if not wants_ray:
        return None, None, v_beta
    v_x = v_x.view(n, S, 3)
    return v_x.sum(1), (t[..., None] * v_x).sum(1), v_beta


def adam(data, grad, m, v, lr_sdf: float, lr_color: float, b1: float, b2: float, step: int, rel_eps: float) -> None:
    """As `grid_torch.adam`, in place on contiguous (V,4) tensors; no boolean indexing, so no synchronisation.

    `step` is a number of the host: a CUDA graph that holds this call repeats one and the same step.
    """
    seen, c2 = v[::7, 0], 1 / (1 - b2**step)
    mean = seen.sum(dtype=torch.float64) / (seen > 0).sum().clamp(min=1)  # second moments are never negative
    rms, count = (mean * c2).sqrt().to(torch.float32), len(data)
    with on(data):
        adam_kernel[(triton.cdiv(count, POINTS),)](
            data, grad, m, v, rms, count, lr_sdf, lr_color, b1, b2, 1 / (1 - b1**step), c2, rel_eps,
            BLOCK=POINTS, num_warps=4,
        )  # fmt: skip
