"""Splatting: small truths that hold for both backends, and the compiled kernel against its float64 twin."""

import math
import os
import subprocess
import sys

import pytest
import torch

from handhold import kernels
from handhold.errors import HandholdError
from handhold.kernels import _lib
from handhold.kernels.splat import compose, rasterize
from handhold.render import splat

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]
W, H = 40, 28
K = torch.tensor([[50.0, 0.0, 20.0], [0.0, 55.0, 13.0], [0.0, 0.0, 1.0]])
EYE = torch.eye(4)


pytestmark = pytest.mark.usefixtures("one_thread")


def scene(n=120, seed=0, sh_degree=None):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(n, 3, generator=g) * torch.tensor([0.12, 0.08, 0.1]) + torch.tensor([0.0, 0.0, 0.5])
    quats = torch.randn(n, 4, generator=g)
    scales = torch.exp(torch.randn(n, 3, generator=g) * 0.4 - 4.2)
    opacities = torch.sigmoid(torch.randn(n, generator=g) * 1.5)
    shape = (n, 3) if sh_degree is None else (n, (sh_degree + 1) ** 2, 3)
    colors = torch.rand(*shape, generator=g) if sh_degree is None else torch.randn(*shape, generator=g) * 0.4
    angle = 0.2
    view = torch.eye(4)
    c, s = math.cos(angle), math.sin(angle)
    view[:3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    view[:3, 3] = torch.tensor([-0.08, 0.02, 0.03])
    ids = torch.arange(n) % 3
    return means, quats, scales, opacities, colors, view, ids


def one(x, y, z, size, opacity, color):
    """A round Gaussian at (x,y,z), metres."""
    q = torch.tensor([[1.0, 0, 0, 0]])
    return torch.tensor([[x, y, z]]), q, torch.full((1, 3), size), torch.tensor([opacity]), torch.tensor([color])


def stack(*parts):
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def loss_of(r, seed=5):
    g = torch.Generator().manual_seed(seed)
    weight = lambda t: torch.randn(t.shape, generator=g).to(t)  # noqa: E731
    return sum((t * weight(t)).sum() for t in (r.color, r.alpha, r.depth * 0.1, r.ids, r.normals, r.median_depth))


def run(backend, dtype, sh_degree, n=120, kind="3d", normals=None):
    *tensors, ids = scene(n, sh_degree=sh_degree)
    leaves = [t.clone().to(dtype).requires_grad_() for t in (*tensors, K)]
    bg = torch.tensor([[0.2, 0.5, 0.9]], dtype=dtype, requires_grad=True)
    r = splat(*leaves[:5], leaves[5][None], leaves[6][None], W, H, sh_degree, bg, backend, ids, None, kind, normals)
    loss_of(r).backward()
    return r, [t.grad for t in (*leaves, bg)]


@compiled
@pytest.mark.parametrize("kind", ["3d", "2d"])
@pytest.mark.parametrize("sh_degree", [None, 0, 1, 2, 3])
def test_compiled_equals_float64_twin(sh_degree, kind):
    mine, got = run("cpu", torch.float32, sh_degree, kind=kind)
    twin, want = run("torch", torch.float64, sh_degree, kind=kind)
    assert (mine.median != twin.median).float().mean() < 2e-3
    images = ("color", "alpha", "ids", "normals")
    for a, b in ((getattr(mine, name), getattr(twin, name)) for name in images):
        assert (a - b).abs().max() <= 1e-4  # no pixel of this scene lies on the edge of a threshold
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_twin_gradcheck(kind):
    *tensors, ids = scene(5)
    tensors = [t.double() for t in tensors]
    tensors[2] = tensors[2] * 8
    k = torch.tensor([9.0, 9.0, 4.0, 4.0], dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (*tensors, k)]

    def f(means, quats, scales, opacities, colors, view, k):
        (fx, fy, cx, cy), zero, unit = k, k.new_zeros(()), k.new_ones(())
        k = torch.stack([fx, zero, cx, zero, fy, cy, zero, zero, unit]).reshape(3, 3)
        r = splat(
            means, quats, scales, opacities, colors, view[None], k[None], 8, 8, backend="torch", ids=ids, kind=kind
        )
        return r.color, r.alpha, r.ids, r.depth, r.normals, r.median_depth

    assert torch.autograd.gradcheck(f, leaves, eps=1e-7, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_gaussians_blend_in_depth_order(backend):
    near = one(0.0, 0.0, 1.0, 0.03, 0.6, [1.0, 0.0, 0.0])
    far = one(0.0, 0.0, 2.0, 0.06, 0.8, [0.0, 1.0, 0.0])
    k = torch.tensor([[100.0, 0, 8.5], [0, 100, 8.5], [0, 0, 1]])
    for order in ((near, far), (far, near)):
        r = splat(*stack(*order), EYE[None], k[None], 17, 17, backend=backend)
        assert torch.allclose(r.color[0, 8, 8], torch.tensor([0.6, 0.4 * 0.8, 0.0]), atol=1e-6)
        assert r.alpha[0, 8, 8].item() == pytest.approx(1 - 0.4 * 0.2, abs=1e-6)
        assert r.depth[0, 8, 8].item() == pytest.approx((0.6 * 1 + 0.32 * 2) / 0.92, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_footprint_is_the_projected_gaussian(backend):
    """A round Gaussian of s metres at depth z is one of f s / z pixels, plus the 0.3 px^2 dilation."""
    k = torch.tensor([[100.0, 0, 16.5], [0, 100, 16.5], [0, 0, 1]])
    r = splat(*one(0.0, 0.0, 1.0, 0.03, 0.9, [1.0, 1.0, 1.0]), EYE[None], k[None], 33, 33, backend=backend)
    dx = torch.arange(33) + 0.5 - 16.5
    want = 0.9 * torch.exp(-0.5 * dx**2 / (9 + 0.3))
    want[want < 1 / 255] = 0
    assert torch.allclose(r.alpha[0, 16, :, 0], want, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_principal_point_shifts_the_image(backend):
    *t, view, ids = scene()
    t = t[:5]
    k = K.clone()
    k[0, 2] += 5
    k[1, 2] += 3
    a = splat(*t, view[None], K[None], W + 8, H + 8, backend=backend).color
    b = splat(*t, view[None], k[None], W + 8, H + 8, backend=backend).color
    assert torch.allclose(a[0, :-3, :-5], b[0, 3:, 5:], atol=2e-3)
    assert a.sum() > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_draw(backend):
    *t, view, ids = scene()
    bg = torch.tensor([[0.1, 0.2, 0.3]])
    behind = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0]))
    for tensors, v in (([x[:0] for x in t[:5]], view), (t[:5], behind)):
        leaves = [x.clone().requires_grad_() for x in tensors]
        r = splat(*leaves, v[None], K[None], W, H, backgrounds=bg, backend=backend)
        assert (r.alpha == 0).all() and (r.depth == 0).all()
        assert torch.allclose(r.color, bg.expand_as(r.color))
        if backend == "cpu":
            (r.color.sum() + r.depth.sum()).backward()
            assert all((x.grad == 0).all() for x in leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_body_weights_sum_to_alpha_and_respect_occlusion(backend):
    *t, view, ids = scene()
    r = splat(*t[:5], view[None], K[None], W, H, ids=ids, backend=backend)
    assert r.ids.shape == (1, H, W, 3)
    assert torch.allclose(r.ids.sum(-1, keepdim=True), r.alpha, atol=1e-5)
    front = one(0.0, 0.0, 0.3, 0.5, 1.0, [1.0, 1.0, 1.0])
    u = splat(*stack(front, t[:5]), view[None], K[None], W, H, ids=torch.cat([torch.tensor([3]), ids]), backend=backend)
    assert u.ids[0, 14, 20, 3] > 0.99 and u.ids[0, 14, 20, :3].sum() < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_cameras_are_independent(backend):
    *t, view, ids = scene()
    two = splat(*t[:5], torch.stack([EYE, view]), K.expand(2, 3, 3), W, H, ids=ids, backend=backend)
    for c, v in enumerate((EYE, view)):
        alone = splat(*t[:5], v[None], K[None], W, H, ids=ids, backend=backend)
        assert torch.equal(two.color[c], alone.color[0]) and torch.equal(two.ids[c], alone.ids[0])


@compiled
def test_same_bits_for_any_thread_count():
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            r, grads = run("cpu", torch.float32, 1, n=1500)
            results.append([r.color, r.alpha, r.depth, r.ids, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_many_gaussians_are_sorted_in_parts():
    """Enough of them that sorting is cut into parts: still the twin's picture, and the same bits for any threads."""
    n = 66000
    g = torch.Generator().manual_seed(0)
    means = torch.rand(n, 3, generator=g) * torch.tensor([0.15, 0.15, 1.0]) + torch.tensor([-0.075, -0.075, 0.6])
    t = (means, torch.ones(n, 4), torch.full((n, 3), 0.001), torch.full((n,), 0.03), torch.rand(n, 3, generator=g))
    k = torch.tensor([[60.0, 0, 8], [0, 60, 8], [0, 0, 1]])
    pictures = []
    with torch.no_grad():
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            pictures.append(rasterize(*t, EYE, k, 16, 16, backend="cpu")[0])
        torch.set_num_threads(1)
        twin = rasterize(*t, EYE, k, 16, 16, backend="torch")[0]
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    assert ((pictures[0] - twin).abs() > 1e-4).float().mean() < 0.01 and (pictures[0] - twin).abs().max() < 2e-3


@compiled
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("reads", [(0, 1, 2, 3), (0,), (1, 2), (3,)])
def test_composed_images_equal_the_twin(extra, reads):
    """Of two cameras, whichever images a loss reads; the same bits for any number of threads."""
    g = torch.Generator().manual_seed(0)
    shape = (2, 70, 130)
    alpha = torch.rand(*shape, generator=g)
    alpha[:, :9] = 0  # where nothing was drawn
    out = torch.rand(*shape, 4 + extra, generator=g) * alpha[..., None]
    inputs = (out, alpha, torch.rand(2, 3, generator=g))
    weights = [torch.randn(*shape, c, generator=g) for c in (3, 1, 1, extra)]

    def run(dtype, threads):
        torch.set_num_threads(threads)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
        images = compose(*leaves)
        sum((images[i] * weights[i]).sum() for i in reads).backward()
        return [*images, *(torch.zeros(0) if t.grad is None else t.grad for t in leaves)]

    found = [run(torch.float32, n) for n in (1, 2, 3)]
    torch.set_num_threads(1)
    drawn = alpha > 0.01  # the depth of a fainter pixel has steep gradients
    for a, b in zip(found[0], run(torch.float64, 1), strict=True):
        if b.shape[:3] == shape:
            a, b = a[drawn], b[drawn]
        if not b.numel():
            b = torch.zeros_like(a, dtype=torch.float64)
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-4)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not found[0][2][:, :9].any()


@compiled
def test_the_baseline_instruction_set_equals_this_one():
    code = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_splatting import run
torch.set_num_threads(1)
for kind in ("3d", "2d"):
    r, grads = run("cpu", torch.float32, 2, kind=kind, normals=True)
    print(*(f"{t.double().abs().sum():.9g}" for t in (r.color, r.depth, r.normals, r.ids, r.median_depth, *grads)))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    base, best = (
        subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__)],
            env={**env, "HANDHOLD_ISA": isa}, capture_output=True, text=True, check=True,
        ).stdout.split()
        for isa in ("base", "")
    )  # fmt: skip
    assert [float(v) for v in base] == pytest.approx([float(v) for v in best], rel=1e-4)


@compiled
def test_the_kernel_skips_what_is_not_finite():
    """splat() refuses such input; the op below it must still never read or write where it should not."""
    *t, view, ids = scene(20)
    want = rasterize(*t[:5], view, K, W, H, backend="cpu")[0]
    bad = [x[:8].clone() for x in t[:5]]
    bad[0][0] = float("nan")
    bad[0][1] = float("inf")
    bad[1][2] = 0
    bad[2][3] = float("nan")
    bad[3][4] = float("nan")
    bad[3][5] = 0
    bad[0][6] = torch.tensor([3e38, -3e38, 0.5])
    bad[2][7] = 3e38
    for kind in ("3d", "2d"):
        if kind == "2d":
            bad[2][3, :2], bad[2][7] = float("nan"), float("inf")
            want = rasterize(*t[:5], view, K, W, H, backend="cpu", kind=kind)[0]
        leaves = [x.requires_grad_() for x in stack(t[:5], [b.detach() for b in bad])]
        got, alpha, _ = rasterize(*leaves, view, K, W, H, backend="cpu", kind=kind)
        assert torch.equal(want, got)
        (got.sum() + alpha.sum()).backward()
        assert all(torch.isfinite(x.grad).all() for x in leaves)


@compiled
@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_any_camera_and_size_stay_in_bounds(kind):
    """Cameras and Gaussians from the whole range of floats: the picture is finite, whatever it shows."""
    g = torch.Generator().manual_seed(0)
    for _ in range(60):
        n = 30
        wild = lambda *s: torch.randn(*s, generator=g) * 10 ** (torch.rand(*s, generator=g) * 12 - 6)  # noqa: E731
        k = torch.diag(torch.cat([wild(2).abs() + 1e-6, torch.ones(1)]))
        k[:2, 2] = wild(2)
        view = torch.eye(4)
        view[:3] = wild(3, 4)
        leaves = [wild(n, 3), wild(n, 4), wild(n, 3), torch.rand(n, generator=g), torch.rand(n, 3, generator=g)]
        leaves = [x.requires_grad_() for x in leaves]
        out, alpha, median = rasterize(*leaves, view, k, 37, 19, backend="cpu", kind=kind)
        assert torch.isfinite(out[..., :3]).all() and (alpha >= 0).all() and (alpha <= 1).all()
        assert (median >= -1).all() and (median < n).all()
        (out.sum() + alpha.sum()).backward()


def test_wrong_shapes_are_named():
    *t, view, ids = scene(4)
    with pytest.raises(ValueError, match="quats"):
        splat(t[0], t[1][:, :3], *t[2:5], view[None], K[None], W, H)
    with pytest.raises(ValueError, match="sh_degree"):
        splat(*t[:5], view[None], K[None], W, H, sh_degree=2)


@pytest.mark.parametrize("what", ["means", "quats", "scales", "opacities", "colors", "viewmats", "Ks", "backgrounds"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(what, value):
    *t, view, ids = scene(4)
    arguments = dict(zip(("means", "quats", "scales", "opacities", "colors"), t, strict=False))
    arguments |= {"viewmats": view[None].clone(), "Ks": K[None].clone(), "backgrounds": torch.zeros(1, 3)}
    arguments[what] = arguments[what].clone()
    arguments[what].view(-1)[-2] = value
    with pytest.raises(ValueError, match=f"{what} is not finite, first at"):
        splat(**arguments, width=W, height=H)


def test_large_finite_values_pass():
    *t, view, ids = scene(4)
    far = t[0].clone()
    far[:2] = 3e38  # their sum overflows
    assert torch.isfinite(splat(far, *t[1:5], view[None], K[None], W, H).color).all()


def test_other_wrong_arguments_are_named():
    *t, view, ids = scene(4)
    rest = (view[None], K[None])
    for size in ((0, 4), (4, 16385), (4.5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="width|height"):
            splat(*t[:5], *rest, *size)
    bad = K[None].clone()
    bad[0, 0, 0] = 0
    with pytest.raises(ValueError, match="positive"):
        splat(*t[:5], view[None], bad, W, H)
    bad[0, 0] = torch.tensor([50.0, 1.0, 20.0])
    with pytest.raises(ValueError, match="skew"):
        splat(*t[:5], view[None], bad, W, H)
    with pytest.raises(ValueError, match="ids run from 0 to 2"):
        splat(*t[:5], *rest, W, H, ids=ids, n_ids=2)
    with pytest.raises(ValueError, match="ids run from -2"):
        splat(*t[:5], *rest, W, H, ids=ids - 2)
    with pytest.raises(TypeError, match="ids"):
        splat(*t[:5], *rest, W, H, ids=ids.float())
    with pytest.raises(ValueError, match="at most 12"):
        splat(*t[:5], *rest, W, H, ids=ids, n_ids=13)
    with pytest.raises(ValueError, match="backgrounds"):
        splat(*t[:5], *rest, W, H, backgrounds=torch.zeros(3))
    with pytest.raises(ValueError, match="viewmats"):
        splat(*t[:5], view, K[None], W, H)
    with pytest.raises(ValueError, match="kind"):
        splat(*t[:5], *rest, W, H, kind="4d")
    with pytest.raises(ValueError, match="backend"):
        splat(*t[:5], *rest, W, H, backend="gpu")
    with pytest.raises(TypeError, match="means is|quats is"):
        splat(t[0].double(), *t[1:5], *rest, W, H)
    with pytest.raises(TypeError, match="floating"):
        splat(t[0].long(), *t[1:5], *rest, W, H)


def test_the_missing_extra_is_named(monkeypatch):
    *t, view, ids = scene(4)
    monkeypatch.setattr(_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HandholdError, match=r"pip install 'handhold\[gpu\]'"):
        splat(*t[:5], view[None], K[None], W, H, backend="triton")


@compiled
def test_too_many_tiles_are_one_clear_error():
    n = 400
    t = (torch.tensor([[0.0, 0, 1]]).repeat(n, 1), torch.ones(n, 4), torch.full((n, 3), 50.0), torch.ones(n))
    k = torch.tensor([[16384.0, 0, 8192], [0, 16384, 8192], [0, 0, 1]])
    with pytest.raises(MemoryError, match="make their scales smaller"):
        # 16384^2 pixels would need 5 GB for the picture alone, so the op is called on an image that is never made
        _forward_only(*t, torch.ones(n, 3), k, 16384)


def _forward_only(means, quats, scales, opacities, colors, k, side):
    empty = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *s, **kw: empty(0, **kw))
        rasterize(means, quats, scales, opacities, colors, EYE, k, side, side, backend="cpu")
