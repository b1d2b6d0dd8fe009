"""From silhouettes to a surface: a sphere's hull, what carves and what does not, and the mesh of a grid."""

from __future__ import annotations

import numpy as np
import torch

from handhold.geometry import meshes
from handhold.kernels.grid import SdfGrid
from handhold.shapes.sdf import View, open_thin, smooth, surface, visual_hull
from solids import K, around, sphere_depth

R, RADIUS = 33, 0.05
LO, H = np.full(3, -0.08), 0.16 / 32


def nodes() -> np.ndarray:
    return np.stack(np.meshgrid(*(LO[k] + H * np.arange(R) for k in range(3)), indexing="ij"), -1)


def sphere_views(count: int = 24, **kw) -> list[View]:
    out = []
    for pose in around(count, 0.4):
        inside = np.isfinite(sphere_depth(pose, RADIUS))
        out.append(View(pose, inside, np.zeros_like(inside), **kw))
    return out


def radii(phi: np.ndarray, count: int = 400) -> np.ndarray:
    """Distance from the origin at which the field turns positive, along random directions."""
    d = np.random.default_rng(0).normal(size=(count, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    t = np.linspace(0, 0.079, 200)
    grid = SdfGrid(torch.as_tensor(phi), LO, H)
    with torch.no_grad():
        x = torch.as_tensor(t[None, :, None] * d[:, None], dtype=torch.float32)
        outside = (grid.sample_sdf(x)[0] > 0).numpy()
    return np.where(outside.any(1), t[outside.argmax(1)], np.inf)


def test_hull_of_a_sphere_is_the_sphere():
    r = radii(visual_hull(sphere_views(), K, R, LO, H, quantile=1.0))
    assert abs(np.median(r) - RADIUS) < H and r.min() > RADIUS - H and np.quantile(r, 0.95) < RADIUS + 1.5 * H


def test_unknown_pixels_do_not_carve():
    """A hand over half of the object in half of the views: what the other views see stays."""
    views = sphere_views()
    for i in range(0, len(views), 2):
        inside, unknown = views[i].inside.copy(), np.zeros_like(views[i].inside)
        unknown[:, 47:] = True
        views[i] = View(views[i].cam_from_object, inside & ~unknown, unknown)
    phi = visual_hull(views, K, R, LO, H, quantile=1.0)
    assert radii(phi).min() > RADIUS - H
    for i in range(0, len(views), 2):  # the same pixels called background do carve
        views[i] = View(views[i].cam_from_object, views[i].inside, np.zeros_like(views[i].unknown))
    carved = visual_hull(views, K, R, LO, H, quantile=1.0)
    assert (carved < 0).sum() < 0.5 * (phi < 0).sum()


def test_what_most_views_hide_is_not_object():
    """A solid that moves with the object and hides all behind it: its own volume is unknown in most views."""
    views, centre = [], np.array([0.045, 0.0, 0.0])
    for pose in around(24, 0.4):
        ball, hand = sphere_depth(pose, RADIUS), sphere_depth(pose, 0.03, centre)
        views.append(View(pose, np.isfinite(ball) & (ball <= hand), np.isfinite(hand) & (hand < ball)))
    x = nodes()
    beyond = (np.linalg.norm(x - centre, axis=-1) < 0.03) & (np.linalg.norm(x, axis=-1) > RADIUS + 1.5 * H)
    kept = visual_hull(views, K, R, LO, H, quantile=1.0, min_share=-1.0).numpy() < 0
    removed = visual_hull(views, K, R, LO, H, quantile=1.0, min_share=0.4).numpy() < 0
    assert kept[beyond].mean() > 0.7 and removed[beyond].mean() < 0.2
    core = np.linalg.norm(x, axis=-1) < 0.5 * RADIUS
    assert removed[core].all()


def test_in_front_of_a_known_occluder_is_empty():
    """One view sees object everywhere; in another a hand covers it, and what were in front of it would be seen."""
    pose, other = around(5, 0.4)[[2, 3]]
    hand = sphere_depth(pose, 0.03)
    covered, everywhere = np.isfinite(hand), np.ones(hand.shape, bool)
    x = nodes() @ pose[:3, :3].T + pose[:3, 3]
    axis = np.hypot(x[..., 0], x[..., 1]) < 0.01
    for depth in (None, np.where(covered, hand, np.inf)):
        views = [View(pose, ~covered, covered, 1.0, depth), View(other, everywhere, ~everywhere)]
        phi = visual_hull(views, K, R, LO, H, quantile=1.0).numpy()
        assert (phi[axis & (x[..., 2] > 0.385)] < 0).all()
        assert ((phi[axis & (x[..., 2] < 0.36)] > 0) == (depth is not None)).all()


def test_what_no_view_tells_of_is_empty():
    nothing = np.zeros(sphere_depth(np.eye(4), 1).shape, bool)
    views = [View(p, nothing, ~nothing) for p in around(6, 0.4)]
    assert (visual_hull(views, K, R, LO, H) > 0).all()


def ball(centre=(0.0, 0.0, 0.0), radius=RADIUS) -> np.ndarray:
    return np.linalg.norm(nodes() - centre, axis=-1) - radius


def test_surface_is_closed_and_faces_outward():
    data = np.concatenate([ball()[..., None], np.full((R, R, R, 3), 2.0)], -1)
    mesh, notes = surface(SdfGrid(torch.as_tensor(data, dtype=torch.float32), LO, H))
    v = torch.as_tensor(mesh.vertices.astype(np.float64))
    assert not notes and meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2
    assert abs(float(meshes.volume(v, torch.as_tensor(mesh.faces).long())) / (4 / 3 * np.pi * RADIUS**3) - 1) < 0.03
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - RADIUS).max() < 0.1 * H
    assert np.allclose(mesh.colors, 1 / (1 + np.exp(-2.0)), atol=1e-5)


def test_loose_pieces_are_dropped_and_said():
    both = np.minimum(ball(radius=0.04), ball((0.06, 0.06, 0.06), 0.015))
    grid = SdfGrid(torch.as_tensor(both, dtype=torch.float32), LO, H)
    mesh, notes = surface(grid)
    assert np.linalg.norm(mesh.vertices, axis=1).max() < 0.045 and len(notes) == 1 and "1 loose piece" in notes[0]
    everything, _ = surface(grid, largest_only=False)
    assert np.linalg.norm(everything.vertices, axis=1).max() > 0.1


def test_cavities_are_filled_and_open_volumes_capped():
    hollow = np.maximum(ball(), -ball(radius=0.02))
    mesh, _ = surface(SdfGrid(torch.as_tensor(hollow, dtype=torch.float32), LO, H))
    assert np.linalg.norm(mesh.vertices, axis=1).min() > 0.04 and meshes.is_watertight(mesh.faces)
    cylinder = np.linalg.norm(nodes()[..., :2], axis=-1) - 0.03  # goes on beyond the grid
    mesh, _ = surface(SdfGrid(torch.as_tensor(cylinder, dtype=torch.float32), LO, H))
    assert meshes.is_watertight(mesh.faces) and meshes.euler_characteristic(mesh.faces) == 2


def test_opening_removes_fins_where_asked_alone():
    x = nodes()
    fin = np.abs(x[..., 0]) - 0.4 * H  # a sheet one voxel thick through the whole ball
    data = torch.as_tensor(np.minimum(ball(radius=0.04), fin), dtype=torch.float32)
    grid, upper = SdfGrid(data, LO, H), x[..., 2] > 0
    open_thin(grid, upper, 1.5 * H)
    left = grid.data[..., 0].numpy() < 0
    outside = ball(radius=0.04) > 1.5 * H
    assert not (left & outside & upper).any()
    assert (left == (data.numpy() < 0))[~upper].all() and (left & outside)[~upper].any()
    assert left[ball(radius=0.03) < 0].all()


def test_an_empty_volume_has_no_surface():
    mesh, notes = surface(SdfGrid(torch.ones(R, R, R), LO, H))
    assert len(mesh.vertices) == len(mesh.faces) == 0 and notes == ["the object's volume is empty"]


def test_smoothing_takes_warts_and_leaves_the_surface():
    phi = np.linalg.norm(nodes(), axis=-1) - RADIUS
    warts = np.random.default_rng(0).choice([0.0, -0.8 * H], size=phi.shape, p=[0.95, 0.05])
    grid = SdfGrid(torch.as_tensor(phi + warts).float(), LO, H)
    rough = surface(grid)[0].vertices
    smooth(grid, 0.8)
    flat = surface(grid)[0].vertices
    off = [np.abs(np.linalg.norm(v, axis=1) - RADIUS) for v in (rough, flat)]
    assert off[0].max() > 0.5 * H and off[1].max() < 0.3 * H and off[1].mean() < 0.1 * H
