"""Surfaces out of fields and depth images: where they lie, that they close, what is asked and what is dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.errors import StageFailed
from handhold.geometry import meshes
from handhold.geometry.queries import MeshQueries
from handhold.render.fusion import _peak_depth, cameras_around, mesh_from_gaussians
from handhold.shapes.extraction import clean, extract_grid, extract_surface
from handhold.shapes.fusion import fuse_depths
from handhold.shapes.gaussians import Gaussians
from solids import rays, sphere_depth

CENTRE, RADIUS = torch.tensor([0.13, -0.07, 0.21]), 0.5


def ball(x: torch.Tensor) -> torch.Tensor:
    return (x - CENTRE).norm(dim=-1) - RADIUS


def volume(mesh) -> float:
    return float(meshes.volume(torch.from_numpy(mesh.vertices).double(), torch.from_numpy(mesh.faces).long()))


def test_a_shifted_sphere_is_where_it_is():
    """Golden 51."""
    mesh, report = extract_surface(ball, -0.8, 0.8, 128, color=lambda x: (x - CENTRE) + 0.5)
    radius = np.linalg.norm(mesh.vertices - CENTRE.numpy(), axis=1)
    assert np.abs(radius - RADIUS).max() < 2e-4 and np.abs(radius.mean() - RADIUS) < 1e-4
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=1e-3)
    assert np.abs(mesh.colors - np.clip(mesh.vertices - CENTRE.numpy() + 0.5, 0, 1)).max() < 1e-5
    assert not report.notes() and not report.capped


def test_a_fine_grid_is_asked_sparsely_and_its_values_are_those_of_the_dense_grid():
    asked = 0

    def count(x):
        nonlocal asked
        asked += len(x)
        return ball(x)

    _, report = extract_surface(count, -0.9, 0.9, 256)
    assert asked == report.evaluations < 0.05 * report.nodes
    sparse, _ = extract_surface(ball, -0.9, 0.9, 60)
    axis = -0.9 + 0.03 * np.arange(61)
    x = torch.from_numpy(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).astype(np.float32))
    dense, _ = extract_grid(ball(x), -0.9, 0.03)
    assert np.array_equal(sparse.faces, dense.faces) and np.allclose(sparse.vertices, dense.vertices, atol=1e-6)


@pytest.mark.parametrize("resolution", [3, 17, 50])
def test_any_box_and_resolution(resolution):
    """Sides that are no multiple of the blocks; the same surface as a dense evaluation."""

    def box(x):
        q = (x - torch.tensor([0.1, 0.2, 0.0])).abs() - torch.tensor([0.5, 0.3, 0.11])
        return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

    mesh, report = extract_surface(box, [-0.6, -0.3, -0.4], [0.9, 0.63, 0.3], resolution)
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2
    h = 1.5 / resolution
    assert volume(mesh) == pytest.approx(8 * 0.5 * 0.3 * 0.11, rel=0.02 + 2 * h) or resolution == 3
    assert np.abs(box(torch.from_numpy(mesh.vertices)).numpy()).max() < h


def test_thin_parts_are_found_by_the_bound_and_followed_without_it():
    """A rod a cell and a half thick; then the same field overestimated twenty times, which breaks the bound."""

    def rod(x):
        along = x[:, 0].clamp(-0.6, 0.6)
        return torch.stack([x[:, 0] - along, x[:, 1] - 0.013, x[:, 2] - 0.021], -1).norm(dim=-1) - 0.012

    mesh, _ = extract_surface(rod, -0.8, 0.8, 100)
    assert np.ptp(mesh.vertices[:, 0]) == pytest.approx(1.224, abs=0.01) and meshes.is_watertight(mesh.faces)
    wrong, _ = extract_surface(lambda x: torch.where(x[:, 0] > -0.5, 20.0, 1.0) * rod(x), -0.8, 0.8, 100)
    assert np.ptp(wrong.vertices[:, 0]) == pytest.approx(1.224, abs=0.01) and meshes.is_watertight(wrong.faces)


def test_the_border_caps_and_one_sign_is_an_error():
    """Golden 52."""
    mesh, report = extract_surface(lambda x: x[:, :2].norm(dim=-1) - 0.3, -0.5, 0.5, 40)
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2
    assert report.capped and "border" in report.notes()[0]
    assert mesh.vertices[:, 2].min() == -0.5 and mesh.vertices[:, 2].max() == 0.5
    assert volume(mesh) == pytest.approx(np.pi * 0.09, rel=0.01)
    with pytest.raises(StageFailed, match="positive in all"):
        extract_surface(lambda x: x.norm(dim=-1) + 1, -0.5, 0.5, 20)
    with pytest.raises(StageFailed, match="negative in all"):
        extract_surface(lambda x: x.norm(dim=-1) - 3, -0.5, 0.5, 20)


def spheres(*parts):
    """Union of (centre, radius, sign): sign -1 cuts out."""

    def field(x):
        out = torch.full((len(x),), 1e3)
        for centre, radius, sign in parts:
            d = (x - torch.tensor(centre)).norm(dim=-1) - radius
            out = torch.minimum(out, d) if sign > 0 else torch.maximum(out, -d)
        return out

    return field


def test_what_is_dropped_and_filled_is_reported():
    """Golden 53: a hollow ball with a ball inside its cavity, and a loose one."""
    field = spheres(
        ((0.0, 0.0, 0.0), 0.4, 1), ((0.0, 0.0, 0.0), 0.3, -1), ((0.0, 0.0, 0.05), 0.1, 1), ((0.6, 0.6, 0.6), 0.2, 1)
    )
    mesh, report = extract_surface(field, -0.9, 0.9, 72)
    assert volume(mesh) == pytest.approx(4 / 3 * np.pi * 0.4**3, rel=0.01)
    assert report.pieces_dropped == 1 and report.cavities_filled == 1
    # the share of the loose ball among the shells that are left when the cavity is filled
    assert report.dropped_share == pytest.approx(0.2**3 / (0.4**3 + 0.2**3), rel=0.02)
    assert report.filled_share == pytest.approx(0.3**3 / 0.4**3, rel=0.02)
    assert "1 loose piece" in report.notes()[0] and "1 cavity" in report.notes()[1]
    everything, report = extract_surface(field, -0.9, 0.9, 72, keep=None, fill_cavities=False)
    assert volume(everything) == pytest.approx(4 / 3 * np.pi * (0.4**3 - 0.3**3 + 0.1**3 + 0.2**3), rel=0.01)
    assert report.pieces_dropped == report.cavities_filled == 0 and meshes.is_watertight(everything.faces)
    hollow, _ = extract_surface(field, -0.9, 0.9, 72, keep=1, fill_cavities=False)
    assert volume(hollow) == pytest.approx(4 / 3 * np.pi * (0.4**3 - 0.3**3), rel=0.01)


def test_noise_gives_a_closed_mesh_too():
    noise = np.random.default_rng(0).normal(size=(20, 21, 22))
    noise[3, 4, 5] = 0.0
    mesh, _ = extract_grid(noise, 0.0, 1.0, keep=None, fill_cavities=False)
    assert meshes.is_watertight(mesh.faces)
    mesh, report = extract_grid(noise + 1.2, 0.0, 1.0)
    assert meshes.is_watertight(mesh.faces) and report.pieces_dropped > 5


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="empty"):
        extract_surface(ball, 0.5, -0.5)
    with pytest.raises(ValueError, match="resolution"):
        extract_surface(ball, -1, 1, 5000)
    with pytest.raises(ValueError, match="not finite"):
        extract_surface(lambda x: x[:, 0] * float("nan"), -1, 1, 16)
    with pytest.raises(ValueError, match="values for"):
        extract_surface(lambda x: x[:3, 0], -1, 1, 16)
    with pytest.raises(ValueError, match="nodes"):
        extract_grid(np.zeros((3, 3)), 0, 1.0)
    with pytest.raises(ValueError, match="keep"):
        clean(np.zeros((3, 3)), np.array([[0, 1, 2]]), keep=0)
    with pytest.raises(StageFailed, match="no volume"):
        clean(np.eye(3), np.array([[0, 1, 2], [0, 2, 1]]))


def fused_sphere(views=24, size=96, resolution=48, half=False, **kw):
    c, r = np.array([0.1, -0.05, 0.2]), 0.05
    poses, K = cameras_around(c, 1.8 * r, views, size)
    if half:
        poses = poses[views // 2 :]
    depths = np.stack([sphere_depth(p, r, c, K=K, width=size, height=size) for p in poses])
    colors = np.full((*depths.shape, 3), [0.2, 0.5, 0.7])
    Ks = np.repeat(K[None], len(poses), 0)
    mesh, report = fuse_depths(depths, colors, None, Ks, poses, c - 1.3 * r, c + 1.25 * r, resolution, **kw)
    return mesh, report, np.linalg.norm(mesh.vertices - c, axis=1) / r


def test_depths_of_a_sphere_fuse_to_the_sphere():
    mesh, report, radius = fused_sphere()
    assert abs(radius.mean() - 1) < 0.003 and np.abs(radius - 1).max() < 0.015
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2 and volume(mesh) > 0
    assert mesh.observed.all() and np.allclose(mesh.colors, [0.2, 0.5, 0.7], atol=0.02)
    assert report.evaluations < 0.5 * report.nodes


def test_what_no_view_saw_is_closed_and_marked():
    """Cameras in the lower half space alone: the far side is closed by what the silhouettes leave, and not observed."""
    mesh, _, radius = fused_sphere(half=True)
    assert meshes.is_watertight(mesh.faces)
    seen = mesh.observed
    assert 0.4 < seen.mean() < 1 and np.abs(radius[seen] - 1).max() < 0.05
    assert np.allclose(mesh.colors, [0.2, 0.5, 0.7], atol=0.02)


def test_a_wall_of_two_cells_keeps_both_its_sides():
    """A box's depth from all around and one big hole cut out of it: a tray, seen from above and below."""

    def tray(x):
        def box(x, half):
            q = x.abs() - torch.tensor(half)
            return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)

        return torch.maximum(box(x, [0.05, 0.04, 0.02]), -box(x - torch.tensor([0, 0, 0.01]), [0.046, 0.036, 0.025]))

    truth, _ = extract_surface(tray, -0.055, 0.055, 110)
    exact = MeshQueries(truth.vertices, truth.faces)
    poses, K = cameras_around(np.zeros(3), 0.07, 32, 96)
    casts = [rays(p, K, 96, 96) for p in poses]
    depths = np.stack([exact.first_hits(np.broadcast_to(o, d.shape), d).t for o, d in casts])
    mesh, _ = fuse_depths(depths, None, None, np.repeat(K[None], 32, 0), poses, -0.06, 0.06, 60)
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2
    distance = exact.nearest(mesh.vertices).distance
    assert distance.mean() < 2.5e-4 and volume(mesh) == pytest.approx(volume(truth), rel=0.1)


def test_fusion_refuses_what_it_cannot_use():
    d, K, pose = np.ones((2, 8, 8)), np.repeat(np.eye(3)[None], 2, 0), np.repeat(np.eye(4)[None], 2, 0)
    with pytest.raises(ValueError, match="depths are"):
        fuse_depths(d[0], None, None, K, pose, 0, 1)
    with pytest.raises(ValueError, match="need Ks"):
        fuse_depths(d, None, None, K[:1], pose, 0, 1)
    with pytest.raises(ValueError, match="on some pixels"):
        fuse_depths(d * np.nan, None, np.ones((2, 8, 8), bool), K, pose, 0, 1)
    with pytest.raises(ValueError, match="colors are"):
        fuse_depths(d, d, None, K, pose, 0, 1)
    with pytest.raises(ValueError, match="truncation"):
        fuse_depths(d, None, None, K, pose, 0, 1, truncation=-1)


def sphere_of_gaussians(count: int, centre: torch.Tensor, radius: float, spread: float) -> Gaussians:
    """Flat discs on a Fibonacci sphere, coloured by direction."""
    i = np.arange(count) + 0.5
    up, turn = 1 - 2 * i / count, np.pi * (1 + 5**0.5) * i
    flat = np.sqrt(1 - up**2)
    d = torch.from_numpy(np.stack([np.cos(turn) * flat, np.sin(turn) * flat, up], 1).astype(np.float32))
    z = torch.tensor([0.0, 0, 1]).expand(count, 3)
    quats = torch.cat([1 + (z * d).sum(-1, keepdim=True), torch.linalg.cross(z, d)], -1)
    s = spread * radius * (4 * np.pi / count) ** 0.5
    scales = torch.tensor([s, s, 0.1 * s]).expand(count, 3).contiguous()
    opacities, ids = torch.full((count,), 0.95), torch.zeros(count, dtype=torch.long)
    return Gaussians(centre + radius * d, quats, scales, opacities, d * 0.5 + 0.5, ids)


def test_a_sphere_of_gaussians_becomes_its_mesh():
    centre, radius = torch.tensor([0.1, -0.05, 0.2]), 0.05
    gaussians = sphere_of_gaussians(12000, centre, radius, 0.6)
    mesh, _ = mesh_from_gaussians(gaussians, views=24, size=192, resolution=56)
    away = (mesh.vertices - centre.numpy()) / radius
    r = np.linalg.norm(away, axis=1)
    assert abs(r.mean() - 1) < 0.01 and np.abs(r - 1).max() < 0.03
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2
    assert np.abs(mesh.colors - (away * 0.5 + 0.5)).mean() < 0.01
    with pytest.raises(ValueError, match="0 Gaussians"):
        mesh_from_gaussians(Gaussians(*(x[:0] for x in vars(gaussians).values())))


def test_a_slanted_flat_gaussian_is_met_where_its_plane_is():
    c, angle = torch.tensor([[0.1, 0.05, 1.0]]), 0.9
    quat = torch.tensor([[np.cos(angle / 2), 0.0, np.sin(angle / 2), 0.0]], dtype=torch.float32)  # about y
    one = torch.ones(1)
    g = Gaussians(c, quat, torch.tensor([[0.2, 0.2, 0.05]]), one, torch.ones(1, 3), one.long())
    K = torch.tensor([[100.0, 0, 32], [0, 100, 32], [0, 0, 1]])
    which = torch.full((64, 64), -1)
    which[30:50, 35:55] = 0
    z = _peak_depth(which, g, torch.eye(4), K, "2d")
    y, x = torch.nonzero(which >= 0, as_tuple=True)
    ray = torch.stack([(x + 0.5 - 32) / 100, (y + 0.5 - 32) / 100, torch.ones(len(x))], -1)
    n = torch.tensor([np.sin(angle), 0, np.cos(angle)], dtype=torch.float32)
    assert torch.allclose(z[which >= 0], (c @ n) / (ray @ n), atol=1e-4) and (z[which < 0] == 0).all()
