"""Triton kernels of the per-Gaussian stage: EWA projection (Zwicker et al. 2001), spherical harmonics, and back.

One lane per Gaussian. The specification is `splat_torch`; the record that the raster stage reads has, per Gaussian,
x, y, conic a, b, c, opacity, ln(255 opacity), depth, r, g, b, body (-1: none), then its features.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEAR, FAR = tl.constexpr(0.01), tl.constexpr(1e10)  # metres
DILATION = tl.constexpr(0.3)  # pixels^2
ALPHA_MIN = tl.constexpr(1.0 / 255.0)
RECORD = 12  # floats before the features
SUMS = 10  # columns of a gradient slot before the features; see splat_triton_raster.raster_backward
CAMERA = 32  # columns of a block's camera gradient: viewmat (16), K (9), padding


@triton.jit
def _geometry(means, quats, scales, view, K, n, valid, width, height):
    """What both directions need of lane n, in the notation cov = U U^T, U = T R diag(s), T = J W."""
    V = (tl.load(view),)
    for i in tl.static_range(1, 12):
        V = V + (tl.load(view + i),)
    fx, fy, cx, cy = tl.load(K), tl.load(K + 4), tl.load(K + 2), tl.load(K + 5)
    m0 = tl.load(means + 3 * n, valid, 0.0)
    m1 = tl.load(means + 3 * n + 1, valid, 0.0)
    m2 = tl.load(means + 3 * n + 2, valid, 0.0)
    t0 = V[0] * m0 + V[1] * m1 + V[2] * m2 + V[3]
    t1 = V[4] * m0 + V[5] * m1 + V[6] * m2 + V[7]
    t2 = V[8] * m0 + V[9] * m1 + V[10] * m2 + V[11]
    near = (t2 >= NEAR) & (t2 <= FAR)
    rz = 1.0 / tl.where(near, t2, 1.0)
    u, v = t0 * rz, t1 * rz
    # The Jacobian is taken no further out than 15 % of the image beyond its edge.
    u_hi, u_lo = (1.15 * width - cx) / fx, (-0.15 * width - cx) / fx
    v_hi, v_lo = (1.15 * height - cy) / fy, (-0.15 * height - cy) / fy
    u_free, v_free = (u >= u_lo) & (u <= u_hi), (v >= v_lo) & (v <= v_hi)
    uc, vc = tl.minimum(tl.maximum(u, u_lo), u_hi), tl.minimum(tl.maximum(v, v_lo), v_hi)
    j00, j02, j11, j12 = fx * rz, -fx * uc * rz, fy * rz, -fy * vc * rz
    qw, qx = tl.load(quats + 4 * n, valid, 1.0), tl.load(quats + 4 * n + 1, valid, 0.0)
    qy, qz = tl.load(quats + 4 * n + 2, valid, 0.0), tl.load(quats + 4 * n + 3, valid, 0.0)
    norm = tl.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
    near = near & (norm > 0)
    inv = 1.0 / tl.maximum(norm, 1e-12)
    w, x, y, z = qw * inv, qx * inv, qy * inv, qz * inv
    R = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    s0 = tl.load(scales + 3 * n, valid, 0.0)
    s1 = tl.load(scales + 3 * n + 1, valid, 0.0)
    s2 = tl.load(scales + 3 * n + 2, valid, 0.0)
    T = (
        j00 * V[0] + j02 * V[8], j00 * V[1] + j02 * V[9], j00 * V[2] + j02 * V[10],
        j11 * V[4] + j12 * V[8], j11 * V[5] + j12 * V[9], j11 * V[6] + j12 * V[10],
    )  # fmt: skip
    U = (
        (T[0] * R[0] + T[1] * R[3] + T[2] * R[6]) * s0,
        (T[0] * R[1] + T[1] * R[4] + T[2] * R[7]) * s1,
        (T[0] * R[2] + T[1] * R[5] + T[2] * R[8]) * s2,
        (T[3] * R[0] + T[4] * R[3] + T[5] * R[6]) * s0,
        (T[3] * R[1] + T[4] * R[4] + T[5] * R[7]) * s1,
        (T[3] * R[2] + T[4] * R[5] + T[5] * R[8]) * s2,
    )
    return (
        V, (fx, fy, cx, cy), (m0, m1, m2), (t0, t1, t2), near, rz, (u, v), (u_free, v_free), (j00, j02, j11, j12),
        T, R, U, (w, x, y, z), inv, (s0, s1, s2),
    )  # fmt: skip


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


@triton.jit(do_not_specialize=["count", "n_ids"])
def project_forward(
    means, quats, scales, opacities, colors, features, ids, view, K, record, box, key, tiles,
    count, n_ids, width, height,
    DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, F: tl.constexpr, IDS: tl.constexpr, ROW: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes record (N,ROW), box (N,4) int32 in tiles, key (N,): depth or inf, tiles (N,) int32: how many."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < count
    n = lane.to(tl.int64)
    V, k, m, t, near, rz, uv, free, J, T, R, U, q, inv, s = _geometry(
        means, quats, scales, view, K, n, valid, width, height
    )
    opacity = tl.load(opacities + n, valid, 0.0)
    c00 = U[0] * U[0] + U[1] * U[1] + U[2] * U[2]
    c01 = U[0] * U[3] + U[1] * U[4] + U[2] * U[5]
    c11 = U[3] * U[3] + U[4] * U[4] + U[5] * U[5]
    # |U_0 x U_1|^2 = c00 c11 - c01^2, which does not cancel for needles
    n0, n1, n2 = U[1] * U[5] - U[2] * U[4], U[2] * U[3] - U[0] * U[5], U[0] * U[4] - U[1] * U[3]
    det = n0 * n0 + n1 * n1 + n2 * n2 + DILATION * (c00 + c11 + DILATION)
    c00, c11 = c00 + DILATION, c11 + DILATION
    x, y = k[0] * uv[0] + k[2], k[1] * uv[1] + k[3]
    seen = valid & near & (opacity >= ALPHA_MIN) & (det > 0) & (det < 1e30)
    seen = seen & (tl.abs(x) < 1e30) & (tl.abs(y) < 1e30)
    rdet = 1.0 / tl.where(seen, det, 1.0)
    smax = tl.log(255.0 * tl.where(seen, opacity, 1.0))
    # The first and last pixel centre that can be reached, as tiles. Clamped as floats, so that no int overflows.
    ex, ey = tl.sqrt(2 * smax * c00), tl.sqrt(2 * smax * c11)
    x0, x1 = tl.ceil(x - ex - 0.5), tl.floor(x + ex - 0.5)
    y0, y1 = tl.ceil(y - ey - 0.5), tl.floor(y + ey - 0.5)
    seen = seen & (x1 >= 0) & (y1 >= 0) & (x0 < width) & (y0 < height) & (x0 <= x1) & (y0 <= y1)
    right, low = width - 1.0, height - 1.0
    bx0 = tl.where(seen, tl.minimum(tl.maximum(x0, 0.0), right), 0.0).to(tl.int32) // TX
    by0 = tl.where(seen, tl.minimum(tl.maximum(y0, 0.0), low), 0.0).to(tl.int32) // TY
    bx1 = tl.where(seen, tl.minimum(tl.maximum(x1, 0.0), right), 0.0).to(tl.int32) // TX + 1
    by1 = tl.where(seen, tl.minimum(tl.maximum(y1, 0.0), low), 0.0).to(tl.int32) // TY + 1
    tl.store(box + 4 * n, bx0, valid)
    tl.store(box + 4 * n + 1, by0, valid)
    tl.store(box + 4 * n + 2, bx1, valid)
    tl.store(box + 4 * n + 3, by1, valid)
    tl.store(tiles + n, tl.where(seen, (bx1 - bx0) * (by1 - by0), 0), valid)
    tl.store(key + n, tl.where(seen, t[2], float("inf")), valid)
    row = record + n * ROW
    tl.store(row, x, seen)
    tl.store(row + 1, y, seen)
    tl.store(row + 2, c11 * rdet, seen)
    tl.store(row + 3, -c01 * rdet, seen)
    tl.store(row + 4, c00 * rdet, seen)
    tl.store(row + 5, opacity, seen)
    tl.store(row + 6, smax, seen)
    tl.store(row + 7, t[2], seen)
    if DEGREE < 0:
        for c in tl.static_range(3):
            tl.store(row + 8 + c, tl.load(colors + 3 * n + c, seen, 0.0), seen)
    else:
        d, inv_d = _direction(V, m)
        B = _sh_basis(d, DEGREE)
        for c in tl.static_range(3):
            tl.store(row + 8 + c, tl.maximum(_sh_color(colors, n, seen, B, COEFFICIENTS, c), 0.0), seen)
    body = tl.full((BLOCK,), -1.0, tl.float32)
    if IDS > 0:
        number = tl.load(ids + n, seen, -1)
        body = tl.where((number >= 0) & (number < n_ids), number, -1).to(tl.float32)
    tl.store(row + 11, body, seen)
    for i in tl.static_range(F):
        tl.store(row + 12 + i, tl.load(features + n * F + i, seen, 0.0), seen)


@triton.jit(do_not_specialize=["count"])
def project_backward(
    means, quats, scales, colors, view, K, record, tiles, sums,
    v_means, v_quats, v_scales, v_opacities, v_colors, v_features, v_camera,
    count, width, height,
    DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, F: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of every Gaussian from its sums (N,SLOT), and each block's share of the camera's (blocks,32)."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < count
    n = lane.to(tl.int64)
    seen = valid & (tl.load(tiles + n, valid, 0) > 0)
    V, k, m, t, near, rz, uv, free, J, T, R, U, q, inv, s = _geometry(
        means, quats, scales, view, K, n, seen, width, height
    )
    row, sum_of = record + n * ROW, sums + n * SLOT
    A, B = tl.load(row + 2, seen, 1.0), tl.load(row + 3, seen, 0.0)
    C, opacity = tl.load(row + 4, seen, 1.0), tl.load(row + 5, seen, 0.0)
    tl.store(v_opacities + n, tl.load(sum_of + 3, seen, 0.0), valid)
    for i in tl.static_range(F):
        tl.store(v_features + n * F + i, tl.load(sum_of + 10 + i, seen, 0.0), valid)
    # sigma = (A dx^2 + C dy^2) / 2 + B dx dy and dL/dsigma = -opacity q, with dx = pixel - centre
    s1, s2 = -opacity * tl.load(sum_of + 4, seen, 0.0), -opacity * tl.load(sum_of + 5, seen, 0.0)
    va, vb = -0.5 * opacity * tl.load(sum_of + 6, seen, 0.0), -0.5 * opacity * tl.load(sum_of + 7, seen, 0.0)
    vc = -0.5 * opacity * tl.load(sum_of + 8, seen, 0.0)
    vx, vy = -(A * s1 + B * s2), -(B * s1 + C * s2)
    # conic Q -> covariance: dL/dcov = -Q G Q
    g00, g01, g10, g11 = va * A + vb * B, va * B + vb * C, vb * A + vc * B, vb * B + vc * C
    k00, k01, k11 = -(A * g00 + B * g10), -(A * g01 + B * g11), -(B * g01 + C * g11)
    # cov = U U^T, U = T M, M = R diag(s)
    a0, a1, a2 = 2 * (k00 * U[0] + k01 * U[3]), 2 * (k00 * U[1] + k01 * U[4]), 2 * (k00 * U[2] + k01 * U[5])
    b0, b1, b2 = 2 * (k01 * U[0] + k11 * U[3]), 2 * (k01 * U[1] + k11 * U[4]), 2 * (k01 * U[2] + k11 * U[5])
    as0, as1, as2, bs0, bs1, bs2 = a0 * s[0], a1 * s[1], a2 * s[2], b0 * s[0], b1 * s[1], b2 * s[2]
    vT = (
        as0 * R[0] + as1 * R[1] + as2 * R[2],
        as0 * R[3] + as1 * R[4] + as2 * R[5],
        as0 * R[6] + as1 * R[7] + as2 * R[8],
        bs0 * R[0] + bs1 * R[1] + bs2 * R[2],
        bs0 * R[3] + bs1 * R[4] + bs2 * R[5],
        bs0 * R[6] + bs1 * R[7] + bs2 * R[8],
    )
    v_s0 = R[0] * (T[0] * a0 + T[3] * b0) + R[3] * (T[1] * a0 + T[4] * b0) + R[6] * (T[2] * a0 + T[5] * b0)
    v_s1 = R[1] * (T[0] * a1 + T[3] * b1) + R[4] * (T[1] * a1 + T[4] * b1) + R[7] * (T[2] * a1 + T[5] * b1)
    v_s2 = R[2] * (T[0] * a2 + T[3] * b2) + R[5] * (T[1] * a2 + T[4] * b2) + R[8] * (T[2] * a2 + T[5] * b2)
    tl.store(v_scales + 3 * n, tl.where(seen, v_s0, 0.0), valid)
    tl.store(v_scales + 3 * n + 1, tl.where(seen, v_s1, 0.0), valid)
    tl.store(v_scales + 3 * n + 2, tl.where(seen, v_s2, 0.0), valid)
    r00, r01, r02 = T[0] * as0 + T[3] * bs0, T[0] * as1 + T[3] * bs1, T[0] * as2 + T[3] * bs2
    r10, r11, r12 = T[1] * as0 + T[4] * bs0, T[1] * as1 + T[4] * bs1, T[1] * as2 + T[4] * bs2
    r20, r21, r22 = T[2] * as0 + T[5] * bs0, T[2] * as1 + T[5] * bs1, T[2] * as2 + T[5] * bs2
    w, x, y, z = q[0], q[1], q[2], q[3]
    gw = 2 * (x * (r21 - r12) + y * (r02 - r20) + z * (r10 - r01))
    gx = 2 * (-2 * x * (r11 + r22) + y * (r01 + r10) + z * (r02 + r20) + w * (r21 - r12))
    gy = 2 * (x * (r01 + r10) - 2 * y * (r00 + r22) + z * (r12 + r21) + w * (r02 - r20))
    gz = 2 * (x * (r02 + r20) + y * (r12 + r21) - 2 * z * (r00 + r11) + w * (r10 - r01))
    along = gw * w + gx * x + gy * y + gz * z
    tl.store(v_quats + 4 * n, tl.where(seen, (gw - along * w) * inv, 0.0), valid)
    tl.store(v_quats + 4 * n + 1, tl.where(seen, (gx - along * x) * inv, 0.0), valid)
    tl.store(v_quats + 4 * n + 2, tl.where(seen, (gy - along * y) * inv, 0.0), valid)
    tl.store(v_quats + 4 * n + 3, tl.where(seen, (gz - along * z) * inv, 0.0), valid)
    # T = J W; J = [fx/z, 0, -fx u/z; 0, fy/z, -fy v/z]; where the point was clamped, fx u is a bound less cx
    j00 = vT[0] * V[0] + vT[1] * V[1] + vT[2] * V[2]
    j02 = vT[0] * V[8] + vT[1] * V[9] + vT[2] * V[10]
    j11 = vT[3] * V[4] + vT[4] * V[5] + vT[5] * V[6]
    j12 = vT[3] * V[8] + vT[4] * V[9] + vT[5] * V[10]
    fx, fy, rz2 = k[0], k[1], rz * rz
    vt0, vt1 = fx * rz * vx, fy * rz * vy
    vt2 = -(vt0 * uv[0] + vt1 * uv[1]) + tl.load(sum_of + 9, seen, 0.0)
    vt2 -= rz * (J[0] * j00 + J[1] * j02 + J[2] * j11 + J[3] * j12)
    vt0 -= tl.where(free[0], fx * rz2 * j02, 0.0)
    vt2 += tl.where(free[0], fx * uv[0] * rz2 * j02, 0.0)
    vt1 -= tl.where(free[1], fy * rz2 * j12, 0.0)
    vt2 += tl.where(free[1], fy * uv[1] * rz2 * j12, 0.0)
    v_m0 = V[0] * vt0 + V[4] * vt1 + V[8] * vt2
    v_m1 = V[1] * vt0 + V[5] * vt1 + V[9] * vt2
    v_m2 = V[2] * vt0 + V[6] * vt1 + V[10] * vt2
    e0, e1, e2 = w * 0.0, w * 0.0, w * 0.0  # gradient to the camera centre's offset, through the view direction
    color_of = v_colors + n * (3 * COEFFICIENTS)
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
                    tl.store(color_of + 3 * i + c, w * 0.0, valid)
        d0, d1, d2 = _sh_gradient(d, weights, DEGREE)
        along_d = d0 * d[0] + d1 * d[1] + d2 * d[2]
        e0, e1, e2 = (d0 - along_d * d[0]) * inv_d, (d1 - along_d * d[1]) * inv_d, (d2 - along_d * d[2]) * inv_d
    tl.store(v_means + 3 * n, tl.where(seen, v_m0 + e0, 0.0), valid)
    tl.store(v_means + 3 * n + 1, tl.where(seen, v_m1 + e1, 0.0), valid)
    tl.store(v_means + 3 * n + 2, tl.where(seen, v_m2 + e2, 0.0), valid)
    out = v_camera + tl.program_id(0) * 32
    e = (e0, e1, e2)
    vt = (vt0, vt1, vt2)
    for j in tl.static_range(3):
        tl.store(out + j, _total(J[0] * vT[j] + vt0 * m[j] + V[3] * e[j], seen))
        tl.store(out + 4 + j, _total(J[2] * vT[3 + j] + vt1 * m[j] + V[7] * e[j], seen))
        tl.store(out + 8 + j, _total(J[1] * vT[j] + J[3] * vT[3 + j] + vt2 * m[j] + V[11] * e[j], seen))
        tl.store(out + 4 * j + 3, _total(vt[j] + V[4 * j] * e0 + V[4 * j + 1] * e1 + V[4 * j + 2] * e2, seen))
    tl.store(out + 16, _total(vx * uv[0] + rz * (j00 - tl.where(free[0], uv[0] * j02, 0.0)), seen))
    tl.store(out + 20, _total(vy * uv[1] + rz * (j11 - tl.where(free[1], uv[1] * j12, 0.0)), seen))
    tl.store(out + 18, _total(vx + tl.where(free[0], 0.0, rz * j02), seen))
    tl.store(out + 21, _total(vy + tl.where(free[1], 0.0, rz * j12), seen))


@triton.jit
def _total(x, mask):
    return tl.sum(tl.where(mask, x, 0.0))


@triton.jit(do_not_specialize=["blocks"])
def camera_sum(partial, out, blocks, ROWS: tl.constexpr):
    """Second stage of the camera's gradient: (blocks,32) -> (32,), in one program so that the order is fixed."""
    column, r = tl.arange(0, 32), tl.arange(0, ROWS)
    total = tl.zeros((ROWS, 32), tl.float32)
    b = 0
    while b < blocks:
        total += tl.load(partial + (b + r[:, None]) * 32 + column[None, :], b + r[:, None] < blocks, 0.0)
        b += ROWS
    tl.store(out + column, tl.sum(total, 0))
