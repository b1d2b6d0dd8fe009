"""The raster stage in Warp on its CPU device, which has one thread: the same algorithm as `taichi_raster.py`."""

import torch
import warp as wp
from scenes import ALPHA_MAX, ALPHA_MIN, STOP, TILE, RasterScene
from torch import Tensor

wp.config.quiet = True
wp.init()

A_MAX, A_MIN, T_STOP = (wp.constant(wp.float32(v)) for v in (ALPHA_MAX, ALPHA_MIN, STOP))
SIZE = wp.constant(TILE)
S_MAX = wp.constant(wp.float32(5.5413))  # ln 255: no exponential where alpha would be under 1/255 at any opacity


@wp.func
def distance(d: wp.vec2, q: wp.vec3) -> float:
    return 0.5 * (q[0] * d[0] * d[0] + q[2] * d[1] * d[1]) + q[1] * d[0] * d[1]


@wp.kernel(enable_backward=False)
def forward(
    width: int,
    across: int,
    means: wp.array(dtype=wp.vec2),
    conics: wp.array(dtype=wp.vec3),
    colors: wp.array(dtype=wp.vec3),
    opacities: wp.array(dtype=float),
    ids: wp.array(dtype=int),
    starts: wp.array(dtype=int),
    bg: wp.vec3,
    color: wp.array(dtype=wp.vec3),
    alpha: wp.array(dtype=float),
    last: wp.array(dtype=int),
):
    p = wp.tid()
    y, x = p // width, p % width
    tile = y // SIZE * across + x // SIZE
    center = wp.vec2(float(x) + 0.5, float(y) + 0.5)
    T = wp.float32(1.0)
    total = wp.vec3(0.0, 0.0, 0.0)
    end = wp.int32(starts[tile])
    for k in range(starts[tile], starts[tile + 1]):
        g = ids[k]
        sigma = distance(center - means[g], conics[g])
        if sigma >= 0.0 and sigma <= S_MAX:
            a = wp.min(A_MAX, opacities[g] * wp.exp(-sigma))
            if a >= A_MIN:
                after = T * (1.0 - a)
                if after <= T_STOP:
                    break
                total += a * T * colors[g]
                T = after
                end = k + 1
    color[p] = total + T * bg
    alpha[p] = 1.0 - T
    last[p] = end


@wp.kernel(enable_backward=False)
def backward(
    width: int,
    across: int,
    means: wp.array(dtype=wp.vec2),
    conics: wp.array(dtype=wp.vec3),
    colors: wp.array(dtype=wp.vec3),
    opacities: wp.array(dtype=float),
    ids: wp.array(dtype=int),
    starts: wp.array(dtype=int),
    bg: wp.vec3,
    alpha: wp.array(dtype=float),
    last: wp.array(dtype=int),
    v_color: wp.array(dtype=wp.vec3),
    v_alpha: wp.array(dtype=float),
    v_means: wp.array(dtype=wp.vec2),
    v_conics: wp.array(dtype=wp.vec3),
    v_colors: wp.array(dtype=wp.vec3),
    v_opacities: wp.array(dtype=float),
):
    p = wp.tid()
    y, x = p // width, p % width
    start = starts[y // SIZE * across + x // SIZE]
    center = wp.vec2(float(x) + 0.5, float(y) + 0.5)
    v_c = v_color[p]
    T = 1.0 - alpha[p]
    behind = T * (wp.dot(v_c, bg) - v_alpha[p])  # dLoss/dT at the end, times T
    k = last[p] - 1
    while k >= start:
        g = ids[k]
        d = center - means[g]
        q = conics[g]
        sigma = distance(d, q)
        if sigma >= 0.0 and sigma <= S_MAX:
            e = wp.exp(-sigma)
            raw = opacities[g] * e
            a = wp.min(A_MAX, raw)
            if a >= A_MIN:
                T = T / (1.0 - a)
                f = T * wp.dot(v_c, colors[g])
                v_a = f - behind / (1.0 - a)
                behind += a * f
                wp.atomic_add(v_colors, g, a * T * v_c)
                if raw <= A_MAX:
                    wp.atomic_add(v_opacities, g, e * v_a)
                    s = -raw * v_a
                    wp.atomic_add(v_conics, g, s * wp.vec3(0.5 * d[0] * d[0], d[0] * d[1], 0.5 * d[1] * d[1]))
                    wp.atomic_add(v_means, g, -s * wp.vec2(q[0] * d[0] + q[1] * d[1], q[1] * d[0] + q[2] * d[1]))
        k -= 1


def step(r: RasterScene) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """color (H,W,3), alpha (H,W), and the gradients of means, conics, colors and opacities."""
    pixels, n = r.width * r.height, len(r.means)
    color, alpha, last = torch.empty(pixels, 3), torch.empty(pixels), torch.empty(pixels, dtype=torch.int32)
    grads = {"means": (n, 2), "conics": (n, 3), "colors": (n, 3), "opacities": (n,)}
    grads = {name: torch.zeros(shape) for name, shape in grads.items()}
    scene = [
        r.width, -(-r.width // TILE), _of(r.means), _of(r.conics), _of(r.colors), _of(r.opacities), _of(r.ids),
        _of(r.starts), wp.vec3(*r.background.tolist()),
    ]  # fmt: skip
    wp.launch(forward, dim=pixels, inputs=[*scene, _of(color), _of(alpha), _of(last)], device="cpu")
    v = [_of(r.v_color.reshape(-1, 3)), _of(r.v_alpha.reshape(-1)), *map(_of, grads.values())]
    wp.launch(backward, dim=pixels, inputs=[*scene, _of(alpha), _of(last), *v], device="cpu")
    return color.reshape(r.height, r.width, 3), alpha.reshape(r.height, r.width), grads


def _of(t: Tensor):
    return wp.from_torch(t, dtype={2: wp.vec2, 3: wp.vec3}[t.shape[1]] if t.ndim == 2 else None)
