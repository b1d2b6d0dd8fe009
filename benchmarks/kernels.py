"""Compiled kernels against their torch twins: median CPU milliseconds of forward + backward on one thread.

    python benchmarks/kernels.py [--quick] [--out benchmarks/results/kernels.json]

CPU time of the process, not wall time, so that other load matters less; the two backends are interleaved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from handhold import kernels
from handhold.kernels.grid import SdfGrid
from handhold.kernels.splat import rasterize
from handhold.kernels.ssim import ssim_mean


def bumpy_sphere(n: int, px: int, backend: str) -> Callable[[], None]:
    """n surfels on a 50 mm sphere that covers about 40 % of a px x px image, SH degree 3."""
    g = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    means = d * 0.05 * (1 + 0.1 * torch.sin(6 * d[:, :1]) * torch.cos(5 * d[:, 1:2]))
    scales = torch.exp(torch.randn(n, 3, generator=g) * 0.3) * 0.025 * math.sqrt(4 * math.pi / n)
    opacities = torch.sigmoid(torch.randn(n, generator=g) + 1)
    leaves = [means, torch.randn(n, 4, generator=g), scales, opacities, torch.randn(n, 16, 3, generator=g) * 0.2]
    view = torch.eye(4)
    view[2, 3] = 0.3
    leaves = [t.requires_grad_() for t in (*leaves, view)]
    K = torch.tensor([[2.0 * px, 0, px / 2], [0, 2.0 * px, px / 2], [0, 0, 1]])

    def step():
        out, alpha, _ = rasterize(*leaves, K, px, px, sh_degree=3, backend=backend)
        torch.autograd.backward([out, alpha], [torch.ones_like(out), torch.ones_like(alpha)])

    return step


def ssim(px: int, backend: str) -> Callable[[], None]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, px, px, generator=g).requires_grad_(), torch.rand(3, px, px, generator=g)
    return lambda: ssim_mean(x, y, backend).backward()


def sphere_grid(R: int, backend: str) -> SdfGrid:
    ax = torch.linspace(-0.1, 0.1, R)
    x = torch.stack(torch.meshgrid(ax, ax, ax, indexing="ij"), -1)
    return SdfGrid(x.norm(dim=-1) - 0.06, (-0.1,) * 3, 0.2 / (R - 1), backend)


def grid_sample(backend: str) -> Callable[[], None]:
    g = torch.Generator().manual_seed(0)
    grid = sphere_grid(64, backend)
    x = torch.nn.functional.normalize(torch.randn(32768, 3, generator=g), dim=-1) * 0.06

    def step():
        val, grad = grid.sample(x)
        torch.autograd.backward([val, grad], [torch.ones_like(val), torch.ones_like(grad)])

    return step


def rays(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    o = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1) * 0.4
    return o, torch.nn.functional.normalize(torch.randn(n, 3, generator=g) * 0.03 - o, dim=-1)


def grid_render(backend: str) -> Callable[[], None]:
    grid = sphere_grid(64, backend)
    o, d = rays(2048)

    def step():
        t0, t1, _ = grid.march(o, d, 0.6 * grid.h, 5 * grid.h)
        t = t0[:, None] + (t1 - t0)[:, None] * torch.linspace(0, 1, 16)
        rgb, acc, _ = grid.render(o, d, t, grid.h)
        (rgb.abs().mean() + acc.mean()).backward()

    return step


def grid_update(backend: str) -> Callable[[], None]:
    grid = sphere_grid(64, backend)

    def step():
        grid.reg(0.1, 2e-4, 8 * grid.h)
        grid.blur(2)
        grid.adam(1e-7, 1e-7)

    return step


CASES: dict[str, Callable[[str], Callable[[], None]]] = {
    "splat forward+backward, 4k Gaussians, 128 px, SH 3": lambda b: bumpy_sphere(4000, 128, b),
    "splat forward+backward, 20k Gaussians, 256 px, SH 3": lambda b: bumpy_sphere(20000, 256, b),
    "SSIM value and gradient, 256x256x3": lambda b: ssim(256, b),
    "SDF grid value, normal and full backward, 32768 points": grid_sample,
    "SDF grid NeuS iteration, 2048 rays x 16 samples": grid_render,
    "SDF grid regularise + blur + Adam, 64^3": grid_update,
}


def measure(steps: dict[str, Callable[[], None]], repeats: dict[str, int]) -> dict[str, float]:
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {b: [] for b in steps}
    for i in range(max(repeats.values())):
        for backend, step in steps.items():
            if i < repeats[backend]:
                start = time.process_time()
                step()
                times[backend].append(1e3 * (time.process_time() - start))
    return {b: statistics.median(t) for b, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    args = parser.parse_args()
    if not kernels.available():
        raise SystemExit(f"Nothing to compare: {kernels.why_unavailable()}.")
    torch.set_num_threads(1)
    repeats = {"cpu": 5 if args.quick else 15, "torch": 1 if args.quick else 3}
    rows = {}
    for name, make in CASES.items():
        ms = measure({b: make(b) for b in repeats}, repeats)
        rows[name] = {
            "cpu_ms": round(ms["cpu"], 2),
            "torch_ms": round(ms["torch"], 1),
            "ratio": round(ms["torch"] / ms["cpu"], 1),
        }
        print(
            f"{name:58s} compiled {ms['cpu']:8.2f} ms   torch {ms['torch']:9.1f} ms   {ms['torch'] / ms['cpu']:6.1f}x",
            flush=True,
        )
    result = {
        "what": "median CPU milliseconds, one thread, forward + backward",
        "isa": kernels.info()["isa"],
        "torch": torch.__version__,
        "cases": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=args.out.parent)
    with os.fdopen(fd, "w") as f:
        f.write(json.dumps(result, indent=2) + "\n")
    os.replace(tmp, args.out)


if __name__ == "__main__":
    main()
