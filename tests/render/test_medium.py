"""Densities of signed distance fields, and the weights of the quadrature."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from handhold.render.medium import (
    LaplaceDensity,
    LogisticDepth,
    laplace_density,
    neus_alpha,
    neus_optical_depth,
    transmittance,
    weights,
)


def test_laplace_density_has_its_golden_values():
    beta = 0.02
    s = torch.tensor([0.0, beta, -beta, 1e4 * beta, -1e4 * beta])
    want = torch.tensor([0.5, 0.183940, 0.816060, 0.0, 1.0]) / beta
    torch.testing.assert_close(laplace_density(s, beta), want, rtol=1e-5, atol=1e-7)
    line = laplace_density(torch.linspace(-0.3, 0.3, 1001), beta)
    assert (line[1:] <= line[:-1]).all()


def test_laplace_density_and_its_gradients_are_finite_in_float32():
    s = torch.tensor([0.0, 1.0, -1.0, 1e-8, -1e-8], requires_grad=True)
    density = LaplaceDensity(1e-4, least=1e-5)
    out = density(s)
    g = torch.autograd.grad(out.sum(), [s, density.raw])
    assert out.isfinite().all() and all(x.isfinite().all() for x in g)
    assert g[0][0] < 0  # on the surface too


def test_laplace_density_gradcheck():
    s = torch.tensor([0.0, 0.03, -0.05, 0.4], dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert gradcheck(laplace_density, (s, beta))


def test_neus_alpha_is_the_papers_quotient_and_telescopes():
    f = torch.tensor([0.3, 0.1, -0.05, -0.2, -0.1, 0.2], dtype=torch.float64)
    s = 20.0
    phi = torch.sigmoid(s * f)
    want = ((phi[:-1] - phi[1:]) / phi[:-1]).clamp(min=0)
    torch.testing.assert_close(neus_alpha(f[:-1], f[1:], s), want)
    tau = neus_optical_depth(f[:-1], f[1:], s)
    torch.testing.assert_close(tau[:3].sum(), neus_optical_depth(f[0], f[3], s))  # however it is cut
    assert (tau[3:] == 0).all()  # on the way out


def test_learned_widths_start_where_they_are_told():
    assert LogisticDepth(50.0).inv_s.item() == pytest.approx(50.0)
    assert LaplaceDensity(0.05).beta.item() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="least"):
        LaplaceDensity(1e-4)


def test_neus_alpha_is_safe_in_float32_and_gradchecks():
    far = torch.tensor([100.0, -100.0, 1.0], requires_grad=True)
    out = neus_alpha(far, far - 0.01, 1e3)
    assert out.isfinite().all() and torch.autograd.grad(out.sum(), far)[0].isfinite().all()
    start = torch.tensor([0.1, 0.3, -0.1, 0.0], dtype=torch.float64, requires_grad=True)
    end = torch.tensor([0.05, -0.2, -0.3, 0.2], dtype=torch.float64, requires_grad=True)
    s = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert gradcheck(neus_alpha, (start, end, s))


@pytest.mark.parametrize("scale", [1e-6, 1e-2, 1.0, 1e3])
def test_weights_and_what_is_left_sum_to_one(scale):
    tau = scale * torch.rand(200, 64, 3, generator=torch.Generator().manual_seed(0)) ** 4
    w = weights(tau)
    left = transmittance(tau.sum(-1))[:, -1]
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum((1, 2)) + left, torch.ones(200), rtol=0, atol=1e-6)


def test_weights_gradcheck_in_empty_and_full_space():
    torch.manual_seed(0)
    tau = torch.rand(2, 5, 2, dtype=torch.float64) * 2
    tau[0, :2], tau[1, 1, 0], tau[1, 3] = 0, 0, 1e-3
    assert gradcheck(weights, tau.requires_grad_())
