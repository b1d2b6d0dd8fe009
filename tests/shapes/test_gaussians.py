"""Gaussians move as their covariances do, and mirror without touching what they were."""

import pytest
import torch

from handhold.geometry.rigid import so3_exp
from handhold.kernels.splat_torch import shade
from handhold.render import splat
from handhold.shapes.gaussians import Gaussians, axes_of, concatenate, eigenvectors, rotate_sh

D = torch.float64


def some(n=40, degree=None, seed=0, dtype=D):
    g = torch.Generator().manual_seed(seed)
    shape = (n, 3) if degree is None else (n, (degree + 1) ** 2, 3)
    return Gaussians(
        torch.randn(n, 3, generator=g).to(dtype),
        torch.randn(n, 4, generator=g).to(dtype),
        torch.rand(n, 3, generator=g).to(dtype) + 0.1,
        torch.rand(n, generator=g).to(dtype),
        torch.randn(shape, generator=g).to(dtype),
        torch.arange(n) % 3,
    )


def affine(n=40, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.eye(3, dtype=D) + 0.3 * torch.randn(n, 3, 3, generator=g).to(D), torch.randn(n, 3, generator=g).to(D)


def test_covariance_is_symmetric_positive_and_has_the_scales():
    g = some()
    cov = g.covariance()
    assert torch.allclose(cov, cov.transpose(1, 2), atol=1e-12)
    assert torch.allclose(torch.linalg.eigvalsh(cov), g.scales.sort(dim=1)[0] ** 2, atol=1e-10)
    assert torch.allclose(some(dtype=torch.float32).covariance().double(), cov, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(D, 1e-10), (torch.float32, 3e-6)])
def test_affine_maps_mean_and_covariance(dtype, tolerance):
    g, (M, t) = some(), affine()
    out = g.to(dtype).transformed(M.to(dtype), t.to(dtype))
    assert torch.allclose(out.means.double(), (M @ g.means[..., None])[..., 0] + t, atol=10 * tolerance)
    want = M @ g.covariance() @ M.transpose(1, 2)
    assert (out.covariance().double() - want).abs().max() < tolerance * want.abs().max()
    assert (out.scales.diff(dim=1) <= 0).all() and torch.equal(out.ids, g.ids)


def test_affine_gradient_is_that_of_the_covariance():
    g, (M, t) = some(6), affine(6)
    weight = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(2)).to(D)
    g.scales[0] = 0.3  # a ball: its axes are arbitrary, and nothing may become NaN
    M[0] = torch.eye(3)

    def f(quats, scales, M):
        return (g.with_values(quats=quats, scales=scales).transformed(M, t).covariance() * weight).sum((1, 2))[1:]

    def direct(quats, scales, M):
        cov = g.with_values(quats=quats, scales=scales).covariance()
        return ((M @ cov @ M.transpose(1, 2)) * weight).sum((1, 2))[1:]

    leaves = [x.clone().requires_grad_() for x in (g.quats, g.scales, M)]
    got = torch.autograd.grad(f(*leaves).sum(), leaves)
    want = torch.autograd.grad(direct(*leaves).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all() and torch.allclose(a, b, atol=1e-7 * b.abs().max())
    ball = torch.eye(3, dtype=D)[None].requires_grad_()
    quats, scales = axes_of(ball)
    (quats.sum() + scales.sum()).backward()
    assert torch.isfinite(ball.grad).all()


def test_similarity_scales_covariance_by_its_square_and_agrees_with_affine():
    g = some(degree=3)
    R, t, s = so3_exp(torch.tensor([0.3, -0.8, 0.5], dtype=D)), torch.tensor([0.1, 0.2, -0.3], dtype=D), 1.7
    out, general = g.similar(R, t, s), g.transformed(s * R, t)
    assert torch.allclose(out.covariance(), s * s * R @ g.covariance() @ R.T, atol=1e-10)
    assert torch.allclose(out.means, general.means) and torch.allclose(
        out.covariance(), general.covariance(), atol=1e-9
    )
    assert torch.allclose(out.colors, general.colors, atol=1e-9)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_colours_turn_with_the_gaussians(degree):
    g = some(degree=degree)
    R, t = so3_exp(torch.tensor([0.9, 0.4, -1.2], dtype=D)), torch.tensor([0.3, 0.1, 5.0], dtype=D)
    camera = torch.eye(4, dtype=D)
    camera[:3, :3], camera[:3, 3] = R, t  # moving the scene or the camera: the same picture
    want = shade(g.means, g.colors, camera, degree)
    moved = g.similar(R, t)
    assert torch.allclose(shade(moved.means, moved.colors, torch.eye(4, dtype=D), degree), want, atol=1e-9)
    assert torch.allclose(rotate_sh(g.colors, R.expand(len(g), 3, 3)), moved.colors, atol=1e-12)


def test_mirror_is_an_involution_that_changes_nothing_in_place():
    g = some(degree=3)
    before = [getattr(g, k).clone() for k in ("means", "quats", "scales", "opacities", "colors", "ids")]
    once, again = g.mirrored(), g.mirrored()
    for k, old in zip(("means", "quats", "scales", "opacities", "colors", "ids"), before, strict=True):
        assert torch.equal(getattr(g, k), old) and torch.equal(getattr(once, k), getattr(again, k))
        assert torch.equal(getattr(once.mirrored(), k), old)
    X = torch.diag(torch.tensor([-1.0, 1, 1], dtype=D))
    assert torch.allclose(once.covariance(), X @ g.covariance() @ X, atol=1e-12)
    w, x, y, z = g.quats.unbind(1)
    assert torch.equal(once.quats, torch.stack([w, x, -y, -z], 1))


def test_both_hands_teach_the_shared_gaussians():
    """One canonical set, posed as the right hand and, mirrored, as the left: each frame's loss reaches every part."""
    g = some(8, dtype=torch.float32)
    leaves = [x.clone().requires_grad_() for x in (g.means * 0.1, g.quats, g.scales * 0.05, g.opacities, g.colors)]
    K, view = torch.tensor([[[30.0, 0, 8], [0, 30, 8], [0, 0, 1]]]), torch.eye(4)[None].clone()
    view[0, 2, 3] = 1
    shared = Gaussians(*leaves, g.ids)
    for hand in (shared, shared.mirrored()):
        r = splat(hand.means, hand.quats, hand.scales, hand.opacities, hand.colors, view, K, 16, 16)
        grads = torch.autograd.grad((r.color * r.color).sum() + r.normals.sum(), leaves)
        assert all(v.norm() > 0 for v in grads)
    assert torch.equal(r.alpha.flip(2)[0, ..., 0] > 0, splat(*leaves, view, K, 16, 16).alpha[0, ..., 0] > 0)


@pytest.mark.parametrize("degree", [None, 0, 1, 2, 3])
def test_mirrored_colours_are_those_of_the_mirrored_view(degree):
    g = some(degree=degree)
    camera = torch.eye(4, dtype=D)
    camera[:3, 3] = torch.tensor([0.4, -0.2, 4.0], dtype=D)
    other = camera.clone()
    other[0, 3] *= -1
    m = g.mirrored()
    assert torch.allclose(shade(m.means, m.colors, other, degree), shade(g.means, g.colors, camera, degree), atol=1e-12)


def test_wrong_shapes_are_named_and_parts_join():
    g = some()
    with pytest.raises(ValueError, match="linear"):
        g.transformed(torch.eye(4, dtype=D), torch.zeros(3, dtype=D))
    with pytest.raises(ValueError, match="second size"):
        rotate_sh(torch.zeros(2, 5, 3), torch.eye(3))
    assert len(concatenate([g, g.mirrored()])) == 80


def test_eigenvectors_are_those_of_eigh():
    g = torch.Generator().manual_seed(3)
    half = torch.randn(300, 3, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1e-2, 1e-5]).double()
    cov = half @ half.mT
    cov[0], cov[1], cov[2] = 0, torch.eye(3), torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    axes = eigenvectors(cov)
    assert torch.allclose(axes.mT @ axes, torch.eye(3).double().expand(300, 3, 3), atol=1e-12)
    local = axes.mT @ cov @ axes
    want = torch.linalg.eigvalsh(cov).flip(-1)
    size = cov.abs().amax((1, 2)) + 1e-30
    assert ((local - torch.diag_embed(want)).abs().amax((1, 2)) < 1e-10 * size).all()
