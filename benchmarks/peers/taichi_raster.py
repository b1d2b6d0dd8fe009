"""The raster stage in Taichi, one CPU thread: one pixel after another over its tile's list, hand-written backward.

The usual structure of published Taichi splatters: pixels in parallel, gradients added by atomics.
"""

# ruff: noqa: E402
import os

os.environ.setdefault("ENABLE_TAICHI_HEADER_PRINT", "False")

import taichi as ti
import torch
from scenes import ALPHA_MAX, ALPHA_MIN, STOP, TILE, RasterScene
from torch import Tensor

ti.init(arch=ti.cpu, cpu_max_num_threads=1, offline_cache=False, log_level=ti.WARN)

V2, V3 = ti.types.vector(2, ti.f32), ti.types.vector(3, ti.f32)
F, F2, F3 = (ti.types.ndarray(dtype=d, ndim=1) for d in (ti.f32, V2, V3))
I = ti.types.ndarray(dtype=ti.i32, ndim=1)
S_MAX = 5.5413  # ln 255: no exponential where alpha would be under 1/255 at any opacity


@ti.kernel
def forward(
    width: int, height: int, across: int, means: F2, conics: F3, colors: F3, opacities: F, ids: I, starts: I,
    bg: V3, color: F3, alpha: F, last: I,
):  # fmt: skip
    for p in range(width * height):
        y, x = p // width, p % width
        tile = y // TILE * across + x // TILE
        center = V2(x + 0.5, y + 0.5)
        T, total, end = 1.0, V3(0.0), starts[tile]
        for k in range(starts[tile], starts[tile + 1]):
            g = ids[k]
            d, q = center - means[g], conics[g]
            sigma = 0.5 * (q[0] * d[0] * d[0] + q[2] * d[1] * d[1]) + q[1] * d[0] * d[1]
            if sigma >= 0 and sigma <= S_MAX:
                a = ti.min(ALPHA_MAX, opacities[g] * ti.exp(-sigma))
                if a >= ALPHA_MIN:
                    after = T * (1 - a)
                    if after <= STOP:
                        break
                    total += a * T * colors[g]
                    T = after
                    end = k + 1
        color[p] = total + T * bg
        alpha[p] = 1 - T
        last[p] = end


@ti.kernel
def backward(
    width: int, height: int, across: int, means: F2, conics: F3, colors: F3, opacities: F, ids: I, starts: I,
    bg: V3, alpha: F, last: I, v_color: F3, v_alpha: F, v_means: F2, v_conics: F3, v_colors: F3, v_opacities: F,
):  # fmt: skip
    for p in range(width * height):
        y, x = p // width, p % width
        start = starts[y // TILE * across + x // TILE]
        center = V2(x + 0.5, y + 0.5)
        v_c = v_color[p]
        T = 1 - alpha[p]
        behind = T * (v_c.dot(bg) - v_alpha[p])  # dLoss/dT at the end, times T
        for j in range(last[p] - start):
            g = ids[last[p] - 1 - j]
            d, q = center - means[g], conics[g]
            sigma = 0.5 * (q[0] * d[0] * d[0] + q[2] * d[1] * d[1]) + q[1] * d[0] * d[1]
            if sigma >= 0 and sigma <= S_MAX:
                e = ti.exp(-sigma)
                raw = opacities[g] * e
                a = ti.min(ALPHA_MAX, raw)
                if a >= ALPHA_MIN:
                    T /= 1 - a
                    c = colors[g]
                    v_a = T * v_c.dot(c) - behind / (1 - a)
                    behind += a * T * v_c.dot(c)
                    ti.atomic_add(v_colors[g], a * T * v_c)
                    if raw <= ALPHA_MAX:
                        ti.atomic_add(v_opacities[g], e * v_a)
                        s = -raw * v_a
                        ti.atomic_add(v_conics[g], s * V3(0.5 * d[0] * d[0], d[0] * d[1], 0.5 * d[1] * d[1]))
                        ti.atomic_add(v_means[g], -s * V2(q[0] * d[0] + q[1] * d[1], q[1] * d[0] + q[2] * d[1]))


def step(r: RasterScene) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """color (H,W,3), alpha (H,W), and the gradients of means, conics, colors and opacities."""
    pixels, n = r.width * r.height, len(r.means)
    scene = r.width, r.height, -(-r.width // TILE), r.means, r.conics, r.colors, r.opacities, r.ids, r.starts
    bg = V3(*r.background.tolist())
    color, alpha, last = torch.empty(pixels, 3), torch.empty(pixels), torch.empty(pixels, dtype=torch.int32)
    grads = {"means": (n, 2), "conics": (n, 3), "colors": (n, 3), "opacities": (n,)}
    grads = {name: torch.zeros(shape) for name, shape in grads.items()}
    forward(*scene, bg, color, alpha, last)
    backward(*scene, bg, alpha, last, r.v_color.reshape(-1, 3), r.v_alpha.reshape(-1), *grads.values())
    return color.reshape(r.height, r.width, 3), alpha.reshape(r.height, r.width), grads
