"""Normals, depths and 2D Gaussians: what they say of surfaces whose truth is known."""

import math

import pytest
import torch

from handhold import kernels
from handhold.losses import depth_normal_consistency
from handhold.render import splat
from handhold.render.depth import normals_from_depth

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]
K = torch.tensor([[60.0, 0, 24], [0, 60, 20], [0, 0, 1]])
W, H = 48, 40


pytestmark = pytest.mark.usefixtures("one_thread")


def turned(angle, axis="y"):
    """Camera-from-world that looks at the origin from 1 m, turned by `angle`."""
    c, s = math.cos(angle), math.sin(angle)
    view = torch.eye(4)
    view[:3, :3] = torch.tensor(
        [[c, 0, s], [0, 1, 0], [-s, 0, c]] if axis == "y" else [[1, 0, 0], [0, c, -s], [0, s, c]]
    )
    view[2, 3] = 1.0
    return view


def sheet(n=24, opacity=0.95):
    """Disks on the plane z = 0 of the world, 1.2 m wide."""
    at = torch.linspace(-0.6, 0.6, n)
    x, y = torch.meshgrid(at, at, indexing="ij")
    means = torch.stack([x, y, torch.zeros_like(x)], -1).reshape(-1, 3)
    m = len(means)
    scales = torch.tensor([0.05, 0.05, 1e-4]).repeat(m, 1)
    return means, torch.tensor([[1.0, 0, 0, 0]]).repeat(m, 1), scales, torch.full((m,), opacity), torch.ones(m, 3)


def plane_depth(view):
    """Camera z at which each pixel's ray meets the world's plane z = 0."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")
    ray = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1)
    normal = view[:3, 2]
    return (view[:3, 3] @ normal) / (ray.to(view) @ normal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_disks_on_a_plane_show_its_depth_and_normal(backend, axis):
    view = turned(0.7, axis)
    r = splat(*sheet(), view[None], K[None], W, H, backend=backend, kind="2d")
    solid = r.alpha[0, ..., 0] > 0.99
    assert solid.float().mean() > 0.5
    truth = plane_depth(view)
    for depth in (r.depth, r.median_depth):
        assert ((depth[0, ..., 0] - truth).abs() / truth)[solid].max() < 2e-3
    assert torch.allclose(r.normals[0], r.alpha[0] * torch.tensor([0.0, 0, -1]), atol=1e-5)
    surface = normals_from_depth(r.median_depth, view[None], K[None])[0]
    inner = torch.nn.functional.avg_pool2d(solid[None, None].float(), 3, 1, 1)[0, 0] == 1
    assert (surface[inner] @ torch.tensor([0.0, 0, -1])).min() > 0.999
    assert depth_normal_consistency(r.normals, r.alpha, r.depth, view[None], K[None]) < 0.02


def test_consistency_rises_when_disks_tilt_and_pulls_them_back():
    view = turned(0.0)[None]
    means, quats, scales, opacities, colors = sheet(12)
    losses = []
    for tilt in (0.0, 0.3, 0.6):
        q = torch.tensor([[math.cos(tilt / 2), math.sin(tilt / 2), 0, 0]]).repeat(len(means), 1).requires_grad_()
        r = splat(means, q, scales, opacities, colors, view, K[None], W, H, kind="2d")
        loss = depth_normal_consistency(r.normals, r.alpha, r.depth.detach(), view, K[None])
        loss.backward()
        losses.append(loss.item())
    assert losses[0] < losses[1] < losses[2]
    assert q.grad[:, 1].sum() > 0  # descent lessens the tilt


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals_are_shortest_axes_turned_to_the_camera(backend):
    means, quats, scales, opacities, colors = sheet(6)
    scales = scales[:, [2, 0, 1]]  # shortest along x
    quats = torch.tensor([[math.sqrt(0.5), 0, math.sqrt(0.5), 0]]).repeat(len(means), 1)  # x turned onto z
    for angle, z in ((0.4, -1.0), (math.pi - 0.4, 1.0)):
        view = turned(angle)
        lazy = splat(means, quats, scales, opacities, colors, view[None], K[None], W, H, backend=backend)
        now = splat(means, quats, scales, opacities, colors, view[None], K[None], W, H, backend=backend, normals=True)
        assert torch.allclose(lazy.normals, now.normals, atol=1e-6) and lazy.normals is lazy.normals
        assert torch.allclose(lazy.normals[0], lazy.alpha[0] * torch.tensor([0.0, 0, z]), atol=1e-5)
        assert torch.equal(lazy.color, now.color) and torch.equal(lazy.depth, now.depth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_median_depth_is_the_gaussian_that_halves_the_light(backend):
    z = torch.tensor([1.0, 2.0, 3.0])
    means = torch.stack([torch.zeros(3), torch.zeros(3), z], -1).requires_grad_()
    scales = torch.full((3, 1), 0.3) * z[:, None].expand(3, 3)
    quats, colors = torch.tensor([[1.0, 0, 0, 0]]).repeat(3, 1), torch.ones(3, 3)
    for opacities, which in (
        ([0.6, 0.9, 0.9], 0),
        ([0.3, 0.2, 0.9], 2),
        ([0.3, 0.29, 0.1], 1),
        ([0.3, 0.2, 0.1], None),
    ):
        r = splat(
            means, quats, scales, torch.tensor(opacities), colors, torch.eye(4)[None], K[None], W, H, backend=backend
        )
        if which is None:
            assert r.median[0, 20, 24] == -1 and r.median_depth[0, 20, 24] == 0
            continue
        assert r.median[0, 20, 24] == which and r.median_depth[0, 20, 24, 0].item() == pytest.approx(z[which].item())
        (grad,) = torch.autograd.grad(r.median_depth[0, 20, 24, 0], means)
        assert torch.equal(grad, torch.eye(3)[which][:, None] * torch.tensor([0.0, 0, 1]))
    assert (r.median[0, 0] == -1).all() and r.median.dtype == torch.int32


def test_reading_normals_after_a_step_is_refused():
    means, *rest = sheet(4)
    means.requires_grad_()
    r = splat(means, *rest, turned(0.2)[None], K[None], W, H)
    with torch.no_grad():
        means += 0.01
    for name in ("normals", "median_depth"):
        with pytest.raises(RuntimeError, match=name):
            getattr(r, name)
    with torch.no_grad():
        r = splat(means, *rest, turned(0.2)[None], K[None], W, H)
    assert not r.normals.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disk_has_the_paper_s_footprint(backend):
    """Face on: exp(-r^2 / 2 s^2), never narrower than 1/sqrt(2) px; edge on: only that low-pass filter is left."""
    one = lambda *v: torch.tensor([v])  # noqa: E731
    for s, sigma in ((0.05, 3.0), (0.001, math.sqrt(0.5))):
        k = torch.tensor([[60.0, 0, 20.5], [0, 60, 20.5], [0, 0, 1]])
        r = splat(one(0.0, 0, 1), one(1.0, 0, 0, 0), one(s, s, 1e-9), torch.tensor([0.9]), torch.ones(1, 3),
                  torch.eye(4)[None], k[None], 41, 41, backend=backend, kind="2d")  # fmt: skip
        dx = torch.arange(41) - 20.0
        want = 0.9 * torch.exp(-0.5 * dx**2 / sigma**2)
        want[want < 1 / 255] = 0
        assert torch.allclose(r.alpha[0, 20, :, 0], want, atol=1e-5)
    q = math.sqrt(0.5)
    r = splat(one(0.0, 0, 1), one(q, 0, q, 0), one(0.1, 0.1, 0.1), torch.tensor([0.9]), torch.ones(1, 3),
              torch.eye(4)[None], k[None], 41, 41, backend=backend, kind="2d")  # fmt: skip
    assert torch.allclose(r.alpha[0, 20, 18:23, 0], 0.9 * torch.exp(-(dx[18:23] ** 2)), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_disk_across_the_camera_plane_is_drawn_only_in_front(backend):
    """A large disk seen edge on, below the camera, like a floor: visible below the horizon alone."""
    q = math.sqrt(0.5)
    floor = torch.tensor([[0.0, 0.3, 0.5]]), torch.tensor([[q, q, 0, 0]]), torch.tensor([[3.0, 3.0, 1.0]])
    camera = torch.eye(4)[None], K[None], W, H
    r = splat(*floor, torch.tensor([1.0]), torch.ones(1, 3), *camera, backend=backend, kind="2d")
    y = torch.arange(H) + 0.5
    truth = 0.3 * K[1, 1] / (y - K[1, 2])
    seen = r.alpha[0, :, 24, 0] > 0
    assert not seen[y < K[1, 2]].any() and seen[y > K[1, 2] + 3].all()
    assert torch.allclose(r.depth[0, 24:, 24, 0], truth[24:], rtol=1e-4)


def test_normals_from_depth_of_a_plane_and_their_gaps():
    view = turned(0.6, "x")
    depth = plane_depth(view.double())[None, ..., None]
    normals = normals_from_depth(depth, view[None].double(), K[None].double())
    assert torch.allclose(
        normals[0, 1:-1, 1:-1], torch.tensor([0.0, 0, -1]).double().expand(H - 2, W - 2, 3), atol=1e-6
    )
    assert (normals[0, 0] == 0).all() and (normals[0, :, -1] == 0).all()
    depth[0, 10, 10] = 0
    gaps = normals_from_depth(depth, view[None].double(), K[None].double())[0].norm(dim=-1) == 0
    assert gaps[1:-1, 1:-1].sum() == 4 and gaps[9, 10] and gaps[10, 9]
    assert (normals_from_depth(depth[:, :2], view[None], K[None]) == 0).all()
    small = depth[:, 4:9, 4:9].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda d: normals_from_depth(d, view[None].double(), K[None].double()), small)
    with pytest.raises(ValueError, match="depth"):
        normals_from_depth(depth[..., 0], view[None], K[None])
    with pytest.raises(ValueError, match="viewmats"):
        normals_from_depth(depth, view[None, :3], K[None])
