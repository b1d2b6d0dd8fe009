"""Triton: how a Gaussian looks from the camera (spherical harmonics, features, body), and the way back.

Shared by 3D and 2D Gaussians; one lane per Gaussian.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _direction(V, m):
    """Unit vector from the camera centre -R^T t to the mean, and 1 / its length."""
    d0 = m[0] + V[0] * V[3] + V[4] * V[7] + V[8] * V[11]
    d1 = m[1] + V[1] * V[3] + V[5] * V[7] + V[9] * V[11]
    d2 = m[2] + V[2] * V[3] + V[6] * V[7] + V[10] * V[11]
    inv = 1.0 / tl.maximum(tl.sqrt(d0 * d0 + d1 * d1 + d2 * d2), 1e-12)
    return (d0 * inv, d1 * inv, d2 * inv), inv


@triton.jit
def _sh_basis(d, DEGREE: tl.constexpr):
    """(DEGREE + 1)^2 real spherical harmonics of a unit direction, in the 3DGS order and signs."""
    x, y, z = d[0], d[1], d[2]
    B = (x * 0.0 + 0.28209479177387814,)
    if DEGREE > 0:
        B = B + (-0.4886025119029199 * y, 0.4886025119029199 * z, -0.4886025119029199 * x)
    if DEGREE > 1:
        xx, yy, zz = x * x, y * y, z * z
        B = B + (
            1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2 * zz - xx - yy),
            -1.0925484305920792 * x * z, 0.5462742152960396 * (xx - yy),
        )  # fmt: skip
        if DEGREE > 2:
            B = B + (
                -0.5900435899266435 * y * (3 * xx - yy), 2.890611442640554 * x * y * z,
                -0.4570457994644658 * y * (4 * zz - xx - yy), 0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
                -0.4570457994644658 * x * (4 * zz - xx - yy), 1.445305721320277 * z * (xx - yy),
                -0.5900435899266435 * x * (xx - 3 * yy),
            )  # fmt: skip
    return B


@triton.jit
def _sh_gradient(d, w, DEGREE: tl.constexpr):
    """Gradient of sum_k w_k B_k with respect to the direction."""
    x, y, z = d[0], d[1], d[2]
    g0, g1, g2 = x * 0.0, x * 0.0, x * 0.0
    if DEGREE > 0:
        g0, g1, g2 = g0 - 0.4886025119029199 * w[3], g1 - 0.4886025119029199 * w[1], g2 + 0.4886025119029199 * w[2]
    if DEGREE > 1:
        w4, w5, w7 = 1.0925484305920792 * w[4], -1.0925484305920792 * w[5], -1.0925484305920792 * w[7]
        w6, w8 = 0.6307831305050401 * w[6], 1.0925484305920792 * w[8]
        g0 += y * w4 - x * w6 + z * w7 + x * w8
        g1 += x * w4 + z * w5 - y * w6 - y * w8
        g2 += y * w5 + 2 * z * w6 + x * w7
    if DEGREE > 2:
        xx, yy, zz = x * x, y * y, z * z
        w9, w10, w11 = -0.5900435899266435 * w[9], 2.890611442640554 * w[10], -0.4570457994644658 * w[11]
        w12, w13, w14 = 0.3731763325901154 * w[12], -0.4570457994644658 * w[13], 1.445305721320277 * w[14]
        w15 = -0.5900435899266435 * w[15]
        g0 += 6 * x * y * w9 + y * z * w10 - 2 * x * y * w11 - 6 * x * z * w12 + (4 * zz - 3 * xx - yy) * w13
        g0 += 2 * x * z * w14 + 3 * (xx - yy) * w15
        g1 += 3 * (xx - yy) * w9 + x * z * w10 + (4 * zz - xx - 3 * yy) * w11 - 6 * y * z * w12 - 2 * x * y * w13
        g1 += -2 * y * z * w14 - 6 * x * y * w15
        g2 += x * y * w10 + 8 * y * z * w11 + (6 * zz - 3 * xx - 3 * yy) * w12 + 8 * x * z * w13 + (xx - yy) * w14
    return g0, g1, g2


@triton.jit
def _sh_color(colors, n, valid, B, K: tl.constexpr, c: tl.constexpr):
    """Channel c before the clamp at 0."""
    total = B[0] * tl.load(colors + n * (3 * K) + c, valid, 0.0) + 0.5
    for k in tl.static_range(1, len(B)):
        total += B[k] * tl.load(colors + n * (3 * K) + 3 * k + c, valid, 0.0)
    return total


@triton.jit
def store_look(
    row, colors, features, ids, n, n_ids, seen, V, m,
    DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, F: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Columns 8 on of the record: rgb, body (-1: none), features."""
    if DEGREE < 0:
        for c in tl.static_range(3):
            tl.store(row + 8 + c, tl.load(colors + 3 * n + c, seen, 0.0), seen)
    else:
        d, inv_d = _direction(V, m)
        B = _sh_basis(d, DEGREE)
        for c in tl.static_range(3):
            tl.store(row + 8 + c, tl.maximum(_sh_color(colors, n, seen, B, COEFFICIENTS, c), 0.0), seen)
    body = m[0] * 0.0 - 1.0
    if IDS > 0:
        number = tl.load(ids + n, seen, -1)
        body = tl.where((number >= 0) & (number < n_ids), number, -1).to(tl.float32)
    tl.store(row + 11, body, seen)
    for i in tl.static_range(F):
        tl.store(row + 12 + i, tl.load(features + n * F + i, seen, 0.0), seen)


@triton.jit
def look_backward(
    row, sum_of, colors, v_colors, v_features, n, valid, seen, V, m,
    DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, F: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of colours and features (from column FIRST of the sums); returns that of mean - centre."""
    zero = m[0] * 0.0
    for i in tl.static_range(F):
        tl.store(v_features + n * F + i, tl.load(sum_of + FIRST + i, seen, 0.0), valid)
    color_of = v_colors + n * (3 * COEFFICIENTS)
    e = (zero, zero, zero)
    if DEGREE < 0:
        for c in tl.static_range(3):
            tl.store(color_of + c, tl.load(sum_of + c, seen, 0.0), valid)
    else:
        d, inv_d = _direction(V, m)
        basis = _sh_basis(d, DEGREE)
        # Positive exactly where the clamp at 0 lets the gradient pass (but for a colour of exactly 0).
        c0 = tl.load(sum_of, seen & (tl.load(row + 8, seen, 0.0) > 0), 0.0)
        c1 = tl.load(sum_of + 1, seen & (tl.load(row + 9, seen, 0.0) > 0), 0.0)
        c2 = tl.load(sum_of + 2, seen & (tl.load(row + 10, seen, 0.0) > 0), 0.0)
        weights = ()
        for i in tl.static_range(COEFFICIENTS):
            if i < len(basis):
                tl.store(color_of + 3 * i, basis[i] * c0, valid)
                tl.store(color_of + 3 * i + 1, basis[i] * c1, valid)
                tl.store(color_of + 3 * i + 2, basis[i] * c2, valid)
                f = colors + n * (3 * COEFFICIENTS) + 3 * i
                weights = weights + (
                    tl.load(f, seen, 0.0) * c0 + tl.load(f + 1, seen, 0.0) * c1 + tl.load(f + 2, seen, 0.0) * c2,
                )
            else:
                for c in tl.static_range(3):
                    tl.store(color_of + 3 * i + c, zero, valid)
        d0, d1, d2 = _sh_gradient(d, weights, DEGREE)
        along = d0 * d[0] + d1 * d[1] + d2 * d[2]
        e = ((d0 - along * d[0]) * inv_d, (d1 - along * d[1]) * inv_d, (d2 - along * d[2]) * inv_d)
    return e
