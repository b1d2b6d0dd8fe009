"""The depth test against depths known in closed form."""

from __future__ import annotations

import numpy as np
import trimesh

from handhold.kernels.raster import depth_image
from solids import HEIGHT, WIDTH, K, around, rays, sphere_depth


def test_sphere_matches_its_analytic_depth():
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.05)
    pose = around(5, 0.3)[1]
    depth = depth_image(ball.vertices @ pose[:3, :3].T + pose[:3, 3], ball.faces, K, WIDTH, HEIGHT)
    true = sphere_depth(pose, 0.05)
    both = np.isfinite(depth) & np.isfinite(true)
    assert not (np.isfinite(depth) & ~np.isfinite(true)).any()  # the mesh lies inside its sphere
    assert both.sum() > 0.98 * np.isfinite(true).sum() > 500
    error = depth[both] - true[both]
    assert error.min() > -1e-6 and np.quantile(error, 0.95) < 5e-4  # facets lie below the sphere by 0.1 mm


def test_tilted_plane_and_pixel_centres():
    """A fine grid on z = 0.4 + 0.3 x that covers the left half of the image alone."""
    n = 60
    x = np.linspace(-0.4, 0.0, n)
    y = np.linspace(-0.3, 0.3, n)
    xx, yy = np.meshgrid(x, y, indexing="ij")
    vertices = np.stack([xx, yy, 0.4 + 0.3 * xx], -1).reshape(-1, 3)
    a = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.stack([a, a + n, a + 1], 1), np.stack([a + 1, a + n, a + n + 1], 1)])
    depth = depth_image(vertices, faces, K, WIDTH, HEIGHT)
    _, d = rays(np.eye(4))
    true = 0.4 / (1 - 0.3 * d[..., 0])
    left = int(K[0, 2])  # the plane ends at x = 0, which projects to the principal point: the edge of pixel 47
    assert np.isfinite(depth[:, :left]).all() and np.isinf(depth[:, left:]).all()
    assert np.abs(depth - true)[:, :left].max() < 1e-6


def test_the_nearer_of_two_surfaces_is_seen_whatever_their_order():
    square = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) * 0.1
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    for near, far in ((0.5, 0.8), (0.8, 0.5)):
        v = np.concatenate([square + [0, 0, near], square + [0, 0, far]])
        depth = depth_image(v, np.concatenate([faces, faces + 4]), K, WIDTH, HEIGHT)
        assert abs(depth[37, 47] - 0.5) < 1e-6


def test_nothing_is_drawn_for_no_faces_or_outside_the_picture():
    assert np.isinf(depth_image(np.zeros((0, 3)), np.zeros((0, 3), int), K, 8, 6)).all()
    off = np.array([[5.0, 5, 1], [6, 5, 1], [5, 6, 1]])
    assert np.isinf(depth_image(off, np.array([[0, 1, 2]]), K, WIDTH, HEIGHT)).all()
