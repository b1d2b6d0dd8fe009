"""Silhouettes with gradients at the outline: closed forms, finely sampled truths, two bodies, a pose fit."""

from __future__ import annotations

import math

import pytest
import torch

from handhold import kernels
from handhold.geometry.rigid import so3_exp
from handhold.render import raster
from handhold.render.raster import rasterize, soft_silhouette

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]
MODES = ["outline", "softras"]
EYE = torch.eye(4)[None]
F = 50.0
K = torch.tensor([[F, 0, 20.0], [0, F, 14.0], [0, 0, 1]])[None]
W, H = 40, 28


pytestmark = pytest.mark.usefixtures("one_thread")


def rectangle(x0, y0, x1, y1, z=1.0, n=3):
    """2 n^2 triangles that fill a rectangle given in pixels, at depth z."""
    s = torch.linspace(0, 1, n + 1)
    u, v = torch.meshgrid(x0 + (x1 - x0) * s, y0 + (y1 - y0) * s, indexing="ij")
    x = torch.stack([(u - 20) / F * z, (v - 14) / F * z, torch.full_like(u, z)], -1).reshape(-1, 3)
    a = (torch.arange(n)[:, None] * (n + 1) + torch.arange(n)).reshape(-1)
    return x, torch.cat([torch.stack([a, a + n + 1, a + 1], 1), torch.stack([a + 1, a + n + 1, a + n + 2], 1)])


def blob(rings=12, seed=3, size=0.12, lean=0.0):
    """A closed lump without symmetry, 2 rings^2 triangles or so."""
    g = torch.Generator().manual_seed(seed)
    up = torch.linspace(0, math.pi, rings + 1)[1:-1]
    turn = torch.arange(2 * rings) * math.pi / rings
    ring = torch.stack(
        [torch.outer(up.sin(), turn.cos()), torch.outer(up.sin(), turn.sin()), up.cos()[:, None].expand(-1, len(turn))],
        -1,
    ).reshape(-1, 3)
    d = torch.cat([ring, torch.tensor([[0, 0, 1.0], [0, 0, -1]])])
    r = 1 + sum(
        0.2 * torch.sin(d @ (torch.randn(3, generator=g) * 1.7) + 6 * torch.rand(1, generator=g)) for _ in range(6)
    )
    m, top = len(turn), len(ring)
    j = torch.arange(m)
    faces = [torch.stack([torch.full((m,), top), j, (j + 1) % m], 1)]
    for i in range(rings - 2):
        a, b = i * m + j, i * m + (j + 1) % m
        faces += [torch.stack([a, a + m, b], 1), torch.stack([b, a + m, b + m], 1)]
    last = (rings - 2) * m
    faces.append(torch.stack([torch.full((m,), top + 1), last + (j + 1) % m, last + j], 1))
    v = d * r[:, None] * torch.tensor([1.0, 0.6, 0.8]) * size
    return v @ so3_exp(torch.tensor([0.5, 0.3 + lean, 0.2])).T, torch.cat(faces)


def fine_mask(v, f, k, width, height, n=16):
    """(H,W) share of n x n samples of each pixel that the mesh covers."""
    k = k.clone()
    k[:, :2] *= n
    mask = rasterize(v, f, EYE, k, n * width, n * height, normals=None).mask[0, ..., 0]
    return mask.reshape(height, n, width, n).mean((1, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rectangle_covers_what_it_covers(backend):
    x0, y0, x1, y1 = 5.2, 3.9, 30.6, 20.3
    got = soft_silhouette(*rectangle(x0, y0, x1, y1), EYE, K, W, H, backend=backend)[0, ..., 0]

    def covered(lo, hi, n):
        at = torch.arange(n)
        return ((at + 1).clamp(max=hi) - at.clamp(min=lo)).clamp(0, 1)

    want = torch.outer(covered(y0, y1, H), covered(x0, x1, W))
    off = (got - want).abs() > 1e-5
    corners = [(3, 5), (3, 30), (20, 5), (20, 30)]  # pixels whose centres are outside along one axis: an eighth off
    assert {tuple(i) for i in off.nonzero().tolist()} <= set(corners) and (got - want).abs().max() <= 0.125


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_moving_right_fills_the_right_and_empties_the_left(backend, mode):
    v, f = rectangle(10.3, 5.2, 24.4, 22.1)
    v.requires_grad_()
    image = soft_silhouette(v, f, EYE, K, W, H, mode=mode, backend=backend)[0, ..., 0]
    right = torch.autograd.grad(image[8:20, 20:30].sum(), v, retain_graph=True)[0]
    left = torch.autograd.grad(image[8:20, 5:15].sum(), v)[0]
    assert right[:, 0].sum() > 0 > left[:, 0].sum()
    if mode == "outline":  # twelve rows, F pixels a metre
        assert right[:, 0].sum().item() == pytest.approx(12 * F, rel=1e-4)
        assert left[:, 0].sum().item() == pytest.approx(-12 * F, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("degrees", [0, 20, 45, 70])
def test_area_and_its_derivatives_in_closed_form(backend, degrees):
    """A turned rectangle of A px^2: dA/dz = -2 A/z, dA/dfx = A/fx, and moving it sideways changes nothing."""
    v, f = rectangle(11.3, 8.2, 26.1, 19.7)
    a = math.radians(degrees)
    turn = torch.tensor([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    shift, k = torch.zeros(3, requires_grad=True), K.clone().requires_grad_()
    area = soft_silhouette((v - v.mean(0)) @ turn.T + v.mean(0) + shift, f, EYE, k, W, H, backend=backend).sum()
    A = 14.8 * 11.5
    assert area.item() == pytest.approx(A, rel=0.005)
    g, gk = torch.autograd.grad(area, [shift, k])
    perimeter = 2 * (14.8 + 11.5)
    assert g[2].item() == pytest.approx(-2 * A, rel=0.06)
    assert gk[0, 0, 0].item() == pytest.approx(A / F, rel=0.06) and gk[0, 1, 1].item() == pytest.approx(A / F, rel=0.06)
    assert g[:2].abs().max() < 0.05 * perimeter * F and gk[0, :2, 2].abs().max() < 0.05 * perimeter


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_to_finely_sampled_coverage(backend):
    v, f = blob()
    v = v + torch.tensor([0.03, -0.01, 0.6])
    got = soft_silhouette(v, f, EYE, K, W, H, backend=backend)[0, ..., 0]
    truth, hard = fine_mask(v, f, K, W, H), rasterize(v, f, EYE, K, W, H).mask[0, ..., 0]
    assert (got - truth).abs().sum() < 0.15 * (hard - truth).abs().sum()
    assert got.sum().item() == pytest.approx(truth.sum().item(), rel=0.003)
    assert got.min() >= 0 and got.max() <= 1 and ((got >= 0.5) == (hard > 0)).all()


@compiled
def test_gradient_is_that_of_the_covered_area():
    """Against finite differences of a mask sampled 24 x 24 times a pixel, for six motions and smooth weights."""
    v, f = blob()
    y, x = torch.meshgrid(torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    weight = torch.sin(3 * x + 1) * torch.cos(4 * y) + x

    def moved(p):
        return v @ so3_exp(p[:3]).T + p[3:] + torch.tensor([0.03, -0.01, 0.6])

    p = torch.zeros(6, requires_grad=True)
    g = torch.autograd.grad((soft_silhouette(moved(p), f, EYE, K, W, H)[0, ..., 0] * weight).sum(), p)[0]
    fine = torch.nn.functional.interpolate(weight[None, None], scale_factor=24, mode="bilinear")[0, 0]
    k = K.clone()
    k[:, :2] *= 24
    want = []
    for i in range(6):
        h = torch.zeros(6)
        h[i] = 0.03 if i < 3 else 0.004
        a, b = (rasterize(moved(s * h), f, EYE, k, 24 * W, 24 * H, normals=None).mask[0, ..., 0] for s in (1, -1))
        want.append(((a - b) * fine).sum() / 24**2 / (2 * h[i]))
    want = torch.stack(want)
    unit = torch.tensor([1.0, 1, 1, 8, 8, 8])  # a radian moves the outline about an eighth of what a metre does
    assert ((g - want) / unit).norm() < 0.03 * (want / unit).norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_bodies_share_the_pixels_of_their_common_outline(backend):
    near, f = rectangle(5.2, 5.1, 20.3, 20.2, z=0.8)
    far, _ = rectangle(12.4, 8.3, 30.7, 16.6, z=1.2)
    v = torch.cat([near, far]).requires_grad_()
    ids = torch.cat([torch.zeros(len(f)), torch.ones(len(f))]).long()
    r = soft_silhouette(v, torch.cat([f, f + len(near)]), EYE, K, W, H, ids=ids, backend=backend)[0]
    assert r.shape == (H, W, 2)
    assert torch.allclose(r[10:15, 20, 0], torch.tensor(0.3), atol=1e-5)  # the near one ends at x = 20.3
    assert torch.allclose(r[10:15, 20, 1], torch.tensor(0.7), atol=1e-5)
    assert torch.allclose(r[10:15, 30, 1], torch.tensor(0.7), atol=1e-5) and (r[10:15, 21:30, 1] == 1).all()
    # the hidden end of the far one, at x = 12.4, is no outline
    assert (r[10:15, 11:14, 0] == 1).all() and (r[10:15, 11:14, 1] == 0).all()
    g = torch.autograd.grad(r[10:15, 20, 1].sum(), v)[0]
    assert g[: len(near), 0].sum().item() == pytest.approx(-5 * F / 0.8, rel=1e-4) and (g[len(near) :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_outline_of_a_sheet_that_passes_beside_the_camera(backend):
    """A strip of floor from behind the camera to 5 m ahead."""
    v = torch.tensor([[-0.2, 0.2, -3.0], [0.15, 0.2, -3.0], [0.15, 0.2, 5.0], [-0.2, 0.2, 5.0]])
    f = torch.tensor([[0, 1, 2], [0, 2, 3]])
    v.requires_grad_()
    got = soft_silhouette(v, f, EYE, K, W, H, backend=backend)[0, ..., 0]
    truth = fine_mask(v.detach(), f, K, W, H)
    assert (got - truth).abs().mean() < 0.003 and got.sum().item() == pytest.approx(truth.sum().item(), rel=0.01)
    got.sum().backward()
    assert torch.isfinite(v.grad).all() and v.grad[1:3, 0].sum() > 0 > v.grad[[0, 3], 0].sum()


def graded(backend, dtype, mode, sigma=0.8, shape=(W, H)):
    v, f = blob()
    other, g = blob(8, seed=4, size=0.08)
    v = torch.cat([v + torch.tensor([0.03, -0.01, 0.6]), other + torch.tensor([-0.05, 0.02, 0.5])])
    ids = torch.cat([torch.zeros(len(f)), torch.ones(len(g))]).long() if mode == "outline" else None
    view = torch.eye(4)
    view[:3, :3], view[:3, 3] = so3_exp(torch.tensor([0.05, -0.1, 0.2])), torch.tensor([0.01, 0.02, 0.03])
    leaves = [t.clone().to(dtype).requires_grad_() for t in (v, view[None], K)]
    faces = torch.cat([f, g + len(v) - len(other)])
    r = soft_silhouette(
        leaves[0], faces, *leaves[1:], *shape, ids=ids, n_ids=3, mode=mode, sigma=sigma, backend=backend
    )
    (r * torch.randn(r.shape, generator=torch.Generator().manual_seed(0)).to(r)).sum().backward()
    return r, [t.grad for t in leaves]


@compiled
@pytest.mark.parametrize("shape", [(W, H), (7, 5), (1, 1), (1, 9)])
@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_float64_twin(mode, shape):
    mine, got = graded("cpu", torch.float32, mode, shape=shape)
    twin, want = graded("torch", torch.float64, mode, shape=shape)
    assert mine.shape[1:3] == shape[::-1] and (mine - twin).abs().max() < 1e-4
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all() and (a - b).norm() <= 1e-3 * b.norm()


@compiled
@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_compiled_soft_rasteriser_at_other_softness(sigma):
    mine, got = graded("cpu", torch.float32, "softras", sigma)
    twin, want = graded("torch", torch.float64, "softras", sigma)
    assert (mine - twin).abs().max() < 1e-4
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() < 1e-3 * b.norm()


@pytest.mark.parametrize("mode", MODES)
def test_twin_gradcheck(mode):
    v, f = blob(4)
    v = (v + torch.tensor([0.01, 0.0, 0.6])).double().requires_grad_()
    view, k = EYE.double().requires_grad_(), torch.tensor([25.0, 24, 6.2, 5.1], dtype=torch.float64, requires_grad=True)

    def image(v, view, k):
        K = torch.eye(3, dtype=torch.float64).index_put((torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 2])), k)
        return soft_silhouette(v, f, view, K[None], 12, 10, mode=mode, backend="torch")

    assert image(v, view, k).sum() > 10
    assert torch.autograd.gradcheck(image, (v, view, k), eps=1e-8, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_rasteriser_in_closed_form(backend):
    """One large triangle whose left edge is at x = 10.2, and two copies of it."""
    v = torch.tensor([[(10.2 - 20) / F, -3, 1], [(10.2 - 20) / F, 3, 1], [5, 0, 1.0]])
    f = torch.tensor([[0, 1, 2]])
    d = torch.arange(W) + 0.5 - 10.2
    for faces, power in ((f, 1), (f.expand(2, 3), 2)):
        r = soft_silhouette(v, faces, EYE, K, W, H, mode="softras", sigma=1.5, backend=backend)[0, 14, :, 0]
        want = 1 - (1 - torch.sigmoid(d.sign() * d**2 / 1.5**2)) ** power
        assert torch.allclose(r, want, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_see(backend, mode):
    v, f = rectangle(10, 5, 24, 22)
    for x, faces in ((v, f[:0]), (v[:0], f[:0]), (v * torch.tensor([1, 1, -1.0]), f), (v + 30, f)):
        x = x.clone().requires_grad_()
        r = soft_silhouette(x, faces, EYE, K, W, H, mode=mode, backend=backend)
        assert r.shape == (1, H, W, 1) and (r == 0).all()
        r.sum().backward()
        assert (x.grad == 0).all()


@compiled
@pytest.mark.parametrize("mode", MODES)
def test_same_bits_for_any_thread_count(mode):
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        r, grads = graded("cpu", torch.float32, mode)
        results.append([r, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_any_finite_size_is_safe(scale, mode):
    g = torch.Generator().manual_seed(0)
    v = (torch.randn(60, 3, generator=g) + torch.tensor([0, 0, 0.5])) * scale
    f = torch.randint(60, (80, 3), generator=g)
    for k in ([F, F, 20, 14], [1e-6, 1e-6, 0, 0], [1e6, 1e6, -1e6, 1e7], [1e30, 1e30, 1e30, -1e30]):
        K = torch.eye(3).index_put((torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 2])), torch.tensor(k))[None]
        for w, h in ((1, 1), (7, 5), (40, 28)):
            x = v.clone().requires_grad_()
            r = soft_silhouette(x, f, EYE, K, w, h, mode=mode, near=1e-12, backend="cpu")
            assert (r >= 0).all() and (r <= 1).all()
            r.sum().backward()


@compiled
def test_a_pose_is_found_from_its_mask():
    """From 10 degrees and 5 % of the distance off, one mask of 96 x 72 pixels, plain L2."""
    v, f = blob(12)
    k = torch.tensor([[130.0, 0, 45], [0, 130, 38], [0, 0, 1]])[None]
    t = torch.tensor([0.01, -0.01, 0.6])
    goal = rasterize(v + t, f, EYE, k, 96, 72).mask
    off_r, off_t = torch.tensor([0.10, -0.08, 0.12]), torch.tensor([0.6, -0.5, 0.62]) * 0.03
    p = torch.zeros(6, requires_grad=True)
    unit = torch.tensor([1.0, 1, 1, 0.5, 0.5, 0.5])  # radians; half metres

    def posed(p):
        q = p * unit
        return v @ (so3_exp(q[:3]) @ so3_exp(off_r)).T + q[3:] + off_t + t

    optimizer = torch.optim.Adam([p], lr=0.02)
    start = (posed(p) - v - t).norm(dim=-1).mean().item()
    for i in range(120):
        optimizer.param_groups[0]["lr"] = 0.02 * min(1, 0.05 ** (i / 60 - 1))
        loss = (soft_silhouette(posed(p), f, EYE, k, 96, 72) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        mask = rasterize(posed(p), f, EYE, k, 96, 72).mask
        end = (posed(p) - v - t).norm(dim=-1).mean().item()
    assert (mask * goal).sum() / ((mask + goal) > 0).sum() > 0.985
    assert start > 0.025 and end < 0.2 * start


def test_wrong_arguments_are_refused_before_a_kernel_runs(monkeypatch):
    monkeypatch.setattr(raster.kernel, "visible", lambda *a: pytest.fail("a kernel ran"))
    monkeypatch.setattr(raster.silhouette, "occupancy", lambda *a: pytest.fail("a kernel ran"))
    v, f = rectangle(10, 5, 24, 22)
    good, ids = (v, f, EYE, K, W, H), torch.zeros(len(f), dtype=torch.long)
    soft = {"mode": "softras"}
    for more in ({"mode": "hard"}, {**soft, "sigma": 0.0}, {**soft, "sigma": math.nan}, {**soft, "ids": ids},
                 {"ids": ids + 4, "n_ids": 3}, {"ids": ids[:3]}, {"ids": ids - 1}):  # fmt: skip
        with pytest.raises(ValueError):
            soft_silhouette(*good, **more)
    with pytest.raises(ValueError, match="faces"):
        soft_silhouette(v, f + 10, EYE, K, W, H, mode="softras")
