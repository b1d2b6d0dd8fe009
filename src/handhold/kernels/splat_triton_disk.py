"""Triton kernels of 2D Gaussians (Huang et al., 2D Gaussian Splatting, SIGGRAPH 2024): disks to the image, and back.

One lane per disk. The specification is `splat_torch.meet`. With pixels counted from the projected centre, the matrix
that takes a disk's plane to pixels times z has rows (m00 m01 0), (m10 m11 0), (p q z), and the two planes through a
pixel meet the disk at (u, v) = (nu, nv) / cz, where nu, nv and cz are linear in (dx, dy):

    nu = z (m11 dx - m01 dy),  nv = z (m00 dy - m10 dx),  cz = D + dx (q m10 - p m11) + dy (p m01 - q m00),
    D = m00 m11 - m01 m10,  camera z there = z D / cz.

Record: x, y, the three coefficients of cz, opacity, ln(255 opacity), z, rgb, body, features; then the two coefficients
of nu, the two of nv, and z D.
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


@triton.jit
def _tangent(V, R, s, axis: tl.constexpr):
    """Axis of the disk in the camera's frame, times its scale."""
    return (
        (V[0] * R[axis] + V[1] * R[3 + axis] + V[2] * R[6 + axis]) * s[axis],
        (V[4] * R[axis] + V[5] * R[3 + axis] + V[6] * R[6 + axis]) * s[axis],
        (V[8] * R[axis] + V[9] * R[3 + axis] + V[10] * R[6 + axis]) * s[axis],
    )


@triton.jit
def _plane(V, k, u, v, R, s):
    """Both tangents (3 each) and m00, m01, m10, m11."""
    A, B = _tangent(V, R, s, 0), _tangent(V, R, s, 1)
    fx, fy = k[0], k[1]
    return A, B, (fx * (A[0] - u * A[2]), fx * (B[0] - u * B[2]), fy * (A[1] - v * A[2]), fy * (B[1] - v * B[2]))


@triton.jit
def _reach(m0, m1, p, q, z, rho2):
    """Pixels from the centre that a row of the matrix reaches on the disk of radius^2 rho2, by its dual conic."""
    d = rho2 * (p * p + q * q) - z * z  # negative while the disk stays in front of the camera
    whole = d < -1e-3 * z * z
    d = tl.where(whole, d, -1.0)
    mid = rho2 * (m0 * p + m1 * q) / d
    half = tl.sqrt(tl.maximum(mid * mid - rho2 * (m0 * m0 + m1 * m1) / d, 0.0))
    return tl.where(whole, mid - half, -HUGE), tl.where(whole, mid + half, HUGE)


@triton.jit(do_not_specialize=["count", "n_ids"])
def disk_forward(
    means, quats, scales, opacities, colors, features, ids, view, K, record, box, key, tiles,
    count, n_ids, width, height,
    DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, F: tl.constexpr, IDS: tl.constexpr, ROW: tl.constexpr,
    TX: tl.constexpr, TY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `project_forward`."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < count
    n = lane.to(tl.int64)
    V, k = load_camera(view, K)
    m = load_point(means, n, valid)
    t, rz, u, v, between = into_camera(V, m)
    R, quat, inv, turned = rotation(quats, n, valid)
    A, B, M = _plane(V, k, u, v, R, load_point(scales, n, valid))
    p, q, z = A[2], B[2], t[2]
    opacity = tl.load(opacities + n, valid, 0.0)
    x, y = k[0] * u + k[2], k[1] * v + k[3]
    D, e, f = M[0] * M[3] - M[1] * M[2], q * M[2] - p * M[3], p * M[1] - q * M[0]
    size = z * (tl.abs(M[0]) + tl.abs(M[1]) + tl.abs(M[2]) + tl.abs(M[3]))
    seen = valid & between & turned & (opacity >= ALPHA_MIN)
    seen = seen & (tl.abs(x) < HUGE) & (tl.abs(y) < HUGE) & (tl.abs(D) < HUGE) & (size < HUGE)
    smax = tl.log(255.0 * tl.where(seen, opacity, 1.0))
    rho2 = 2.002 * smax
    left, right = _reach(M[0], M[1], p, q, z, rho2)
    top, bottom = _reach(M[2], M[3], p, q, z, rho2)
    flat = tl.sqrt(smax) + 0.01  # where the filter's dx^2 + dy^2 reaches smax
    left, right = x + tl.minimum(left - 0.01, -flat), x + tl.maximum(right + 0.01, flat)
    top, bottom = y + tl.minimum(top - 0.01, -flat), y + tl.maximum(bottom + 0.01, flat)
    seen = store_box(box, tiles, key, n, valid, seen, left, right, top, bottom, z, width, height, TX, TY)
    row = record + n * ROW
    tl.store(row, x, seen)
    tl.store(row + 1, y, seen)
    tl.store(row + 2, D, seen)
    tl.store(row + 3, e, seen)
    tl.store(row + 4, f, seen)
    tl.store(row + 5, opacity, seen)
    tl.store(row + 6, smax, seen)
    tl.store(row + 7, z, seen)
    tl.store(row + 12 + F, z * M[3], seen)
    tl.store(row + 13 + F, -z * M[1], seen)
    tl.store(row + 14 + F, -z * M[2], seen)
    tl.store(row + 15 + F, z * M[0], seen)
    tl.store(row + 16 + F, z * D, seen)
    store_look(row, colors, features, ids, n, n_ids, seen, V, m, DEGREE, COEFFICIENTS, F, IDS)


@triton.jit(do_not_specialize=["count"])
def disk_backward(
    means, quats, scales, colors, view, K, record, tiles, sums,
    v_means, v_quats, v_scales, v_opacities, v_colors, v_features, v_camera,
    count, width, height,
    DEGREE: tl.constexpr, COEFFICIENTS: tl.constexpr, F: tl.constexpr, ROW: tl.constexpr, SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """As `project_backward`; the third scale has no gradient."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = lane < count
    n = lane.to(tl.int64)
    seen = valid & (tl.load(tiles + n, valid, 0) > 0)
    V, k = load_camera(view, K)
    m, scale = load_point(means, n, seen), load_point(scales, n, seen)
    t, rz, u, v, between = into_camera(V, m)
    R, quat, inv, turned = rotation(quats, n, seen)
    A, B, M = _plane(V, k, u, v, R, scale)
    p, q, z = A[2], B[2], t[2]
    row, sum_of = record + n * ROW, sums + n * SLOT
    tl.store(v_opacities + n, tl.load(sum_of + 3, seen, 0.0), valid)
    s = ()
    for i in tl.static_range(13):
        s = s + (tl.load(sum_of + 4 + i, seen, 0.0),)
    # dx = pixel - x in nu = a1 dx + a2 dy, nv = b1 dx + b2 dy and cz
    D, e, f = M[0] * M[3] - M[1] * M[2], q * M[2] - p * M[3], p * M[1] - q * M[0]
    vx = s[10] - (z * M[3] * s[0] - z * M[2] * s[3] + e * s[6])
    vy = s[11] - (-z * M[1] * s[0] + z * M[0] * s[3] + f * s[6])
    vD = s[6] + z * s[9]
    v00, v01 = z * s[5] + M[3] * vD - q * s[8], -z * s[2] - M[2] * vD + p * s[8]
    v10, v11 = -z * s[4] - M[1] * vD + q * s[7], z * s[1] + M[0] * vD - p * s[7]
    vp, vq = M[1] * s[8] - M[3] * s[7], M[2] * s[7] - M[0] * s[8]
    vz = M[3] * s[1] - M[1] * s[2] - M[2] * s[4] + M[0] * s[5] + D * s[9] + s[12]
    fx, fy = k[0], k[1]
    vA = (fx * v00, fy * v10, vp - fx * u * v00 - fy * v * v10)
    vB = (fx * v01, fy * v11, vq - fx * u * v01 - fy * v * v11)
    v_u, v_v = fx * (vx - p * v00 - q * v01), fy * (vy - p * v10 - q * v11)
    vt = (v_u * rz, v_v * rz, vz - (u * v_u + v * v_v) * rz)
    r = ()
    for j in tl.static_range(3):
        r = r + (
            (V[j] * vA[0] + V[4 + j] * vA[1] + V[8 + j] * vA[2]) * scale[0],
            (V[j] * vB[0] + V[4 + j] * vB[1] + V[8 + j] * vB[2]) * scale[1],
            z * 0.0,
        )
    store_rotation_gradient(v_quats, n, r, quat, inv, seen, valid)
    WA, WB = _tangent(V, R, (1.0, 1.0), 0), _tangent(V, R, (1.0, 1.0), 1)
    v_s0 = WA[0] * vA[0] + WA[1] * vA[1] + WA[2] * vA[2]
    v_s1 = WB[0] * vB[0] + WB[1] * vB[1] + WB[2] * vB[2]
    store_point(v_scales, n, (v_s0, v_s1, z * 0.0), seen, valid)
    toward = look_backward(row, sum_of, colors, v_colors, v_features, n, valid, seen, V, m, DEGREE, COEFFICIENTS, F, 17)
    v_m = ()
    W = ()
    for j in tl.static_range(3):
        v_m = v_m + (V[j] * vt[0] + V[4 + j] * vt[1] + V[8 + j] * vt[2] + toward[j],)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            W = W + (vA[i] * R[3 * j] * scale[0] + vB[i] * R[3 * j + 1] * scale[1],)
    store_point(v_means, n, v_m, seen, valid)
    v_fx = u * vx + (A[0] - u * p) * v00 + (B[0] - u * q) * v01
    v_fy = v * vy + (A[1] - v * p) * v10 + (B[1] - v * q) * v11
    out = v_camera + tl.program_id(0) * 32
    store_camera_gradient(out, V, m, W, vt, toward, (v_fx, v_fy, vx, vy), seen)
