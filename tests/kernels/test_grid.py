"""The SDF grid ops: tiny truths on a sphere, and the compiled kernels against their torch twins."""

import pytest
import torch

from handhold import kernels
from handhold.kernels import grid_torch
from handhold.kernels.grid import SdfGrid

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def sphere(R=33, radius=0.05, half=0.1, backend=None, center=(0.0, 0.0, 0.0)):
    ax = [torch.linspace(c - half, c + half, R) for c in center]
    x = torch.stack(torch.meshgrid(*ax, indexing="ij"), -1)
    sdf = (x - torch.tensor(center)).norm(dim=-1) - radius
    return SdfGrid(sdf, [c - half for c in center], 2 * half / (R - 1), backend)


def noise(R, rng, backend, lo=(-0.3, 0.1, 0.0)):
    return SdfGrid(torch.randn(R, R, R, 4, generator=rng), lo, 0.05, backend)


def points(grid, n, rng, margin=0.0):
    u = torch.rand(n, 3, generator=rng) * (1 + 2 * margin) - margin
    return grid.lo + u * (grid.R - 1) * grid.h


@pytest.mark.parametrize("backend", BACKENDS)
def test_sphere_value_and_gradient(backend, rng):
    g = sphere(R=65, backend=backend, center=(0.02, -0.01, 0.3))
    x = points(g, 500, rng)
    x = x[(x - torch.tensor([0.02, -0.01, 0.3])).norm(dim=-1) > 0.02]
    val, grad = g.sample(x)
    r = x - torch.tensor([0.02, -0.01, 0.3])
    assert torch.allclose(val[:, 0], r.norm(dim=-1) - 0.05, atol=5e-4)
    cos = torch.nn.functional.cosine_similarity(grad, r)
    assert cos.min() > 0.98
    assert (val[:, 1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_is_exact_at_voxels(backend, rng):
    g = noise(5, rng, backend)
    i = torch.stack(torch.meshgrid(*[torch.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    val, _ = g.sample(g.lo + i * g.h)
    assert torch.allclose(val, g.data[i[:, 0], i[:, 1], i[:, 2]], atol=1e-4)


@compiled
def test_compiled_equals_twin(rng):
    a = noise(9, rng, "cpu")
    data = a.data
    b = SdfGrid(data, a.lo, a.h, "torch")
    c = SdfGrid(data.double(), a.lo, a.h)
    assert c.backend == "torch"
    x = points(a, 300, rng, margin=0.1)
    wv, wg = torch.randn(300, 4, generator=rng), torch.randn(300, 3, generator=rng)
    got = []
    for g in (a, b, c):
        p = x.detach().clone().to(g.data.dtype).requires_grad_()
        val, grad = g.sample(p)
        ((val * wv).sum() + (grad * wg).sum()).backward()
        got.append((val, grad, g.grad, p.grad))
    for mine, twin, exact in zip(*got, strict=True):
        scale = exact.abs().max()
        assert (mine - exact).abs().max() < 1e-5 * scale
        assert (twin - exact).abs().max() < 1e-5 * scale


def test_twin_gradcheck(rng):
    data = torch.randn(4, 4, 4, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    lo = torch.tensor([-0.3, 0.1, 0.0], dtype=torch.float64)
    x = (
        lo
        + (
            torch.randint(0, 3, (6, 3), generator=rng)
            + 0.2
            + 0.6 * torch.rand(6, 3, generator=rng, dtype=torch.float64)
        )
        * 0.05
    )
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, p: grid_torch.sample(f, lo, 0.05, p), (data, x), atol=1e-6, fast_mode=True
    )
    o = x.detach().clone().requires_grad_()
    d = (torch.randn(6, 3, generator=rng, dtype=torch.float64) * 0.01).requires_grad_()
    t = torch.linspace(0, 0.02, 5, dtype=torch.float64).expand(6, 5)
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda f, p, q, b: grid_torch.render(f, lo, 0.05, p, q, t, b), (data, o, d, beta), atol=1e-6, fast_mode=True
    )
    f3 = data.detach()[..., :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: grid_torch.regularizers(f, 0.05, 10.0), (f3,), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_without_gradient_of_x(backend, rng):
    g = noise(5, rng, backend)
    x = points(g, 10, rng)
    for _ in range(2):
        g.sample(x)[0][:, 0].sum().backward()
    assert g.grad[..., 0].sum().item() == pytest.approx(20, rel=1e-4)
    assert (g.grad[..., 1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_march_brackets_the_sphere(backend, rng):
    g = sphere(R=49, backend=backend)
    d = torch.nn.functional.normalize(torch.randn(200, 3, generator=rng), dim=-1)
    side = torch.nn.functional.normalize(torch.linalg.cross(d, torch.randn(200, 3, generator=rng)), dim=-1)
    miss = torch.rand(200, generator=rng) * 0.08  # distance of the ray from the centre
    o = -0.4 * d + miss[:, None] * side
    t0, t1, phi = g.march(o, d, 0.5 * g.h, 0.01)
    hit = miss < 0.045
    first = 0.4 - (0.05**2 - miss[hit] ** 2).sqrt()
    assert ((t0[hit] < first) & (first < t1[hit])).all()
    assert ((phi < 0) == (miss < 0.05))[(miss - 0.05).abs() > 0.002].all()
    assert (t1 > t0).all()
    _, _, phi = g.march(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]), 0.01, 0.01)
    assert phi.item() == pytest.approx(1e9)


@compiled
def test_march_equals_twin(rng):
    a = sphere(R=25, backend="cpu")
    b = sphere(R=25, backend="torch")
    o = torch.randn(300, 3, generator=rng) * 0.02 + torch.tensor([0.0, 0.0, -0.4])
    d = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 1.0]) + 0.1 * torch.randn(300, 3, generator=rng), dim=-1)
    for mine, twin in zip(a.march(o, d, 0.004, 0.012), b.march(o, d, 0.004, 0.012), strict=True):
        # a step that lands on the band's edge may go either way
        assert ((mine - twin).abs() < 1e-4).float().mean() > 0.99


@compiled
def test_reg_blur_adam_equal_twin(rng):
    base = sphere(R=13, backend="cpu")
    data = base.data + 0.003 * torch.randn(13, 13, 13, 4, generator=rng)
    grids = [SdfGrid(data, base.lo, base.h, b) for b in ("cpu", "torch")]
    x = points(base, 400, rng)
    for _ in range(3):
        losses = []
        for g in grids:
            g.sample(x)[0].square().sum().backward()
            losses.append(g.reg(0.1, 2e-4, 4 * g.h))
            g.blur(2)
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert (grids[0].grad - grids[1].grad).abs().max() < 1e-4 * grids[1].grad.abs().max()
        for g in grids:
            g.adam(1e-4, 1e-2)
            assert (g.grad == 0).all()
    assert torch.allclose(grids[0].data, grids[1].data, atol=2e-5)


@compiled
@pytest.mark.parametrize("blur", [0, 1, 2, 3])
@pytest.mark.parametrize("R", [3, 13, 33])
def test_update_is_reg_blur_and_adam(R, blur, rng):
    base = sphere(R=R, backend="cpu")
    data = base.data + 0.003 * torch.randn(R, R, R, 4, generator=rng)
    fused, steps, twin = (SdfGrid(data, base.lo, base.h, b) for b in ("cpu", "cpu", "torch"))
    for k in range(5):
        x = points(base, 100, rng)
        for g in (fused, steps, twin):
            if k != 2:  # a step without samples: colour keeps its momentum only where there is a gradient
                g.sample(x)[0].square().sum().backward()
            if k == 3:
                g.grad[0, 0, 0, 2] = 1.0  # what is written from outside counts too
                g.data[1:] += 1e-4
        a = fused.update(0.1, 2e-4, 0.03, 1e-4, 1e-2, blur)
        b = steps.reg(0.1, 2e-4, 0.03)
        steps.blur(blur)
        steps.adam(1e-4, 1e-2)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-9)
        assert a == pytest.approx(twin.update(0.1, 2e-4, 0.03, 1e-4, 1e-2, blur), rel=1e-4, abs=1e-9)
        for g in (steps, twin):
            assert (fused.grad == 0).all() and (g.grad == 0).all()
            assert torch.allclose(fused.data, g.data, atol=2e-5)
        moments = twin._v.permute(3, 0, 1, 2)
        assert torch.allclose(fused._v, moments, rtol=1e-3, atol=1e-6 * moments.max())
    assert torch.equal(fused._distance(), fused.data[..., 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_distance_field_has_no_eikonal_loss(backend):
    g = sphere(R=65, backend=backend)
    eik, lap = g.reg(1.0, 1.0, 0.02)
    assert eik < 1e-4 and lap < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_render_of_a_sphere(backend):
    g = sphere(R=65, backend=backend)
    g.data[..., 1:] = torch.tensor([2.0, 0.0, -2.0])
    o = torch.tensor([[0.0, 0.0, -0.4], [0.0, 0.09, -0.4]])
    d = torch.tensor([[0.0, 0.0, 1.0]]).expand(2, 3)
    t0, t1, _ = g.march(o, d, 0.5 * g.h, 5 * 0.002)
    t = t0[:, None] + (t1 - t0)[:, None] * torch.linspace(0, 1, 64)
    rgb, acc, depth = g.render(o, d, t, 0.002)
    assert acc[0] > 0.98 and acc[1] < 1e-3
    assert (depth[0] / acc[0]).item() == pytest.approx(0.35, abs=1e-3)
    assert torch.allclose(rgb[0] / acc[0], torch.sigmoid(torch.tensor([2.0, 0.0, -2.0])), atol=1e-4)


@compiled
def test_render_equals_twin(rng):
    data = sphere(R=17, backend="cpu").data + 0.004 * torch.randn(17, 17, 17, 4, generator=rng)
    data[..., 1:] *= 200
    base = sphere(R=17)
    w = torch.randn(40, 5, generator=rng)
    o = torch.randn(40, 3, generator=rng) * 0.02 + torch.tensor([0.0, 0.0, -0.2])
    d = torch.nn.functional.normalize(torch.tensor([0.0, 0.0, 1.0]) + 0.05 * torch.randn(40, 3, generator=rng), dim=-1)
    t = (0.1 + 0.2 * torch.rand(40, 13, generator=rng)).sort(1).values
    got = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float32), ("torch", torch.float64)):
        g = SdfGrid(data.to(dtype), base.lo, base.h, backend)
        oo, dd = (a.clone().to(dtype).detach().requires_grad_() for a in (o, d))
        beta = torch.tensor(0.01, dtype=dtype, requires_grad=True)
        rgb, acc, depth = g.render(oo, dd, t.to(dtype), beta)
        ((rgb * w[:, :3]).sum() + (acc * w[:, 3]).sum() + (depth * w[:, 4]).sum()).backward()
        got.append((rgb, acc, depth, g.grad[..., 0], g.grad[..., 1:], oo.grad, dd.grad, beta.grad))
    for mine, twin, exact in zip(*got, strict=True):
        scale = exact.abs().max()
        assert (mine - exact).abs().max() < 1e-4 * scale
        assert (twin - exact).abs().max() < 1e-4 * scale


@compiled
def test_same_bits_for_any_thread_count(rng):
    before = torch.get_num_threads()
    data = sphere(R=33).data + 0.001 * torch.randn(33, 33, 33, 4, generator=rng)
    results = []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            g = SdfGrid(data, (-0.1,) * 3, 0.2 / 32, "cpu")
            x = points(g, 6000, torch.Generator().manual_seed(1)).requires_grad_()
            val, grad = g.sample(x)
            (val.square().sum() + grad.square().sum()).backward()
            loss = g.reg(0.1, 1e-3, 0.05)
            g.blur(2)
            kept = g.grad.clone()
            g.adam(1e-4, 1e-2)
            g.sample(x.detach())[0].square().sum().backward()
            again = g.update(0.1, 1e-3, 0.05, 1e-4, 1e-2)
            results.append((val, grad, x.grad, kept, g.data, g._distance(), torch.tensor(loss + again)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_upsampling_keeps_the_field(backend, rng):
    g = sphere(R=17, backend=backend)
    u = g.upsampled(33)
    assert u.R == 33 and torch.allclose(u.hi, g.hi)
    x = points(g, 100, rng)
    assert torch.allclose(u.sample(x)[0][:, 0], g.sample(x)[0][:, 0], atol=2e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_bad_points(backend):
    g = sphere(backend=backend)
    val, grad = g.sample(torch.zeros(0, 3))
    assert val.shape == (0, 4) and grad.shape == (0, 3)
    assert torch.isfinite(g.sample(torch.tensor([[1e30, -3e38, 0.0]]))[0]).all()
    good, t = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.1, 0.2]])
    for bad in (torch.tensor([[0.0, torch.nan, 1.0]]), torch.tensor([[0.0, 0.0, -torch.inf]]), torch.zeros(1, 2)):
        for f in (
            lambda: g.sample(bad),  # noqa: B023
            lambda: g.march(bad, good, 0.01, 0.01),  # noqa: B023
            lambda: g.render(good, bad, t, 0.01),  # noqa: B023
        ):
            with pytest.raises(ValueError):
                f()
    for samples, beta in ((t * torch.nan, 0.01), (t[:, :1], 0.01), (t[[0, 0]], 0.01), (t, 0.0), (t, float("nan"))):
        with pytest.raises(ValueError):
            g.render(good, good, samples, beta)
    with pytest.raises(ValueError):
        SdfGrid(torch.zeros(4, 4, 4), (0, 0, torch.nan), 0.1, backend)
    with pytest.raises(ValueError):
        SdfGrid(torch.zeros(4, 4, 4), (0, 0, 0), 0.0, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fitting_a_plane_of_samples(backend, rng):
    """Adam on the grid drives the distance at given points to given values."""
    g = sphere(R=17, backend=backend)
    x = points(g, 800, rng)
    target = x[:, 2]
    first = None
    for _ in range(30):
        loss = (g.sample(x)[0][:, 0] - target).square().mean()
        first = first or loss.item()
        loss.backward()
        g.adam(1e-2, 0.0)
    assert loss.item() < 0.1 * first


@compiled
def test_silhouettes_recover_the_radius(rng):
    """Started 10 mm too small, the grid grows to the 50 mm sphere whose silhouettes it is shown."""
    g = sphere(R=33, radius=0.04, half=0.08, backend="cpu")
    for step in range(150):
        eye = torch.nn.functional.normalize(torch.randn(512, 3, generator=rng), dim=-1)
        o, aim = 0.4 * eye, torch.randn(512, 3, generator=rng) * 0.035
        d = torch.nn.functional.normalize(aim - o, dim=-1)
        inside = (torch.linalg.cross(o, d).norm(dim=-1) < 0.05).float()
        beta = g.h * 0.4 ** (step / 150)
        t0, t1, _ = g.march(o, d, 0.6 * g.h, 5 * beta)
        t = t0[:, None] + (t1 - t0)[:, None] * (torch.arange(16) + torch.rand(512, 16, generator=rng)) / 16
        acc = g.render(o, d, t, beta)[1].clamp(1e-4, 1 - 1e-4)
        torch.nn.functional.binary_cross_entropy(acc, inside).backward()
        g.reg(0.02, 2e-4, 8 * g.h)
        g.blur(2)
        g.adam(0.05 * g.h, 0.0)
    on_sphere = 0.05 * torch.nn.functional.normalize(torch.randn(500, 3, generator=rng), dim=-1)
    error = g.sample(on_sphere)[0][:, 0]
    assert error.mean().abs() < 4e-4 and error.abs().mean() < 1.5e-3
