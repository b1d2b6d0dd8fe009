"""Triton: camera, rotation, tile box and camera gradient, shared by 3D and 2D Gaussians; one lane per Gaussian."""

from __future__ import annotations

import triton
import triton.language as tl

NEAR, FAR = tl.constexpr(0.01), tl.constexpr(1e10)  # metres
ALPHA_MIN = tl.constexpr(1.0 / 255.0)
HUGE = tl.constexpr(1e30)  # pixels; what is beyond is not drawn
CAMERA = 32  # columns of a block's camera gradient: viewmat (16), K (9), padding


@triton.jit
def load_camera(view, K):
    """Rows of the (3,4) view matrix as 12 scalars; fx, fy, cx, cy."""
    V = ()
    for i in tl.static_range(12):
        V = V + (tl.load(view + i),)
    return V, (tl.load(K), tl.load(K + 4), tl.load(K + 2), tl.load(K + 5))


@triton.jit
def load_point(x, n, valid):
    return tl.load(x + 3 * n, valid, 0.0), tl.load(x + 3 * n + 1, valid, 0.0), tl.load(x + 3 * n + 2, valid, 0.0)


@triton.jit
def store_point(x, n, p, seen, valid):
    for i in tl.static_range(3):
        tl.store(x + 3 * n + i, tl.where(seen, p[i], 0.0), valid)


@triton.jit
def into_camera(V, m):
    """Camera point, 1 / its z, u = x/z, v = y/z, and whether it lies between the near and the far plane."""
    x = V[0] * m[0] + V[1] * m[1] + V[2] * m[2] + V[3]
    y = V[4] * m[0] + V[5] * m[1] + V[6] * m[2] + V[7]
    z = V[8] * m[0] + V[9] * m[1] + V[10] * m[2] + V[11]
    between = (z >= NEAR) & (z <= FAR)
    rz = 1.0 / tl.where(between, z, 1.0)
    return (x, y, z), rz, x * rz, y * rz, between


@triton.jit
def rotation(quats, n, valid):
    """Matrix (9, row by row), unit quaternion wxyz, 1 / its length before, whether it had any."""
    qw, qx = tl.load(quats + 4 * n, valid, 1.0), tl.load(quats + 4 * n + 1, valid, 0.0)
    qy, qz = tl.load(quats + 4 * n + 2, valid, 0.0), tl.load(quats + 4 * n + 3, valid, 0.0)
    norm = tl.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
    inv = 1.0 / tl.maximum(norm, 1e-12)
    w, x, y, z = qw * inv, qx * inv, qy * inv, qz * inv
    R = (
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    )  # fmt: skip
    return R, (w, x, y, z), inv, norm > 0


@triton.jit
def store_rotation_gradient(v_quats, n, r, q, inv, seen, valid):
    """r: gradient of the matrix."""
    w, x, y, z = q[0], q[1], q[2], q[3]
    gw = 2 * (x * (r[7] - r[5]) + y * (r[2] - r[6]) + z * (r[3] - r[1]))
    gx = 2 * (-2 * x * (r[4] + r[8]) + y * (r[1] + r[3]) + z * (r[2] + r[6]) + w * (r[7] - r[5]))
    gy = 2 * (x * (r[1] + r[3]) - 2 * y * (r[0] + r[8]) + z * (r[5] + r[7]) + w * (r[2] - r[6]))
    gz = 2 * (x * (r[2] + r[6]) + y * (r[5] + r[7]) - 2 * z * (r[0] + r[4]) + w * (r[3] - r[1]))
    along = gw * w + gx * x + gy * y + gz * z
    tl.store(v_quats + 4 * n, tl.where(seen, (gw - along * w) * inv, 0.0), valid)
    tl.store(v_quats + 4 * n + 1, tl.where(seen, (gx - along * x) * inv, 0.0), valid)
    tl.store(v_quats + 4 * n + 2, tl.where(seen, (gy - along * y) * inv, 0.0), valid)
    tl.store(v_quats + 4 * n + 3, tl.where(seen, (gz - along * z) * inv, 0.0), valid)


@triton.jit
def store_box(
    box, tiles, key, n, valid, seen, left, right, top, bottom, z, width, height, TX: tl.constexpr, TY: tl.constexpr
):
    """Tiles of the pixels whose centres lie between the edges; returns what is still seen.

    Clamped as floats, so that no conversion to int overflows.
    """
    x0, x1, y0, y1 = tl.ceil(left - 0.5), tl.floor(right - 0.5), tl.ceil(top - 0.5), tl.floor(bottom - 0.5)
    seen = seen & (x1 >= 0) & (y1 >= 0) & (x0 < width) & (y0 < height) & (x0 <= x1) & (y0 <= y1)
    x_end, y_end = width - 1.0, height - 1.0
    bx0 = tl.where(seen, tl.minimum(tl.maximum(x0, 0.0), x_end), 0.0).to(tl.int32) // TX
    by0 = tl.where(seen, tl.minimum(tl.maximum(y0, 0.0), y_end), 0.0).to(tl.int32) // TY
    bx1 = tl.where(seen, tl.minimum(tl.maximum(x1, 0.0), x_end), 0.0).to(tl.int32) // TX + 1
    by1 = tl.where(seen, tl.minimum(tl.maximum(y1, 0.0), y_end), 0.0).to(tl.int32) // TY + 1
    tl.store(box + 4 * n, bx0, valid)
    tl.store(box + 4 * n + 1, by0, valid)
    tl.store(box + 4 * n + 2, bx1, valid)
    tl.store(box + 4 * n + 3, by1, valid)
    tl.store(tiles + n, tl.where(seen, (bx1 - bx0) * (by1 - by0), 0), valid)
    tl.store(key + n, tl.where(seen, z, float("inf")), valid)
    return seen


@triton.jit
def _total(x, mask):
    return tl.sum(tl.where(mask, x, 0.0))


@triton.jit
def store_camera_gradient(out, V, m, W, vt, e, k, seen):
    """This block's share. W: gradient of the rotation (9) by the shape; vt: of the camera point; k: of fx, fy, cx, cy.

    e: gradient of mean - centre by the view direction, where centre = -R^T t.
    """
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            tl.store(out + 4 * i + j, _total(W[3 * i + j] + vt[i] * m[j] + V[4 * i + 3] * e[j], seen))
        shift = V[4 * i] * e[0] + V[4 * i + 1] * e[1] + V[4 * i + 2] * e[2]
        tl.store(out + 4 * i + 3, _total(vt[i] + shift, seen))
    tl.store(out + 16, _total(k[0], seen))
    tl.store(out + 20, _total(k[1], seen))
    tl.store(out + 18, _total(k[2], seen))
    tl.store(out + 21, _total(k[3], seen))


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
