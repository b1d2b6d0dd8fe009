"""Points of the surface and what they do to a fit, on small truths."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.kernels.grid import SdfGrid
from handhold.shapes.sdf import nodes
from handhold.shapes.sdf_fit import SurfacePoints, off_points
from handhold.tracking import _sfm_bundle as bundle
from handhold.tracking.object import Observations, carve_rays, free_space
from handhold.tracking.points import ANGLE, follow, surface_points
from solids import HEIGHT, WIDTH, K, around, box_depth, colored, looking, pattern, sphere_depth

RADIUS = 0.05
HALF = np.array([0.03, 0.042, 0.022])

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_points(count: int, poses: np.ndarray, noise: float = 0.0, seed: int = 0):
    """Points of a sphere and the observations of those that face each camera; positions of the points."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 3))
    x *= RADIUS / np.linalg.norm(x, axis=1, keepdims=True)
    frame, track, xy = [], [], []
    for f, pose in enumerate(poses):
        c = x @ pose[:3, :3].T + pose[:3, 3]
        facing = ((x @ pose[:3, :3].T) * c).sum(1) < -0.3 * RADIUS * np.linalg.norm(c, axis=1)
        frame.append(np.full(facing.sum(), f))
        track.append(np.flatnonzero(facing))
        xy.append((c[:, :2] / c[:, 2:])[facing] + noise * rng.normal(size=(facing.sum(), 2)) / K[0, 0])
    none = np.zeros(0, np.int64)
    frame, track, xy = map(np.concatenate, (frame, track, xy))
    t = bundle.Tracks(frame, track, xy, K[0, 0], len(poses), none, np.zeros((0, 128), np.float32), ANGLE)
    return t, x


def test_points_lie_on_the_surface_and_look_at_their_cameras():
    poses = around(40, 0.3)
    t, _ = seen_points(300, poses, noise=0.2)
    found = surface_points(t, poses, WIDTH)
    r = found.position.norm(dim=1)
    assert len(r) > 400 and (r - RADIUS).abs().max() < 0.003
    assert torch.allclose(found.towards.norm(dim=1), torch.ones(len(r)), atol=1e-5)
    assert ((found.position * found.towards).sum(1) > 0).all()


def test_too_few_points_and_unknown_poses_are_none():
    poses = around(40, 0.3)
    t, _ = seen_points(20, poses)
    assert surface_points(t, poses, WIDTH) is None
    t, _ = seen_points(300, poses)
    assert surface_points(t, np.full_like(poses, np.nan), WIDTH) is None


def test_a_track_that_jumps_makes_no_point():
    poses = around(40, 0.3)
    t, _ = seen_points(300, poses)
    wrong = t.track % 3 == 0
    t.x[wrong] += 30 / K[0, 0] * np.random.default_rng(1).normal(size=(wrong.sum(), 2))
    found = surface_points(t, poses, WIDTH)
    assert ((found.position.norm(dim=1) - RADIUS).abs() < 0.004).all()


def ball(radius: float, R: int = 32, side: float = 0.16) -> SdfGrid:
    grid = SdfGrid(torch.zeros(R, R, R), np.full(3, -side / 2), side / (R - 1))
    d = np.linalg.norm(nodes(grid), axis=1) - radius
    return SdfGrid(torch.from_numpy(d.reshape(R, R, R)).float(), grid.lo, grid.h)


def rays_to_the_ball() -> SurfacePoints:
    poses = around(40, 0.3)
    return surface_points(seen_points(800, poses)[0], poses, WIDTH)


def test_the_true_surface_costs_least():
    points = rays_to_the_ball()
    sphere = lambda r: lambda x: x.norm(dim=1) - r  # noqa: E731
    draw = lambda r: off_points(sphere(r), points, 0.005, 0.02, torch.Generator().manual_seed(0)).item()  # noqa: E731
    cost = [draw(r) for r in (0.042, RADIUS, 0.058)]
    assert cost[1] < 0.1 and cost[0] > 1 and cost[2] > 1


def test_rays_carve_what_stands_before_the_points():
    grid = ball(0.062)
    carve_rays(grid, rays_to_the_ball(), 0.025)
    x, inside = nodes(grid), grid.data[..., 0].numpy().ravel() < 0
    r = np.linalg.norm(x, axis=1)
    shell = (r > RADIUS + 1.5 * grid.h) & (r < 0.062)
    assert inside[shell].mean() < 0.5 and inside[r < RADIUS - grid.h].all()


def test_corners_of_a_turning_box_are_followed_to_its_surface():
    camera = {"K": np.diag([4.0, 4.0, 1.0]) @ K, "width": 4 * WIDTH, "height": 4 * HEIGHT}
    turn = np.radians(4.0) * np.arange(12)
    poses = np.stack([looking(0.3 * np.array([np.cos(a), np.sin(a), 0.4])) for a in turn])
    depth = np.stack([box_depth(p, HALF, **camera) for p in poses])
    frames = np.stack([colored(p, d, pattern, **camera) for p, d in zip(poses, depth, strict=True)])
    obs = Observations(frames, np.isfinite(depth), np.zeros(depth.shape, bool), camera["K"])
    x = surface_points(follow(obs), poses, camera["width"]).position.numpy()
    q = np.abs(x) - HALF
    d = np.abs(np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0))
    assert len(x) > 60 and np.median(d) < 0.001 and np.quantile(d, 0.9) < 0.003


def test_space_that_frames_see_past_is_empty():
    poses = around(10, 0.3)
    inside = np.isfinite(np.stack([sphere_depth(p, RADIUS) for p in poses]))
    obs = Observations(np.zeros((*inside.shape, 3), np.uint8), inside, np.zeros_like(inside), K)
    outside = free_space(obs, poses, np.ones(10))
    x = np.array([[0.0, 0, 0], [0.04, 0, 0], [0.08, 0, 0], [0, -0.07, 0]])
    d = outside(x)
    assert (d[:2] == 0).all() and np.all(np.abs(d[2:] - [0.03, 0.02]) < 0.008)
    assert (free_space(obs, poses, np.zeros(10))(x) == 0).all()
