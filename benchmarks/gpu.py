"""The Triton kernels on one NVIDIA GPU: against float64, against gsplat 1.5.3, eager and in CUDA graphs.

    PYTHONPATH=src python benchmarks/gpu.py [--gsplat gsplat-1.5.3-py3-none-any.whl ...] [--quick]

One command, within 8 minutes and without the internet: gsplat is installed from the wheels named (it and whatever of
ninja, jaxtyping and rich is missing) and built by nvcc while the other checks run. Times are medians of CUDA events, in
ms; all steps of one row are interleaved. Writes benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from torch import Tensor

from handhold.kernels import _triton

BUILD_SECONDS, CASES_SECONDS = 240, 180
SMALL_CASES = Path(__file__).parents[1] / "tests" / "kernels" / "triton_cases.py"
LEAST, GOAL = 0.67, 1.0  # gsplat's time over ours, forward and backward
Step = Callable[[], object]


def bumpy_sphere(n: int, width: int, height: int, dtype=torch.float32, device="cuda"):
    """n surfels on a 50 mm sphere, 40 % of a square image, SH degree 3: seven leaves; gradients of out and alpha."""
    g = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    means = d * 0.05 * (1 + 0.1 * torch.sin(6 * d[:, :1]) * torch.cos(5 * d[:, 1:2]))
    scales = torch.exp(torch.randn(n, 3, generator=g) * 0.3) * 0.025 * math.sqrt(4 * math.pi / n)
    opacities = torch.sigmoid(torch.randn(n, generator=g) + 1)
    view = torch.eye(4)
    view[2, 3] = 0.3
    focal = 2.0 * min(width, height)
    K = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    harmonics = 0.2 * torch.randn(n, 16, 3, generator=g)
    leaves = [means, torch.randn(n, 4, generator=g), scales, opacities, harmonics, view, K]
    v = [torch.randn(height, width, 4, generator=g), torch.randn(height, width, generator=g)]
    return [t.to(device, dtype).requires_grad_() for t in leaves], [t.to(device, dtype) for t in v]


# ---------------------------------------------------------------- timing


def interleaved(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Median ms of each step by CUDA events, after three rounds of warming up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(repeats + 3):
        for name, step in steps.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: round(statistics.median(t), 4) for name, t in times.items()}


def graphed(step: Step) -> Step:
    """The step captured in a CUDA graph; calling it replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    return lambda: (graph.replay(), kept)


def peak_mb(step: Step) -> float:
    """Most memory that a step holds beyond what was there before, MB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


# ---------------------------------------------------------------- splatting


def triton_steps(n: int, width: int, height: int, **options) -> dict[str, Step]:
    from handhold.kernels import splat_triton

    leaves, v = bumpy_sphere(n, width, height)
    plain = [t.detach() for t in leaves]

    def forward():
        return splat_triton.rasterize(*plain, width, height, 3, **options)

    def both():
        out, alpha, _ = splat_triton.rasterize(*leaves, width, height, 3, **options)
        return torch.autograd.grad([out, alpha], leaves, v)

    return {"forward": forward, "both": both}


def public_steps(n: int, width: int, height: int) -> dict[str, Step]:
    """The same through `handhold.render.splat`, the call for gsplat's `rasterization`; the mean depth."""
    from handhold.render import splat

    leaves, v = bumpy_sphere(n, width, height)

    def render(means, quats, scales, opacities, colors, view, K):
        r = splat(means, quats, scales, opacities, colors, view[None], K[None], width, height, 3)
        return torch.cat([r.color, r.depth], -1)[0], r.alpha[0, ..., 0]

    plain = [t.detach() for t in leaves]
    return {
        "forward": lambda: render(*plain),
        "both": lambda: torch.autograd.grad(render(*leaves), leaves, v),
    }


def gsplat_steps(n: int, width: int, height: int, depth: str = "D") -> dict[str, Step]:
    """The same through gsplat: colour and depth (D summed, ED mean), gradients to all but K, which it has none for."""
    from gsplat import rasterization

    leaves, v = bumpy_sphere(n, width, height)
    leaves = leaves[:6]
    K = bumpy_sphere(1, width, height)[0][6].detach()[None]

    def render(means, quats, scales, opacities, colors, view):
        out, alpha, _ = rasterization(
            means, quats, scales, opacities, colors, view[None], K, width, height,
            sh_degree=3, packed=False, render_mode=f"RGB+{depth}", near_plane=0.01,
        )  # fmt: skip
        return out[0], alpha[0, ..., 0]

    plain = [t.detach() for t in leaves]
    return {
        "forward": lambda: render(*plain),
        "both": lambda: torch.autograd.grad(render(*leaves), leaves, v),
    }


def relative(exact: Tensor, found: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def accuracy(n: int, px: int, kind: str = "3d", device="cuda") -> dict:
    """Largest differences to the float64 twin; pixels beyond 1e-4 are those where a threshold fell the other way."""
    from handhold.kernels import splat_torch, splat_triton

    exact, v = bumpy_sphere(n, px, px, torch.float64, device)
    single = [t.detach().float().requires_grad_() for t in exact]
    out, alpha, median = splat_torch.rasterize(*exact, px, px, 3, kind=kind)
    runs = []
    for _ in range(2):
        out32, alpha32, median32 = splat_triton.rasterize(*single, px, px, 3, kind=kind)
        runs.append((out32, alpha32, *torch.autograd.grad([out32, alpha32], single, [t.float() for t in v])))
    grads = torch.autograd.grad([out, alpha], exact, v)
    off = (runs[0][0].double() - out).abs().amax(-1)
    names = ("means", "quats", "scales", "opacities", "colors", "viewmat", "K")
    return {
        "image_max": off.max().item(),
        "pixels_beyond_1e-4": int((off > 1e-4).sum()),
        "alpha_max": (runs[0][1].double() - alpha).abs().max().item(),
        "medians_differing": int((median != median32).sum()),
        "gradients_relative": {name: relative(a, b) for name, a, b in zip(names, grads, runs[0][2:], strict=True)},
        "two_runs_identical": all(torch.equal(a, b) for a, b in zip(*runs, strict=True)),
    }


def agreement(n: int, px: int) -> dict:
    """Our images against gsplat's, both float32."""
    ours, theirs = triton_steps(n, px, px)["forward"](), gsplat_steps(n, px, px)["forward"]()
    off = (ours[0] - theirs[0]).abs().amax(-1)
    return {"image_max": off.max().item(), "pixels_beyond_1e-3": int((off > 1e-3).sum())}


def splat_row(n: int, width: int, height: int, repeats: int, peer: bool, kind: str = "3d") -> dict:
    from handhold.kernels import splat_triton

    leaves, _ = bumpy_sphere(n, width, height)
    plain = [t.detach() for t in leaves]
    pairs = splat_triton.intersections(*plain[:4], *plain[5:], width, height, kind)
    eager = triton_steps(n, width, height, kind=kind)
    fixed = triton_steps(n, width, height, kind=kind, capacity=int(1.25 * pairs) + 1024)
    theirs = gsplat_steps(n, width, height) if peer else {}
    theirs_mean = gsplat_steps(n, width, height, "ED") if peer else {}
    public = public_steps(n, width, height) if kind == "3d" else {}
    row: dict = {"gaussians": n, "width": width, "height": height, "pairs": pairs}
    for what in ("forward", "both"):
        steps = {"eager": eager[what], "graphed": graphed(fixed[what])}
        steps |= {"public": public[what]} if public else {}
        steps |= {"gsplat": theirs[what], "gsplat_mean": theirs_mean[what]} if peer else {}
        ms = interleaved(steps, repeats)
        if peer:
            against = {"eager": "gsplat", "graphed": "gsplat"} | ({"public": "gsplat_mean"} if public else {})
            ms |= {f"{name}_speedup": round(ms[other] / ms[name], 2) for name, other in against.items()}
        row[what] = ms
    row["peak_mb"] = peak_mb(eager["both"])
    if peer:
        row["peak_mb_gsplat"] = peak_mb(theirs["both"])
    return row


def small_cases() -> dict:
    """Every kernel on the tests' small scenes (2D, bodies, features, march, render, Adam, ...) against float64.

    In a process of its own: a kernel that reads out of bounds ends that one alone.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SMALL_CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CASES_SECONDS)
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    found, wrong = json.loads(done.stdout), {}
    for name, figures in found.items():
        limits = {k: 1e-3 if k.startswith("d ") else 1e-4 for k in figures if k.startswith(("d ", "image", "alpha"))}
        over = {k: figures[k] for k, most in limits.items() if not figures[k] <= most}
        wrong |= {name: over} if over else {}
    return {"cases": len(found), "wrong": wrong, "figures": found}


def bars(result: dict) -> list[dict]:
    """The demands on forward and backward: at least 0.67 times gsplat's speed, 1 as the goal. None: not measured."""
    found = []
    for name, ms in ((k, row.get("both", {})) for k, row in result.items() if k.startswith("splat ") and "2D" not in k):
        for how in ("eager", "graphed", "public"):
            for what, least in (("now", LEAST), ("goal", GOAL)):
                found.append(measure.bar(f"{name}, {how}, {what}", ms.get(f"{how}_speedup"), least=least))
    return found


def launches(n: int, px: int, repeats: int) -> list[dict]:
    """Ways to cut up the pixels: which one is fastest is a matter of the device."""
    from handhold.kernels.splat_triton import Launch, intersections

    leaves, _ = bumpy_sphere(n, px, px)
    plain = [t.detach() for t in leaves]
    rows = []
    for tile, warps, unroll in (
        ((8, 8), 1, 1), ((8, 8), 1, 2), ((8, 8), 1, 4), ((8, 8), 1, 8), ((8, 8), 2, 4),
        ((16, 8), 1, 4), ((16, 8), 2, 4), ((16, 16), 4, 4), ((16, 16), 8, 4),
    ):  # fmt: skip
        launch = Launch(tile, warps, unroll)
        pairs = intersections(*plain[:4], *plain[5:], px, px, launch=launch)
        steps = triton_steps(n, px, px, capacity=pairs, launch=launch)
        ms = interleaved({what: graphed(step) for what, step in steps.items()}, repeats)
        rows.append({"tile": tile, "warps": warps, "unroll": unroll, "pairs": pairs, **ms})
    return rows


def profile(step: Step) -> list[dict] | str:
    """Microseconds of each kernel of one step, dearest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    try:
        step()
        with record(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(5):
                step()
            torch.cuda.synchronize()
        found = [(e.key[:60], getattr(e, "device_time_total", 0) / 5) for e in p.key_averages()]
    except RuntimeError as e:  # some machines do not let the profiler at the counters
        return f"not available: {e}"
    return [{"kernel": k, "us": round(us, 1)} for k, us in sorted(found, key=lambda x: -x[1])[:20] if us > 0]


# ---------------------------------------------------------------- grid and SSIM


def sphere_grid(R: int, dtype=torch.float32, device="cuda") -> tuple[Tensor, Tensor, float]:
    axis = torch.linspace(-0.1, 0.1, R, dtype=dtype, device=device)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    g = torch.Generator().manual_seed(0)
    color = torch.randn(R, R, R, 3, generator=g).to(device, dtype)
    return torch.cat([x.norm(dim=-1, keepdim=True) - 0.06, color], -1), axis[0].expand(3).clone(), 0.2 / (R - 1)


def grid_case(repeats: int) -> dict:
    """Value, normal and their full backward pass at 32,768 points; march + render + backward of 2048 rays x 16."""
    from handhold.kernels import grid_torch, grid_triton

    data, lo, h = sphere_grid(64)
    g = torch.Generator().manual_seed(0)
    x = (torch.nn.functional.normalize(torch.randn(32768, 3, generator=g), dim=-1) * 0.06).cuda()
    v_val, v_grad = torch.randn(32768, 4, generator=g).cuda(), torch.randn(32768, 3, generator=g).cuda()
    o = torch.nn.functional.normalize(torch.randn(2048, 3, generator=g), dim=-1) * 0.4
    d = torch.nn.functional.normalize(torch.randn(2048, 3, generator=g) * 0.03 - o, dim=-1).cuda()
    o, at, beta, total = o.cuda(), torch.linspace(0, 1, 16).cuda(), torch.tensor(h).cuda(), torch.zeros_like(data)

    def sample_triton():
        val, grad = grid_triton.sample(data, lo, h, x)
        return val, grad, grid_triton.sample_backward(data, lo, h, x, v_val, v_grad, total, True)

    def sample_torch(dtype=torch.float32):
        f, p = (t.to(dtype).requires_grad_() for t in (data.detach(), x.detach()))
        val, grad = grid_torch.sample(f, lo.to(dtype), h, p)
        return val, grad, *torch.autograd.grad([val, grad], [f, p], [v_val.to(dtype), v_grad.to(dtype)])

    def render_triton():
        t0, t1, _ = grid_triton.march(data, lo, h, o, d, 0.6 * h, 5 * h)
        t = t0[:, None] + (t1 - t0)[:, None] * at
        *out, val = grid_triton.render(data, lo, h, o, d, t, beta)
        return grid_triton.render_backward(data, lo, h, o, d, t, beta, val, *out, total, True)

    def render_torch():
        t0, t1, _ = grid_torch.march(data, lo, h, o, d, 0.6 * h, 5 * h)
        leaves = [a.detach().requires_grad_() for a in (data, o, d, beta)]
        t = t0[:, None] + (t1 - t0)[:, None] * at
        out = grid_torch.render(leaves[0], lo, h, leaves[1], leaves[2], t, leaves[3])
        return torch.autograd.grad(out, leaves, [a.detach() for a in out])

    val, grad, f_grad, p_grad = sample_torch(torch.float64)
    total.zero_()
    found = sample_triton()
    errors = {
        "value": (found[0].double() - val).abs().max().item(),
        "normal": (found[1].double() - grad).abs().max().item(),
        "d_grid": relative(f_grad, total),
        "d_points": relative(p_grad, found[2]),
    }
    steps = {"triton": sample_triton, "triton_graphed": graphed(sample_triton), "torch": sample_torch}
    sample = interleaved(steps, repeats)
    steps = {"triton": render_triton, "triton_graphed": graphed(render_triton), "torch": render_torch}
    return {"errors": errors, "sample_32768": sample, "march_render_2048x16": interleaved(steps, max(5, repeats // 3))}


def ssim_case(repeats: int) -> dict:
    from handhold.kernels import ssim, ssim_triton

    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 480, 640, generator=g).cuda().requires_grad_()
    y = torch.rand(3, 480, 640, generator=g).cuda()
    exact = x.detach().double().requires_grad_()
    value = ssim.twin(exact, y.double())
    (gradient,) = torch.autograd.grad(value, exact)
    found, v_x = ssim_triton.value_and_gradient(x.detach(), y)
    steps = {
        "triton": lambda: ssim_triton.value_and_gradient(x.detach(), y),
        "torch": lambda: torch.autograd.grad(ssim.twin(x, y), x),
    }
    steps["triton_graphed"] = graphed(steps["triton"])
    errors = {"value": abs(found.item() - value.item()), "d_image": relative(gradient, v_x)}
    return {"errors": errors, "640x480x3": interleaved(steps, repeats)}


# ---------------------------------------------------------------- gsplat


def start_gsplat(wheels: list[Path], folder: Path) -> subprocess.Popen:
    """Unpacks the wheels and begins to build gsplat's extension, in the background."""
    # pip and not zipfile: ninja's program must be executable, and be found by torch on PATH.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*install, *map(str, wheels)], check=True)
    os.environ["PATH"] = os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)])
    major, minor = torch.cuda.get_device_capability()
    os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder / "build")
    os.environ["MAX_JOBS"] = str(os.cpu_count() or 4)
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    sys.path.insert(0, str(folder))
    code = "import gsplat.cuda._backend as b; assert b._C is not None, 'nvcc was not found'"
    log = (folder / "build.log").open("w")
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )  # its nvcc processes are stopped with it


def kill_group(process: subprocess.Popen) -> None:
    """Ends a process and all that it started, if it still runs; it must have been started with start_new_session."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish_gsplat(build: subprocess.Popen, folder: Path, began: float) -> dict:
    try:
        code = build.wait(timeout=max(1, BUILD_SECONDS - (time.monotonic() - began)))
    except subprocess.TimeoutExpired:
        kill_group(build)
        return {"built": False, "why": f"not built within {BUILD_SECONDS} s"}
    seconds = round(time.monotonic() - began)
    if code:
        return {"built": False, "why": (folder / "build.log").read_text()[-800:], "seconds": seconds}
    return {"built": True, "seconds": seconds}


# ---------------------------------------------------------------- all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--gsplat", type=Path, nargs="*", default=[], help="wheels: gsplat 1.5.3 and what it needs")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and sizes")
    args = parser.parse_args()
    if not _triton.available():
        raise SystemExit(f"Nothing to measure: {_triton.why_unavailable()}.")
    if missing := [str(p) for p in args.gsplat if not p.is_file()]:
        raise SystemExit(f"No such wheel: {', '.join(missing)}; give the path of gsplat-1.5.3-py3-none-any.whl.")
    import triton

    repeats = 10 if args.quick else 40
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, began = Path(name), time.monotonic()
        build = start_gsplat(args.gsplat, folder) if args.gsplat else None
        if build:
            stack.callback(kill_group, build)
        result: dict = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "what": "median ms by CUDA events; both: forward and backward; SH 3, colour, depth, alpha, median",
        }

        def keep(key: str, make: Callable[[], object]) -> None:
            """A part that fails says so in the results and does not take the others along."""
            start = time.monotonic()
            try:
                result[key] = make()
            except Exception as e:
                result[key] = {"failed": f"{type(e).__name__}: {e}"[:600]}
            print(f"{key} ({time.monotonic() - start:.0f} s): {json.dumps(result[key])[:600]}", flush=True)
            measure.write(args.out, result)

        keep("small_cases", small_cases)
        sizes = ((2000, 96, "3d"), (2000, 96, "2d"), (20000, 256, "3d"))
        keep("accuracy", lambda: {f"{n}@{px} {kind}": accuracy(n, px, kind) for n, px, kind in sizes})
        peer = False
        if build:
            keep("gsplat", lambda: finish_gsplat(build, folder, began))
            peer = bool(result["gsplat"].get("built"))
        if peer:
            keep("agreement_with_gsplat", lambda: agreement(20000, 256))
        for n in (5_000, 20_000) if args.quick else (5_000, 20_000, 50_000, 200_000):
            for px in (256, 512):
                keep(f"splat {n}@{px}", lambda n=n, px=px: splat_row(n, px, px, repeats, peer))

        def frames() -> dict:
            row = splat_row(30_000, 640, 480, repeats, peer)
            names = [k for k in ("eager", "graphed", "public", "gsplat") if k in row["forward"]]
            return row | {"images_per_second": {k: round(1e3 / row["forward"][k]) for k in names}}

        keep("splat 30000@640x480", frames)
        keep("splat 2D 50000@512", lambda: splat_row(50_000, 512, 512, repeats, False, "2d"))
        keep("ssim", lambda: ssim_case(repeats))
        keep("grid", lambda: grid_case(repeats))
        keep("launches 50000@512", lambda: launches(50_000, 512, max(5, repeats // 4)))
        keep("kernels 50000@512", lambda: profile(triton_steps(50_000, 512, 512)["both"]))
        result["bars"] = bars(result)
        result["seconds"] = round(time.monotonic() - began)
        measure.write(args.out, result)
    print(f"{args.out}: {result['seconds']} s")


if __name__ == "__main__":
    main()
