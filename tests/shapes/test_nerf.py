"""NeRF and NeRF++: the encoding, the inverted sphere, and a small scene learned from pictures."""

from __future__ import annotations

import pytest
import torch

from handhold.render import samplers
from handhold.render.volume import density_body, inverted_sphere, render_rays
from handhold.shapes.nerf import Nerf, fourier, fourier_size, inverted_sphere_points
from sdfs import box, sphere


def test_fourier_layout():
    x = torch.tensor([[0.1, -0.2, 0.3]])
    out = fourier(x, 2)
    want = torch.cat([x, x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], -1)
    torch.testing.assert_close(out, want)
    assert out.shape[-1] == fourier_size(3, 2) == 15
    torch.testing.assert_close(fourier(x, 1, pi=True)[:, 3:6], (torch.pi * x).sin())


def test_the_default_network_is_the_papers():
    net = Nerf()
    assert sum(p.numel() for p in net.parameters()) == 595_844
    sigma, rgb = net(torch.randn(5, 3), torch.randn(5, 3))
    assert sigma.shape == (5,) and rgb.shape == (5, 3) and (sigma >= 0).all()
    with pytest.raises(ValueError):
        net(torch.randn(5, 4), torch.randn(5, 3))
    with pytest.raises(ValueError):
        Nerf(depth=4)


def test_inverted_sphere_points_are_on_the_ray():
    g = torch.Generator().manual_seed(0)
    d = torch.nn.functional.normalize(torch.randn(50, 3, generator=g, dtype=torch.float64), dim=-1)
    o = torch.rand(50, 3, generator=g, dtype=torch.float64)
    s = torch.rand(50, generator=g, dtype=torch.float64)
    q = inverted_sphere_points(o, d, s, 2.0)
    torch.testing.assert_close(q[:, :3].norm(dim=-1), torch.ones(50, dtype=torch.float64))
    x = q[:, :3] * 2 / s[:, None]
    along = ((x - o) * d).sum(-1, keepdim=True)
    assert (along > 0).all()
    torch.testing.assert_close(o + along * d, x)
    torch.testing.assert_close(inverted_sphere_points(o, d, torch.zeros_like(s), 2.0)[:, :3], d)


def scene(o, d):
    """(N,3) a red ball and a striped blue box before a sky that depends on the direction alone, traced exactly."""
    t = torch.zeros(len(o))
    for _ in range(60):
        x = o + t[:, None] * d
        ball, cube = sphere(x, (-0.35, 0.0, 0.0), 0.35), box(x, (0.4, 0.0, 0.0), (0.25, 0.3, 0.3))
        t = t + torch.minimum(ball, cube).clamp(max=0.5)
    x = o + t[:, None] * d
    stripes = torch.where(torch.sin(8 * x[:, 2:]) > 0, torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.2, 0.8, 0.9]))
    color = torch.where((ball < cube)[:, None], torch.tensor([0.9, 0.15, 0.1]), stripes)
    sky = 0.5 + 0.4 * d[:, [1, 2, 0]]
    return torch.where((t < 6)[:, None], color, sky)


def camera(angle: float, height: float, n: int = 20):
    a = torch.tensor(angle)
    eye = 1.6 * torch.nn.functional.normalize(torch.stack([a.cos(), torch.tensor(height), a.sin()]), dim=0)
    z = -eye / eye.norm()
    x = torch.nn.functional.normalize(torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), z), dim=0)
    pose = torch.eye(4)
    pose[:3, :3], pose[:3, 3] = torch.stack([x, torch.linalg.cross(z, x), z], -1), eye
    K = torch.tensor([[1.0 * n, 0, n / 2], [0, 1.0 * n, n / 2], [0, 0, 1]])
    at = torch.arange(n) + 0.5
    xy = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).reshape(-1, 2)
    return samplers.camera_rays(K, pose, xy)


def test_a_small_scene_is_learned_from_pictures():
    """Foreground NeRF and NeRF++ background together, from 12 pictures of 20 x 20; judged on one not seen."""
    torch.manual_seed(0)
    views = [camera(2 * torch.pi * k / 12, 0.5 * (-1) ** k) for k in range(12)]
    o, d = torch.cat([v.o for v in views]), torch.cat([v.d for v in views])
    truth = scene(o, d)
    small = {"width": 48, "depth": 3, "skips": (), "view_bands": 0, "color_width": 24}
    near = Nerf(bands=4, **small, density_scale=3.0)
    far = Nerf(d_in=4, bands=2, **small)
    adam = torch.optim.Adam([*near.parameters(), *far.parameters()], 5e-3, fused=True)

    def render(rays, jitter):
        inside = lambda r: samplers.stratified(samplers.sphere_bounds(r, 1.0), 25, jitter)  # noqa: E731
        outside = inverted_sphere(lambda p: far(p.x, p.d), 1.0, 4, jitter)
        return render_rays(rays, [density_body(lambda p: near(p.x, p.d), inside)], outside).rgb

    for _ in range(110):
        pick = torch.randint(len(o), (256,))
        loss = (render(samplers.Rays(o[pick], d[pick]), True) - truth[pick]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    unseen = camera(0.8, 0.1)
    with torch.no_grad():
        want = scene(unseen.o, unseen.d)
        error = (render(unseen, False) - want).square().mean()
    assert error < 10**-1.8  # 18 dB
    assert error < 0.2 * (want - want.mean(0)).square().mean()
