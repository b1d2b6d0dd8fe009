"""Paths are smooth, begin and end where they should, and show the object from all sides."""

from __future__ import annotations

import math

import pytest
import torch

from handhold.datasets.synthetic import motion
from handhold.geometry.rigid import geodesic, rigid, se3_exp, so3_exp


def random_keys(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = [torch.eye(4, dtype=torch.float64)]
    for _ in range(n - 1):
        out.append(out[-1] @ se3_exp(0.4 * torch.randn(6, generator=g, dtype=torch.float64)))
    return torch.stack(out)


def test_spline_ends_at_its_ends_and_moves_with_its_frame():
    keys, at = random_keys(7), torch.linspace(0, 1, 50, dtype=torch.float64)
    path = motion.spline(keys, at)
    torch.testing.assert_close(path[0], keys[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(path[-1], keys[-1], atol=1e-4, rtol=0)
    other = se3_exp(torch.tensor([0.3, -1, 2, 0.4, 0.5, -0.6], dtype=torch.float64))
    torch.testing.assert_close(motion.spline(other @ keys, at), other @ path)
    still = motion.spline(keys[:1].repeat(5, 1, 1), at)
    torch.testing.assert_close(still, keys[:1].expand(50, 4, 4))


def test_spline_is_twice_differentiable():
    keys = random_keys(6, 1)
    kinks = []
    for n in (400, 800):
        x = motion.spline(keys, torch.linspace(0, 1, n, dtype=torch.float64))[:, :3].flatten(1)
        second = (x[2:] - 2 * x[1:-1] + x[:-2]) * (n - 1) ** 2
        kinks.append((second[1:] - second[:-1]).abs().max())
    assert kinks[1] < 0.6 * kinks[0]  # jumps of the second derivative vanish with the step


@pytest.mark.parametrize("f", [motion.ease, motion.ease_ends])
def test_eases(f):
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    y = f(x)
    assert y[0] == 0 and abs(y[-1] - 1) < 1e-9 and (y[1:] >= y[:-1]).all()
    slope = (y[1:] - y[:-1]) * 2000
    assert slope[0] < 1e-3 and slope[-1] < 1e-3 and slope.max() < 2
    assert (slope[1:] - slope[:-1]).abs().max() < 0.02
    torch.testing.assert_close(y + y.flip(0), torch.ones_like(y))


@pytest.mark.parametrize("kind", motion.KINDS)
def test_schedules(kind):
    s = motion.schedule(kind, 60)
    for x in (s.progress, s.closed, s.away, s.second, s.swing):
        assert x.min() >= -1e-6 and x.max() <= 1 + 1e-6
        assert (x[..., 1:] - x[..., :-1]).abs().max() < 0.5
    moving = (s.progress[:, 1:] - s.progress[:, :-1]).abs().amax(0) > 1e-6
    assert not (moving & ~(s.held[1:] | s.held[:-1])).any(), "an object moves only in a hand"
    assert s.held.any() and (kind not in ("grasp", "regrasp") or not s.held.all())


@pytest.mark.parametrize("seed", range(4))
def test_turning_shows_all_sides_and_keeps_the_forearm_off_the_camera(seed):
    g = torch.Generator().manual_seed(seed)
    down = math.radians(50 * seed - 80)
    forearm = torch.nn.functional.normalize(torch.tensor([math.sin(down), math.cos(down), 0.1]), dim=0)
    start = so3_exp(torch.randn(3, generator=g))
    turned = motion.turning(start, forearm, math.radians(330), 24, g)
    torch.testing.assert_close(turned[0], start, atol=1e-5, rtol=0)
    assert geodesic(turned[1:], turned[:-1]).max() < 1.2
    elbow = start.T @ forearm
    z = (turned @ elbow)[:, 2]
    assert z.min() > motion.CONE[0] - 1e-4 and z.max() < motion.CONE[1] + 1e-4
    path = motion.spline(rigid(turned, torch.zeros(3)), torch.linspace(0, 1, 48))
    assert motion.sides_seen(path[:, :3, :3]) > 0.7
    angle, _ = motion.largest_step(path)
    assert math.degrees(angle) < 25


def test_around_keeps_clear():
    a, b = torch.eye(4).repeat(30, 1, 1), torch.eye(4).repeat(30, 1, 1)
    a[:, 0, 3], b[:, 0, 3], b[:, 1, 3] = 0.2, -0.3, 0.01
    share = torch.linspace(0, 1, 30)
    path = motion.around(torch.zeros(30, 3), a, b, share)
    torch.testing.assert_close(path[0], a[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(path[-1], b[-1], atol=1e-5, rtol=0)
    assert path[:, :3, 3].norm(dim=-1).min() > 0.199


def test_camera_path_begins_at_the_identity_and_looks_at_its_pivot():
    pivot = torch.tensor([0.0, 0.0, 0.6])
    path = motion.camera_path(48, pivot, 14.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(path[0], torch.eye(4), atol=1e-5, rtol=0)
    seen = path[:, :3, :3] @ pivot + path[:, :3, 3]
    assert (seen - pivot).norm(dim=-1).max() < 0.04
    assert geodesic(path[:1, :3, :3], path[:, :3, :3]).max() > math.radians(5)
