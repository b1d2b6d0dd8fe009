"""The Triton kernels against their float64 twins on small cases: prints one JSON object, case -> figures.

With TRITON_INTERPRET=1 in Triton's interpreter, else on the GPU. Run by test_triton.py and benchmarks/gpu.py in a
process of its own, because the variable is read when Triton is first imported.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from handhold.kernels import (
    _triton,
    grid_torch,
    grid_triton,
    splat_torch,
    splat_triton,
    splat_triton_pose,
    ssim,
    ssim_triton,
)

torch.set_num_threads(1)
DEVICE = "cpu" if _triton.interpreted() else "cuda"
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmat", "K", "features")


def scene(n: int, sh_degree: int | None, F: int = 0, seed: int = 0) -> list[torch.Tensor]:
    """The eight float inputs, float64: a cloud 0.4 m in front of a camera with an off-centre principal point."""
    g = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    means = randn(n, 3) * torch.tensor([0.1, 0.1, 0.05]) + torch.tensor([0.0, 0.0, 0.35])
    colors = randn(n, 3).abs() if sh_degree is None else randn(n, (sh_degree + 1) ** 2, 3) * 0.4
    view = torch.eye(4, dtype=torch.float64)
    view[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0, -0.1, 0.2], [0.1, 0, 0.05], [-0.2, -0.05, 0]]))
    view[:3, 3] = torch.tensor([0.01, -0.02, 0.05])
    K = torch.tensor([[16.0, 0, 5.0], [0, 18.0, 4.5], [0, 0, 1]], dtype=torch.float64)
    scales, opacities = torch.exp(randn(n, 3) * 0.5) * 0.02, torch.sigmoid(randn(n) * 1.5 + 0.5)
    return [means, randn(n, 4), scales, opacities, colors, view, K, randn(n, F) if F else None]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|b - a| / |a|; plain |b| where a is 0."""
    size = a.double().norm().item() if a.numel() else 0.0
    return ((b.double() - a.double()).norm().item() if a.numel() else 0.0) / (size or 1.0)


def splat(inputs, width=13, height=11, sh_degree=None, ids=None, n_ids=0, kind="3d", **options) -> dict:
    """Errors of the image (largest difference) and of each gradient (relative), and how many medians differ."""
    options.setdefault("launch", splat_triton.Launch(unroll=2))  # the interpreter pays for every Gaussian it pads with
    exact = [None if t is None else t.clone().to(DEVICE).requires_grad_() for t in inputs]
    single = [None if t is None else t.detach().float().requires_grad_() for t in exact]
    ids = None if ids is None else ids.to(DEVICE)
    size = (width, height, sh_degree, ids, n_ids)
    out, alpha, median = splat_torch.rasterize(*exact[:7], *size, features=exact[7], kind=kind)
    out32, alpha32, median32 = splat_triton.rasterize(*single[:7], *size, features=single[7], kind=kind, **options)
    g = torch.Generator().manual_seed(1)
    v_out = torch.randn(out.shape, generator=g, dtype=torch.float64).to(DEVICE)
    v_alpha = torch.randn(alpha.shape, generator=g, dtype=torch.float64).to(DEVICE)
    if out.requires_grad:
        torch.autograd.backward([out, alpha], [v_out, v_alpha])
    torch.autograd.backward([out32, alpha32], [v_out.float(), v_alpha.float()])
    figures = {
        "image": (out32 - out).abs().max().item(),
        "alpha": (alpha32 - alpha).abs().max().item(),
        "medians": int((median != median32).sum()),
        "opaque": alpha.max().item(),
    }
    for name, a, b in zip(NAMES, exact, single, strict=True):
        if a is not None:
            figures[f"d {name}"] = relative(torch.zeros_like(a) if a.grad is None else a.grad, b.grad)
    return figures


def case_plain():
    return splat(scene(12, None))


def case_harmonics_and_bodies():
    return splat(scene(12, 3), sh_degree=3, ids=torch.arange(12) % 5 - 1, n_ids=3)


def case_unused_coefficients():
    inputs = scene(12, 2)
    return splat(inputs, sh_degree=1)


def case_features():
    return splat(scene(10, 1, F=3), sh_degree=1, ids=torch.arange(10) % 2, n_ids=2)


def case_many_features():
    return splat(scene(5, None, F=9), 9, 7)


def case_behind_and_across_the_near_plane():
    inputs = scene(16, None, seed=3)
    inputs[0][:, 2] = torch.linspace(-0.3, 0.3, 16)
    inputs[5] = torch.eye(4, dtype=torch.float64)
    return splat(inputs)


def case_far_outside_the_image():
    """Wide Gaussians off the side, where the Jacobian's point is clamped."""
    inputs = scene(12, None, seed=4)
    inputs[0][:, 0] += torch.where(torch.arange(12) % 2 == 0, 0.35, -0.4)
    inputs[0][:, 1] += torch.where(torch.arange(12) % 3 == 0, 0.3, -0.3)
    inputs[2] *= 6
    return splat(inputs)


def case_opacity_0_and_1():
    inputs = scene(14, None, seed=5)
    inputs[3] = (torch.arange(14) % 3 / 2).double()
    return splat(inputs)


def case_stops_when_opaque():
    inputs = scene(16, None, seed=6)
    inputs[2] *= 4
    inputs[3] = torch.full((16,), 0.97, dtype=torch.float64)
    return splat(inputs, 9, 8)


def case_needles():
    inputs = scene(12, None, seed=7)
    inputs[2] = torch.tensor([0.1, 1e-6, 1e-6], dtype=torch.float64).expand(12, 3).clone()
    return splat(inputs)


def case_disks():
    return splat(scene(12, None), kind="2d")


def case_disks_with_everything():
    return splat(scene(10, 2, F=3), sh_degree=2, ids=torch.arange(10) % 3 - 1, n_ids=2, kind="2d")


def case_disks_near_and_edge_on():
    """Some cross the near plane or are seen from the side, where the low-pass filter takes over."""
    inputs = scene(14, None, seed=9)
    inputs[0][:, 2] = torch.linspace(-0.1, 0.3, 14)
    inputs[1][::3] = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    inputs[2][::2] *= 4
    inputs[5] = torch.eye(4, dtype=torch.float64)
    return splat(inputs, kind="2d")


def case_over_many_tiles():
    """A Gaussian with more slots than are summed at once."""
    inputs = scene(3, None)
    inputs[2] = torch.tensor([0.3, 0.2, 0.25], dtype=torch.float64).expand(3, 3).clone()
    return splat(inputs, 31, 18)


def case_camera_sum():
    """The second stage of the camera's gradient, over more blocks than it takes at once."""
    partial = torch.randn(75, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out = torch.empty(32, device=DEVICE)
    splat_triton_pose.camera_sum[(1,)](partial, out, len(partial), ROWS=32)
    return {"d camera": relative(partial.double().sum(0), out)}


def case_one_pixel():
    return splat(scene(10, None), 1, 1)


def case_7x5():
    return splat(scene(10, None), 7, 5)


def case_no_gaussians():
    inputs = scene(4, None)
    return splat([t[:0] for t in inputs[:5]] + inputs[5:], 9, 7)


def case_none_in_view():
    inputs = scene(6, None)
    inputs[0][:, 2] = -1.0
    return splat(inputs, 9, 7)


def case_other_tiles():
    return splat(scene(12, None, seed=8), launch=splat_triton.Launch(tile=(16, 16), warps=4, unroll=1))


def case_capacity():
    """Room for more than enough changes nothing; too little gives NaN and no access out of bounds."""
    inputs = [t.to(DEVICE, torch.float32) for t in scene(12, None)[:7]]
    need = splat_triton.intersections(*inputs[:4], *inputs[5:], 13, 11)
    exact = splat_triton.rasterize(*inputs, 13, 11)
    roomy = splat_triton.rasterize(*inputs, 13, 11, capacity=need + 37)
    leaf = inputs[0].clone().requires_grad_()
    short = splat_triton.rasterize(leaf, *inputs[1:], 13, 11, capacity=need // 2)
    short[1].nansum().backward()
    was, splat_triton.capturing = splat_triton.capturing, lambda t: True
    captured = splat_triton.rasterize(*inputs, 13, 11)
    try:
        splat_triton.rasterize(*inputs, 12, 11)
        refused = ""
    except ValueError as e:
        refused = str(e)
    splat_triton.capturing = was
    return {
        "same": all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(exact, roomy, captured, strict=True)),
        "refused": refused,
        "nan": bool(short[0].isnan().all() and short[1].isnan().all()),
        "needed": need,
    }


def case_hostile_numbers():
    """NaN, infinite and huge Gaussians are not drawn, take no gradient, and leave the others as they are."""
    nan, inf = float("nan"), float("inf")
    wrong = [(0, v) for v in (nan, inf, -inf, 1e38)] + [(1, nan), (1, inf), (1, 0.0)]
    wrong += [(2, v) for v in (nan, inf, 1e38)] + [(3, nan), (3, -inf)]
    figures = {}
    for kind in ("3d", "2d"):
        good = [t.to(DEVICE, torch.float32) for t in scene(6, None)[:7]]
        inputs = [torch.cat([t, t[:1].expand(len(wrong), *t.shape[1:])]) for t in good[:5]] + good[5:]
        for i, (which, value) in enumerate(wrong):
            inputs[which].view(len(inputs[which]), -1)[6 + i, :: 1 if value == 0 else 5] = value
        leaves = [t.clone().requires_grad_() for t in inputs]
        out, alpha, _ = splat_triton.rasterize(*leaves, 13, 11, kind=kind)
        (out.sum() + alpha.sum()).backward()
        figures[f"image {kind}"] = (out - splat_triton.rasterize(*good, 13, 11, kind=kind)[0]).abs().max().item()
        figures[f"gradients {kind}"] = all(bool(t.grad.isfinite().all()) for t in leaves)
    return figures


def case_refusals():
    inputs = [t.to(DEVICE, torch.float32) for t in scene(4, None)[:7]]
    found = {}
    for name, call in {
        "float64": lambda: splat_triton.rasterize(inputs[0].double(), *inputs[1:], 9, 7),
        "capacity": lambda: splat_triton.rasterize(*inputs, 9, 7, capacity=0),
        "features": lambda: splat_triton.rasterize(*inputs, 9, 7, features=torch.zeros(4, 33, device=DEVICE)),
    }.items():
        try:
            call()
            found[name] = ""
        except (TypeError, ValueError) as e:
            found[name] = type(e).__name__
    return found


def case_ssim():
    found = {}
    for shape in ((3, 13, 18), (1, 1, 1), (2, 5, 7)):
        g = torch.Generator().manual_seed(0)
        exact = [torch.rand(shape, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_() for _ in range(2)]
        single = [t.detach().float().requires_grad_() for t in exact]
        value, value32 = ssim.twin(*exact), ssim_triton.ssim_mean(*single)
        (3 * value).backward(), (3 * value32).backward()
        name = "x".join(map(str, shape))
        found[f"image {name}"] = abs(value.item() - value32.item())
        for which, a, b in zip("xy", exact, single, strict=True):
            found[f"d {which} {name}"] = relative(a.grad, b.grad)
    return found


def sphere(R: int = 8):
    g = torch.Generator().manual_seed(0)
    axis, lo, h = torch.arange(R, dtype=torch.float64) * 0.03, torch.tensor([-0.1, -0.12, -0.08]).double(), 0.03
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    data = torch.rand(R, R, R, 4, generator=g, dtype=torch.float64) - 0.5
    data[..., 0] = (points - axis.mean()).norm(dim=-1) - 0.06 + 0.01 * data[..., 0]
    return data.to(DEVICE), lo.to(DEVICE), h, (lo + axis.mean()).to(DEVICE), g


def uniform(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64).to(DEVICE)


def case_grid_sample():
    data, lo, h, _, g = sphere()
    x = (uniform(g, 40, 3) * 1.4 - 0.2) * h * 7 + lo  # some outside
    f, p = data.clone().requires_grad_(), x.clone().requires_grad_()
    val, grad = grid_torch.sample(f, lo, h, p)
    v_val, v_grad = uniform(g, 40, 4) - 0.5, uniform(g, 40, 3) - 0.5
    torch.autograd.backward([val, grad], [v_val, v_grad])
    single = data.float(), lo.float(), h, x.float()
    val32, grad32 = grid_triton.sample(*single)
    v_data = torch.ones_like(single[0])  # gradients are added
    v_x = grid_triton.sample_backward(*single, v_val.float(), v_grad.float(), v_data, True)
    nothing = grid_triton.sample_backward(*single, v_val.float(), None, v_data.clone(), False)
    empty = grid_triton.sample(*single[:3], single[3][:0])
    return {
        "image val": (val32 - val).abs().max().item(),
        "image grad": (grad32 - grad).abs().max().item(),
        "d data": relative(f.grad, v_data - 1),
        "d x": relative(p.grad, v_x),
        "optional": nothing is None and len(empty[0]) == 0,
    }


def rays(centre, g, n: int = 14):
    unit = torch.nn.functional.normalize
    o = centre + unit(uniform(g, n, 3) - 0.5, dim=-1) * 0.4
    return o, unit(centre - o + (uniform(g, n, 3) - 0.5) * 0.3, dim=-1)


def case_grid_march():
    data, lo, h, centre, g = sphere()
    o, d = rays(centre, g)
    d[0] = torch.tensor([0.0, 0.0, 1.0])  # an axis the ray is parallel to
    o[1] += 10.0  # misses the cube
    exact = grid_torch.march(data, lo, h, o, d, 0.01, 0.02)
    found = grid_triton.march(data.float(), lo.float(), h, o.float(), d.float(), 0.01, 0.02)
    hit = exact[2] < 1  # a miss is marked by phi = 1e9; its interval means nothing
    figures = {"hits": int(hit.sum()), "misses": bool(torch.equal(hit, found[2] < 1))}
    for name, a, b in zip(("t0", "t1", "phi"), exact, found, strict=True):
        figures[f"image {name}"] = (a - b)[hit].abs().max().item()
    return figures


def case_grid_render():
    data, lo, h, centre, g = sphere()
    o, d = rays(centre, g)
    t0, t1, _ = grid_torch.march(data, lo, h, o, d, 0.01, 0.02)
    figures = {}
    for S in (2, 7):
        t = t0[:, None] + (t1 - t0)[:, None] * torch.linspace(0, 1, S, dtype=torch.float64, device=DEVICE)
        beta = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
        leaves = [a.clone().requires_grad_() for a in (data, o, d, beta)]
        exact = grid_torch.render(leaves[0], lo, h, leaves[1], leaves[2], t, leaves[3])
        v = [torch.randn(a.shape, generator=g, dtype=torch.float64).to(DEVICE) for a in exact]
        torch.autograd.backward(exact, v)
        single = (data.float(), lo.float(), h, o.float(), d.float(), t.float(), beta.float())
        *found, val = grid_triton.render(*single)
        v_data = torch.zeros_like(single[0])
        v_rest = grid_triton.render_backward(*single, val, *(a.float() for a in v), v_data, True)
        for name, a, b in zip(("rgb", "acc", "depth"), exact, found, strict=True):
            figures[f"image {name} {S}"] = (a - b).abs().max().item()
        for name, a, b in zip(("data", "o", "d", "beta"), leaves, (v_data, *v_rest), strict=True):
            figures[f"d {name} {S}"] = relative(a.grad, b)
    return figures


def case_grid_adam():
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(90, 4, generator=g, dtype=torch.float64).to(DEVICE) for _ in range(3)]
    exact.append(torch.zeros_like(exact[0]))
    exact[1][::3] = 0  # voxels that nothing has seen
    exact[3][::2, 0] = uniform(g, 45)
    single = [t.float() for t in exact]
    for step in (3, 4):
        gradient = exact[1].clone()
        grid_torch.adam(exact[0], gradient, exact[2], exact[3], 0.01, 0.02, 0.9, 0.99, step, 0.3)
        gradient32 = single[1].clone()
        grid_triton.adam(single[0], gradient32, single[2], single[3], 0.01, 0.02, 0.9, 0.99, step, 0.3)
    figures = {f"d {k}": relative(exact[i], single[i]) for k, i in (("data", 0), ("m", 2), ("v", 3))}
    return figures | {"optional": not bool(gradient32.any())}


CASES = {name.removeprefix("case_"): f for name, f in list(globals().items()) if name.startswith("case_")}

if __name__ == "__main__":
    results = {}
    for name in sys.argv[1:] or CASES:
        start = time.process_time()
        results[name] = CASES[name]()
        results[name]["seconds"] = round(time.process_time() - start, 2)
    print(json.dumps(results, indent=1))
