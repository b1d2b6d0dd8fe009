"""What the kernels refuse: unsafe memory, second derivatives they do not have, input that is not what it should be."""

import math

import pytest
import torch

from handhold import kernels
from handhold.kernels import _lib, raster, silhouette, splat
from handhold.kernels._checks import once, version, written
from handhold.kernels.grid import SdfGrid
from handhold.kernels.splat_torch import rotations
from handhold.kernels.ssim import ssim_mean
from handhold.render import rasterize
from handhold.render import splat as render_splat

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]
K = torch.tensor([[50.0, 0.0, 20.0], [0.0, 55.0, 13.0], [0.0, 0.0, 1.0]])


def gaussians(n=6):
    g = torch.Generator().manual_seed(0)
    means = torch.randn(n, 3, generator=g) * 0.05 + torch.tensor([0.0, 0.0, 0.5])
    return means, torch.randn(n, 4, generator=g), torch.full((n, 3), 0.02), torch.full((n,), 0.8), torch.rand(n, 3)


def ball(backend=None, R=9):
    x = torch.stack(torch.meshgrid(*[torch.linspace(-0.1, 0.1, R)] * 3, indexing="ij"), -1)
    return SdfGrid(x.norm(dim=-1) - 0.05, (-0.1,) * 3, 0.2 / (R - 1), backend)


def triangle():
    return torch.tensor([[-0.1, -0.1, 1.0], [0.1, -0.1, 1.0], [0.0, 0.1, 1.0]]), torch.tensor([[0, 1, 2]])


def test_a_pointer_is_given_only_of_what_a_kernel_can_read():
    assert _lib.pointer(None) is None and _lib.pointer(torch.zeros(3))
    for bad in (torch.zeros(3, 4).T, torch.zeros(3, device="meta")):
        with pytest.raises(TypeError, match="contiguous"):
            _lib.pointer(bad)


def test_tensors_on_other_devices_are_named():
    t, o = gaussians(), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="ids is on meta"):
        splat.rasterize(*t, torch.eye(4), K, 8, 8, ids=torch.zeros(6, dtype=torch.long, device="meta"), n_ids=1)
    with pytest.raises(TypeError, match="viewmats"):
        render_splat(*t, torch.eye(4, device="meta")[None], K[None], 8, 8)
    with pytest.raises(TypeError, match="t is"):
        ball().render(o, o + 1, torch.tensor([[0, 1], [0, 1]]), 0.01)


@compiled
def test_indices_out_of_range_reach_no_kernel(monkeypatch):
    monkeypatch.setenv("HANDHOLD_BACKEND", "auto")
    v, f = triangle()
    face, bary, depth = raster.visible(v, f, K, 40, 28)
    for bad in (face + 1, face - 5):
        with pytest.raises(ValueError, match="face runs"):
            raster.interpolate(v, f, bad, bary)
    with pytest.raises(ValueError, match="faces runs"):
        raster.visible(v, f + 1, K, 8, 8)
    body = torch.zeros(1, dtype=torch.long)
    for bad in (face + 1, face - 5):
        with pytest.raises(ValueError, match="label runs"):
            silhouette.coverage(v, f, K, bad, depth, body)
    with pytest.raises(ValueError, match="label and depth"):
        silhouette.coverage(v, f, K, face, depth[1:], body)
    want = silhouette.coverage(v, f, K, face, depth, body)
    assert torch.equal(silhouette.coverage(v, f, K, face.int(), depth.double(), body.int()), want)


@compiled
def test_a_second_derivative_raises(monkeypatch):
    """Also where the incoming gradient needs none, which torch's own mark lets pass."""
    monkeypatch.setenv("HANDHOLD_BACKEND", "auto")
    t = [a.requires_grad_() for a in gaussians()]
    x, image = torch.zeros(2, 3).requires_grad_(), torch.rand(3, 8, 8).requires_grad_()
    o, d, s = torch.tensor([[0.0, 0, -0.2]]).requires_grad_(), torch.tensor([[0.0, 0, 1]]), torch.rand(1, 8).sort()[0]
    v, f = triangle()
    v.requires_grad_()
    cases = [
        (splat.rasterize(*t, torch.eye(4), K, 16, 16, backend="cpu")[0].sum(), t[0]),
        (splat.compose(image[..., None].expand(3, 8, 8, 4), image, None)[2].sum(), image),
        (ball("cpu").sample(x)[1].sum(), x),
        (ball("torch").sample(x)[1].sum(), x),
        (ball("cpu").render(o, d, s, 0.01)[1].sum(), o),
        (ball("torch").render(o, d, s, 0.01)[1].sum(), o),
        (ssim_mean(image, image.detach() * 0.5, "cpu"), image),
        (raster.visible(v, f, K, 40, 28)[2].sum(), v),
    ]
    for y, leaf in cases:
        (g,) = torch.autograd.grad(y, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            (g.square().sum() + leaf.sum()).backward()


def test_a_mark_does_not_change_the_first_derivative():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @once
        def backward(ctx, v):
            return 2 * v

    x = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(Double.apply(x).sum(), x)[0].tolist() == [2, 2, 2]
    assert torch.autograd.grad(Double.apply(x).sum(), x, create_graph=True)[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode(backend):
    with torch.inference_mode():
        r = render_splat(*gaussians(), torch.eye(4)[None], K[None], 16, 16, backend=backend)
        assert r.normals.shape == (1, 16, 16, 3)
        g = ball(backend)
        o, d = torch.tensor([[0.0, 0, -0.3]]), torch.tensor([[0.0, 0, 1]])
        before = g.march(o, d, 0.005, 0.01)[2]
        g.data[..., 0] += 0.02
        assert g.march(o, d, 0.005, 0.01)[2] != before
        g.update(0.1, 0.1, 1.0, 1e-3, 1e-3)
        assert torch.isfinite(g.sample(o)[0]).all()


def test_versions_count_what_kernels_write():
    t = torch.zeros(3)
    before = version(t)
    written(t)
    assert version(t) > before


@compiled
def test_the_grid_notices_every_change():
    g = ball("cpu")
    o, d = torch.tensor([[0.0, 0, -0.3]]), torch.tensor([[0.0, 0, 1]])
    before, count = g.march(o, d, 0.005, 0.01)[2].item(), version(g.data)
    g.update(1.0, 1.0, 1.0, 1e-2, 0.0)
    assert version(g.data) > count and g.march(o, d, 0.005, 0.01)[2].item() != before


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_rays_that_are_not_contiguous(backend):
    o, d = torch.full((3, 4), -0.06).T.requires_grad_(), torch.ones(3, 4).T
    t = torch.linspace(0, 0.06, 8).expand(4, 8)
    ball(backend).render(o, d, t, 0.01)[1].sum().backward()
    assert torch.isfinite(o.grad).all() and o.grad.abs().sum() > 0


def test_bad_grids_marches_and_images_are_named():
    with pytest.raises(TypeError, match="floating"):
        SdfGrid(torch.zeros(4, 4, 4, dtype=torch.long), (0, 0, 0), 0.1)
    with pytest.raises(ValueError, match="finite"):
        SdfGrid(torch.full((4, 4, 4), math.nan), (0, 0, 0), 0.1)
    o = torch.zeros(1, 3)
    for bad in ((0.0, 0.1), (0.1, 0.0), (math.nan, 0.1), (0.1, math.inf), (-0.1, 0.1)):
        with pytest.raises(ValueError, match="min_step|band"):
            ball().march(o, o + 1, *bad)
    for x in (torch.zeros(3, 0, 4), torch.full((3, 4, 4), math.nan)):
        with pytest.raises(ValueError, match="ssim"):
            ssim_mean(x, torch.zeros_like(x))


def test_bad_splat_arguments_are_named():
    t, rest = gaussians(), (torch.eye(4)[None], K[None], 8, 8)
    for degree in (1.0, True, 4, -1):
        with pytest.raises(ValueError, match="sh_degree is"):
            render_splat(*t, *rest, sh_degree=degree)
    with pytest.raises(ValueError, match="per camera are not supported"):
        render_splat(*t[:4], t[4][None], *rest)
    with pytest.raises(ValueError, match="there are no ids"):
        render_splat(*t, *rest, n_ids=2)
    with pytest.raises(TypeError, match="ids"):
        render_splat(*t, *rest, ids=torch.ones(6, dtype=torch.bool))
    view = torch.eye(4, dtype=torch.float64)[None].requires_grad_()
    render_splat(*t, view, K[None].double(), 16, 16).color.sum().backward()
    assert view.grad.dtype == torch.float64 and view.grad.abs().sum() > 0


def test_the_mesh_renderer_refuses_skew_and_what_is_not_finite():
    v, f = triangle()
    skewed = K.clone()
    skewed[0, 1] = 1
    for bad in ({"Ks": skewed[None]}, {"attributes": v * math.nan}, {"width": 8.5}):
        with pytest.raises(ValueError, match="skew|attributes|width"):
            rasterize(**{"vertices": v, "faces": f, "viewmats": torch.eye(4)[None], "Ks": K[None], "width": 8,
                         "height": 8} | bad)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1e-18, 1e18])
@pytest.mark.parametrize("kind", ["3d", "2d"])
def test_quaternions_of_any_length(backend, length, kind):
    means, quats, *rest = gaussians()
    rest[0] = rest[0] * torch.tensor([1.0, 0.5, 0.2])
    quats = torch.nn.functional.normalize(quats, dim=-1)
    assert torch.allclose(rotations(quats * length), rotations(quats), atol=1e-6)
    view = (torch.eye(4)[None], K[None], 24, 20)
    want = render_splat(means, quats, *rest, *view, backend=backend, kind=kind)
    scaled = (quats * length).requires_grad_()
    got = render_splat(means, scaled, *rest, *view, backend=backend, kind=kind)
    assert torch.allclose(got.color, want.color, atol=1e-5) and torch.allclose(got.normals, want.normals, atol=1e-5)
    (got.color.sum() + got.normals.sum()).backward()
    assert torch.isfinite(scaled.grad).all() and scaled.grad.abs().max() > 0


@compiled
def test_ssim_is_the_same_for_any_number_of_threads():
    x, y = torch.rand(2, 37, 21), torch.rand(2, 37, 21)
    before, got = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            got.append(ssim_mean(x, y, "cpu").item())
    finally:
        torch.set_num_threads(before)
    assert got[0] == got[1] and got[0] == pytest.approx(ssim_mean(x.double(), y.double()).item(), abs=1e-5)
