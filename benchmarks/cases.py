"""What `render.py` compares: one function per case, which makes its inputs and returns ours and the peers as steps.

To add a case: write a function of `quick` that returns a `measure.Case`, and name it in CASES. A step does the whole
work that is timed and returns what it made; results of a peer that share a name with ours are compared before the
peer is timed. `peers.load` gives a module of benchmarks/peers, or a str that says why it is absent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import peers
import scenes
import torch
from measure import Case, Outputs, Peer
from peers import dense_torch, hold_mlp, ssim_torch, trilinear_torch
from scenes import SplatScene
from torch import Tensor

from handhold.kernels.grid import SdfGrid
from handhold.kernels.ssim import ssim_mean
from handhold.render import splat

DENSE_PAIRS = 50e6  # pixels x Gaussians of all tiles that dense torch may hold: about 4 GB with what backward keeps


# --- Gaussian splatting ---


def render_splat(s: SplatScene, backend: str | None = None) -> tuple[Tensor, Tensor]:
    shape = [s.leaves[name] for name in ("means", "quats", "scales", "opacities", "sh")]
    view, K, background = s.leaves["viewmat"][None], s.K[None], s.background[None]
    r = splat(*shape, view, K, s.width, s.height, sh_degree=3, backgrounds=background, backend=backend)
    return r.color[0], r.alpha[0, ..., 0]


def splat_step(s: SplatScene, render: Callable[[SplatScene], tuple[Tensor, Tensor]] = render_splat) -> Outputs:
    """Forward, and backward to all six leaves, the camera included."""
    for t in s.leaves.values():
        t.grad = None
    color, alpha = render(s)
    torch.autograd.backward([color, alpha], [s.v_color, s.v_alpha])
    return {"color": color, "alpha": alpha} | {f"grad {name}": t.grad for name, t in s.leaves.items()}


def raster_check(s: SplatScene, step: Callable) -> Outputs:
    """The gradients of a raster stage carried on to the leaves by torch, so that they can be compared."""
    for t in s.leaves.values():
        t.grad = None
    projected = scenes.project(s)
    color, alpha, grads = step(scenes.raster_scene(s, projected))
    torch.autograd.backward([projected[name] for name in grads], list(grads.values()))
    return {"color": color, "alpha": alpha} | {f"grad {name}": t.grad for name, t in s.leaves.items()}


def splat_case(quick: bool, n: int = 20_000, px: int = 256, bars: bool = True, twin: bool = True) -> Case:
    s = scenes.bumpy_sphere(*((300, 32) if quick else (n, px)))
    raster = scenes.raster_scene(s)
    found: dict[str, Peer | str] = {}
    tuned = {"dense torch, per tile": dense_torch.render}
    if twin:
        tuned["handhold's torch path"] = partial(render_splat, backend="torch")
    for name, render in tuned.items():
        too_big = len(raster.ids) * scenes.TILE**2 > DENSE_PAIRS
        asked = 25 if bars and render is dense_torch.render else None
        found[name] = Peer("not run (memory)" if too_big else partial(splat_step, s, render), asked)
    module = peers.load("gsplat_torch")
    name = f"{peers.title('gsplat_torch')}: its torch maths, CPU glue"
    step = module if isinstance(module, str) else partial(splat_step, s, module.render)
    found[name] = Peer(step, 15 if bars else None)
    for key in ("taichi_raster", "warp_raster"):
        module = peers.load(key)
        name = f"{peers.title(key)}: raster stage alone"
        if isinstance(module, str):
            found[name] = Peer(module, 4 if bars else None)
        else:
            step, check = partial(_raster_step, raster, module.step), partial(raster_check, s, module.step)
            found[name] = Peer(step, 4 if bars else None, check)
    return Case(
        f"splat forward+backward, {len(s.leaves['means'])} Gaussians, {s.width} px, SH 3",
        partial(splat_step, s), found,
        note="ours is the whole call, projection and binning included, against every peer",
    )  # fmt: skip


def _raster_step(r: scenes.RasterScene, step: Callable) -> Outputs:
    color, alpha, grads = step(r)
    return {"color": color, "alpha": alpha} | {f"grad 2D {name}": g for name, g in grads.items()}


# --- SDF grid ---


def sphere_grid(R: int, backend: str | None = None) -> SdfGrid:
    """A sphere of 60 mm with random colours, in a cube of 200 mm."""
    ax = torch.linspace(-0.1, 0.1, R)
    x = torch.stack(torch.meshgrid(ax, ax, ax, indexing="ij"), -1)
    raw = torch.randn(R, R, R, 3, generator=torch.Generator().manual_seed(0))
    return SdfGrid(torch.cat([x.norm(dim=-1, keepdim=True) - 0.06, raw], -1), (-0.1,) * 3, 0.2 / (R - 1), backend)


def grid_case(quick: bool, pose: bool = False) -> Case:
    """Value, normal and colours near the surface, and the backward of all of them; with pose, to the points as well."""
    g = torch.Generator().manual_seed(1)
    grid, n = sphere_grid(16 if quick else 64), 256 if quick else 32768
    x = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1) * 0.06
    x.requires_grad_(pose)
    v_value, v_normal = torch.randn(n, 4, generator=g), torch.randn(n, 3, generator=g)
    data, points = grid.data.clone().requires_grad_(), x.detach().clone().requires_grad_()
    leaves = {"grad grid": data} | ({"grad points": points} if pose else {})

    def ours() -> Outputs:  # adds to grid.grad, which Adam clears: before any second call it is that of one
        x.grad = None
        value, normal = grid.sample(x)
        torch.autograd.backward([value, normal], [v_value, v_normal])
        return {"value": value, "normal": normal, "grad grid": grid.grad} | ({"grad points": x.grad} if pose else {})

    def torch_step() -> Outputs:
        value, normal = trilinear_torch.value_and_normal(data, grid.lo, grid.h, points)
        grads = torch.autograd.grad([value, normal], list(leaves.values()), [v_value, v_normal])
        return {"value": value, "normal": normal} | dict(zip(leaves, grads, strict=True))

    return Case(
        f"SDF grid value, normal and colours, forward+backward{' with points' if pose else ''}, {n} points",
        ours, {"torch index-trilinear, double backward": Peer(torch_step, 25)},
    )  # fmt: skip


def rays(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rays from around towards the sphere, about a third of which miss it; target colours (n,3) and mask (n,)."""
    g = torch.Generator().manual_seed(2)
    o = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1) * 0.4
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=g) * 0.03 - o, dim=-1)
    miss = torch.linalg.cross(o, d).norm(dim=-1)
    return o, d, torch.rand(n, 3, generator=g), (miss < 0.06).float()


def volume_step(grid: SdfGrid, batch: tuple[Tensor, ...], samples: int, update: bool) -> Outputs:
    """March to the band, NeuS rendering of samples in it, L1 colour and mask entropy, backward; with update the rest
    of an iteration of `shapes.sdf`: regularisers, blur, Adam."""
    o, d, target, mask = batch
    beta = grid.h
    t0, t1, _ = grid.march(o, d, 0.6 * grid.h, 5 * beta)
    t = t0[:, None] + (t1 - t0)[:, None] * torch.linspace(0, 1, samples)
    color, acc, _ = grid.render(o, d, t, beta)
    loss = (color - target).abs().mean()
    loss = loss + 0.1 * torch.nn.functional.binary_cross_entropy(acc.clamp(1e-4, 1 - 1e-4), mask)
    loss.backward()
    if update:
        grid.reg(0.1, 2e-4, 8 * grid.h)
        grid.blur(2)
        grid.adam(1e-7, 1e-7)
    # Before any second call the gradient is that of one.
    return {"color": color, "acc": acc} | ({"grid": grid.data} if update else {"grad grid": grid.grad})


def iteration_case(quick: bool, update: bool = False) -> Case:
    n, R = (64, 16) if quick else (2048, 64)
    batch, grid, twin = rays(n), sphere_grid(R), sphere_grid(R, "torch")
    found: dict[str, Peer | str] = {"handhold's torch path": Peer(partial(volume_step, twin, batch, 16, update))}
    what = "march, render, loss, backward" + (f", regularisers, blur, Adam at {R}^3" if update else "")
    return Case(
        f"SDF iteration ({what}), {n} rays x 16 samples in the band",
        partial(volume_step, grid, batch, 16, update), found, at_most_ms=None if update else 8,
    )  # fmt: skip


def hold_case(quick: bool) -> Case:
    """Our iteration against the one that HOLD's networks would take."""
    n, R, rays_mlp, samples = (64, 16, 4, 8) if quick else (2048, 64, 512, 64)
    batch, grid, iteration = rays(n), sphere_grid(R), hold_mlp.make(rays_mlp, samples)
    mlp = Peer(lambda: {"loss": iteration()}, 100, comparable=False)
    return Case(
        f"SDF iteration, whole ({n} rays x 16) against HOLD's 8x256 + 4x256 networks ({rays_mlp} rays x {samples})",
        partial(volume_step, grid, batch, 16, True), {"HOLD's networks in torch": mlp},
        rounds=1 if quick else 2, slow_ms=60e3,
        note="two models of one task: nothing to compare but the time of an iteration",
    )  # fmt: skip


# --- images ---


def ssim_case(quick: bool) -> Case:
    px = 32 if quick else 256
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(3, px, px, generator=g).requires_grad_(), torch.rand(3, px, px, generator=g)
    w = ssim_torch.window(3)

    def step(value: Callable[[], Tensor]) -> Outputs:
        x.grad = None
        mean = value()
        mean.backward()
        return {"mean": mean, "grad x": x.grad}

    return Case(
        f"SSIM forward+backward, {px}x{px}x3",
        partial(step, lambda: ssim_mean(x, y)),
        {
            "torch conv2d, 11x11 window": Peer(partial(step, lambda: ssim_torch.ssim(x, y, w)), 8),
            "torch conv2d, separable": Peer(partial(step, lambda: ssim_torch.ssim_separable(x, y, w))),
            "handhold's torch path": Peer(partial(step, lambda: ssim_mean(x, y, "torch"))),
        },
    )


CASES: dict[str, Callable[[bool], Case]] = {
    "splat": splat_case,
    "grid": grid_case,
    "grid_points": partial(grid_case, pose=True),
    "iteration": iteration_case,
    "iteration_whole": partial(iteration_case, update=True),
    "hold": hold_case,
    "ssim": ssim_case,
}
