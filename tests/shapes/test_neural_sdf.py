"""The networks of an SDF: the sphere they start as, and gradients three ways."""

from __future__ import annotations

import pytest
import torch

from handhold.losses import eikonal
from handhold.shapes.neural_sdf import ColorMlp, SdfMlp, autograd_gradient


def ball(n: int, reach: float = 1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x = torch.nn.functional.normalize(torch.randn(n, 3, generator=g), dim=-1)
    return (reach * x * torch.rand(n, 1, generator=g) ** (1 / 3)).to(dtype)


@pytest.mark.parametrize("bands,skip,norm", [(6, 4, True), (6, 4, False), (0, None, True)])
def test_starts_as_a_sphere(bands, skip, norm):
    torch.manual_seed(0)
    r = 0.6
    net = SdfMlp(bands=bands, skip=skip, norm=norm, radius=r)
    x = ball(1500)
    with torch.no_grad():
        s, feature, g = net.with_gradient(x)
        assert feature.shape == (1500, 256)
        assert (s - (x.norm(dim=-1) - r)).abs().mean() < 0.1 * r
        length = g.norm(dim=-1)
        assert ((length > 0.7) & (length < 1.3)).float().mean() > 0.95
        assert net.sdf(torch.zeros(1, 3)) < 0
        assert (net.sdf(2 * r * torch.nn.functional.normalize(x, dim=-1)) > 0).all()


def small(**kw):
    torch.manual_seed(0)
    net = SdfMlp(bands=3, width=48, depth=4, skip=2, feature=5, **kw).double()
    with torch.no_grad():  # away from the start, where the encoding's weights are zero
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("norm", [True, False])
def test_gradients_agree_three_ways(norm):
    net, x = small(norm=norm), ball(40, dtype=torch.float64)
    s, feature, g = net.with_gradient(x)
    value, by_autograd = autograd_gradient(net.sdf, x)
    torch.testing.assert_close(s, value)
    torch.testing.assert_close(feature, net(x)[1])
    torch.testing.assert_close(g, by_autograd, rtol=1e-6, atol=1e-8)
    h = 1e-4 * torch.eye(3, dtype=torch.float64)
    differences = torch.stack([(net.sdf(x + e) - net.sdf(x - e)) / 2e-4 for e in h], -1)
    assert (g - differences).abs().max() < 1e-3 * g.abs().max()
    with torch.no_grad():
        torch.testing.assert_close(net.with_gradient(x)[2], g.detach())


def test_losses_on_the_gradient_train_alike():
    net, x = small(), ball(40, dtype=torch.float64).requires_grad_()
    direction = torch.randn(40, 3, dtype=torch.float64)

    def grads(s, g):
        loss = eikonal(g) + (g * direction).sum() + s.square().mean()
        return torch.autograd.grad(loss, [*net.parameters(), x])

    s, _, g = net.with_gradient(x)
    s2, g2 = autograd_gradient(net.sdf, x)
    for a, b in zip(grads(s, g), grads(s2, g2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Squares(torch.nn.Module):
    """The protocol of `shapes.encodings` with one parameter."""

    output_dim = 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, jacobian=False):
        e = self.scale * x.square()
        return (e, torch.diag_embed(2 * self.scale * x)) if jacobian else e


def test_a_given_encoding_is_used_and_registered():
    torch.manual_seed(0)
    net = SdfMlp(width=32, depth=3, skip=2, feature=1, encoding=Squares()).double()
    with torch.no_grad():
        net.layers[0].bias.add_(0.1 * torch.randn(32))
    x = ball(10, dtype=torch.float64)
    assert "encoding.scale" in dict(net.named_parameters())
    torch.testing.assert_close(net.with_gradient(x)[2], autograd_gradient(net.sdf, x)[1], rtol=1e-6, atol=1e-8)
    for wrong in ({"skip": 9}, {"skip": 0}, {"width": 32}):
        with pytest.raises(ValueError):
            SdfMlp(**wrong)


def test_eikonal_is_the_raw_mean_at_every_size():
    g = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    assert eikonal(g).item() == pytest.approx((16 + 0 + 1) / 3)
    assert torch.autograd.grad(eikonal(g), g)[0].isfinite().all()
    for error in (1e-4, 1e-2, 1.0):  # small errors are pulled as well as large ones
        g = torch.tensor([[1 + error, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(eikonal(g), g)[0][0, 0].item() == pytest.approx(2 * error)


def test_training_makes_it_a_distance():
    torch.manual_seed(0)
    net = SdfMlp(bands=2, width=48, depth=3, skip=None, feature=1, norm=False)
    adam = torch.optim.Adam(net.parameters(), 2e-3, fused=True)
    half = torch.tensor([0.5, 0.35, 0.4])
    for _ in range(150):
        x = 1.6 * torch.rand(400, 3) - 0.8
        q = x.abs() - half
        truth = q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)
        s, _, g = net.with_gradient(x)
        loss = (s - truth).abs().mean() + 0.1 * eikonal(g)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert eikonal(net.with_gradient(x)[2]) < 0.05
    assert (s - truth).abs().mean() < 0.02


@pytest.mark.parametrize("view_bands,code", [(None, 0), (4, 0), (2, 8)])
def test_color_network(view_bands, code):
    net = ColorMlp(feature=5, width=16, view_bands=view_bands, code=code)
    x = ball(7)
    rgb = net(x, x, torch.randn(7, 5), x if view_bands else None, torch.randn(7, code) if code else None)
    assert rgb.shape == (7, 3) and (rgb > 0).all() and (rgb < 1).all()
