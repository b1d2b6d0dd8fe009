"""Triton kernels of 3D Gaussians: EWA projection to the image (Zwicker et al. 2001), and the way back.

One lane per Gaussian. The specification is `splat_torch`; the record that the raster stage reads has, per Gaussian,
x, y, conic a, b, c, opacity, ln(255 opacity), depth, r, g, b, body (-1: none), then its features.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .splat_triton_pose import (
    ALPHA_MIN,
    HUGE,
    into_camera,
    load_camera,
    load_point,
    rotation,
    store_box,
    store_camera_gradient,
    store_point,
    store_rotation_gradient,
)
from .splat_triton_shade import look_backward, store_look

DILATION = tl.constexpr(0.3)  # pixels^2


@triton.jit
def _geometry(V, k, rz, u, v, R, s, width, height):
    """J (4 entries), T = J W (6), U = T R diag(s) (6), where the Jacobian's point was not clamped; cov = U U^T."""
    fx, fy, cx, cy = k[0], k[1], k[2], k[3]
    # The Jacobian is taken no further out than 15 % of the image beyond its edge.
    u_hi, u_lo = (1.15 * width - cx) / fx, (-0.15 * width - cx) / fx
    v_hi, v_lo = (1.15 * height - cy) / fy, (-0.15 * height - cy) / fy
    free = ((u >= u_lo) & (u <= u_hi), (v >= v_lo) & (v <= v_hi))
    uc, vc = tl.minimum(tl.maximum(u, u_lo), u_hi), tl.minimum(tl.maximum(v, v_lo), v_hi)
    J = (fx * rz, -fx * uc * rz, fy * rz, -fy * vc * rz)
    T = (
        J[0] * V[0] + J[1] * V[8], J[0] * V[1] + J[1] * V[9], J[0] * V[2] + J[1] * V[10],
        J[2] * V[4] + J[3] * V[8], J[2] * V[5] + J[3] * V[9], J[2] * V[6] + J[3] * V[10],
    )  # fmt: skip
    U = (
        (T[0] * R[0] + T[1] * R[3] + T[2] * R[6]) * s[0],
        (T[0] * R[1] + T[1] * R[4] + T[2] * R[7]) * s[1],
        (T[0] * R[2] + T[1] * R[5] + T[2] * R[8]) * s[2],
        (T[3] * R[0] + T[4] * R[3] + T[5] * R[6]) * s[0],
        (T[3] * R[1] + T[4] * R[4] + T[5] * R[7]) * s[1],
        (T[3] * R[2] + T[4] * R[5] + T[5] * R[8]) * s[2],
    )
    return J, T, U, free


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
    V, k = load_camera(view, K)
    m = load_point(means, n, valid)
    t, rz, u, v, between = into_camera(V, m)
    R, q, inv, turned = rotation(quats, n, valid)
    J, T, U, free = _geometry(V, k, rz, u, v, R, load_point(scales, n, valid), width, height)
    opacity = tl.load(opacities + n, valid, 0.0)
    c00 = U[0] * U[0] + U[1] * U[1] + U[2] * U[2]
    c01 = U[0] * U[3] + U[1] * U[4] + U[2] * U[5]
    c11 = U[3] * U[3] + U[4] * U[4] + U[5] * U[5]
    # |U_0 x U_1|^2 = c00 c11 - c01^2, which does not cancel for needles
    n0, n1, n2 = U[1] * U[5] - U[2] * U[4], U[2] * U[3] - U[0] * U[5], U[0] * U[4] - U[1] * U[3]
    det = n0 * n0 + n1 * n1 + n2 * n2 + DILATION * (c00 + c11 + DILATION)
    c00, c11 = c00 + DILATION, c11 + DILATION
    x, y = k[0] * u + k[2], k[1] * v + k[3]
    seen = valid & between & turned & (opacity >= ALPHA_MIN) & (det > 0) & (det < 1e30)
    seen = seen & (tl.abs(x) < HUGE) & (tl.abs(y) < HUGE)
    rdet = 1.0 / tl.where(seen, det, 1.0)
    smax = tl.log(255.0 * tl.where(seen, opacity, 1.0))
    ex, ey = tl.sqrt(2 * smax * c00), tl.sqrt(2 * smax * c11)
    seen = store_box(box, tiles, key, n, valid, seen, x - ex, x + ex, y - ey, y + ey, t[2], width, height, TX, TY)
    row = record + n * ROW
    tl.store(row, x, seen)
    tl.store(row + 1, y, seen)
    tl.store(row + 2, c11 * rdet, seen)
    tl.store(row + 3, -c01 * rdet, seen)
    tl.store(row + 4, c00 * rdet, seen)
    tl.store(row + 5, opacity, seen)
    tl.store(row + 6, smax, seen)
    tl.store(row + 7, t[2], seen)
    store_look(row, colors, features, ids, n, n_ids, seen, V, m, DEGREE, COEFFICIENTS, F, IDS)


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
    V, k = load_camera(view, K)
    m, s = load_point(means, n, seen), load_point(scales, n, seen)
    t, rz, u, v, between = into_camera(V, m)
    R, quat, inv, turned = rotation(quats, n, seen)
    J, T, U, free = _geometry(V, k, rz, u, v, R, s, width, height)
    row, sum_of = record + n * ROW, sums + n * SLOT
    A, B = tl.load(row + 2, seen, 1.0), tl.load(row + 3, seen, 0.0)
    C, opacity = tl.load(row + 4, seen, 1.0), tl.load(row + 5, seen, 0.0)
    tl.store(v_opacities + n, tl.load(sum_of + 3, seen, 0.0), valid)
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
    store_point(v_scales, n, (v_s0, v_s1, v_s2), seen, valid)
    r = (
        T[0] * as0 + T[3] * bs0, T[0] * as1 + T[3] * bs1, T[0] * as2 + T[3] * bs2,
        T[1] * as0 + T[4] * bs0, T[1] * as1 + T[4] * bs1, T[1] * as2 + T[4] * bs2,
        T[2] * as0 + T[5] * bs0, T[2] * as1 + T[5] * bs1, T[2] * as2 + T[5] * bs2,
    )  # fmt: skip
    store_rotation_gradient(v_quats, n, r, quat, inv, seen, valid)
    # T = J W; J = [fx/z, 0, -fx u/z; 0, fy/z, -fy v/z]; where the point was clamped, fx u is a bound less cx
    j00 = vT[0] * V[0] + vT[1] * V[1] + vT[2] * V[2]
    j02 = vT[0] * V[8] + vT[1] * V[9] + vT[2] * V[10]
    j11 = vT[3] * V[4] + vT[4] * V[5] + vT[5] * V[6]
    j12 = vT[3] * V[8] + vT[4] * V[9] + vT[5] * V[10]
    fx, fy, rz2 = k[0], k[1], rz * rz
    vt0, vt1 = fx * rz * vx, fy * rz * vy
    vt2 = -(vt0 * u + vt1 * v) + tl.load(sum_of + 9, seen, 0.0)
    vt2 -= rz * (J[0] * j00 + J[1] * j02 + J[2] * j11 + J[3] * j12)
    vt0 -= tl.where(free[0], fx * rz2 * j02, 0.0)
    vt2 += tl.where(free[0], fx * u * rz2 * j02, 0.0)
    vt1 -= tl.where(free[1], fy * rz2 * j12, 0.0)
    vt2 += tl.where(free[1], fy * v * rz2 * j12, 0.0)
    e = look_backward(row, sum_of, colors, v_colors, v_features, n, valid, seen, V, m, DEGREE, COEFFICIENTS, F, 10)
    v_m0 = V[0] * vt0 + V[4] * vt1 + V[8] * vt2 + e[0]
    v_m1 = V[1] * vt0 + V[5] * vt1 + V[9] * vt2 + e[1]
    v_m2 = V[2] * vt0 + V[6] * vt1 + V[10] * vt2 + e[2]
    store_point(v_means, n, (v_m0, v_m1, v_m2), seen, valid)
    W = (
        J[0] * vT[0], J[0] * vT[1], J[0] * vT[2],
        J[2] * vT[3], J[2] * vT[4], J[2] * vT[5],
        J[1] * vT[0] + J[3] * vT[3], J[1] * vT[1] + J[3] * vT[4], J[1] * vT[2] + J[3] * vT[5],
    )  # fmt: skip
    v_fx = vx * u + rz * (j00 - tl.where(free[0], u * j02, 0.0))
    v_fy = vy * v + rz * (j11 - tl.where(free[1], v * j12, 0.0))
    v_cx, v_cy = vx + tl.where(free[0], 0.0, rz * j02), vy + tl.where(free[1], 0.0, rz * j12)
    out = v_camera + tl.program_id(0) * 32
    store_camera_gradient(out, V, m, W, (vt0, vt1, vt2), e, (v_fx, v_fy, v_cx, v_cy), seen)
