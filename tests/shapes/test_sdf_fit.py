"""The shared fit of grid and poses, on a small textured box."""

from __future__ import annotations

from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from handhold.geometry.rigid import so3_exp
from handhold.kernels.grid import SdfGrid
from handhold.shapes.sdf import View, surface, visual_hull
from handhold.shapes.sdf_fit import Pixels, SdfFitConfig, Stage, compose, fit_sdf, gauge_modes, object_rays, without
from solids import HEIGHT, WIDTH, K, around, box_depth, colored, pattern, rays

HALF = np.array([0.03, 0.042, 0.022])
RADIUS, SIDE = 0.056, 0.062


pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(poses: np.ndarray) -> tuple[np.ndarray, Pixels]:
    """Masks (V,H,W), and all pixels near them."""
    depth = np.stack([box_depth(p, HALF) for p in poses])
    frames = np.stack([colored(p, d, pattern) for p, d in zip(poses, depth, strict=True)])
    _, d = rays(np.eye(4))
    d = (d / np.linalg.norm(d, axis=-1, keepdims=True)).reshape(-1, 3).astype(np.float32)
    inside, n = np.isfinite(depth), len(poses)
    masks = inside.astype(np.uint8)
    grown = [cv2.dilate(m, np.ones((13, 13))) for m in masks]
    shrunk = [cv2.erode(m, np.ones((3, 3))) for m in masks]
    near = torch.from_numpy(np.stack(grown).reshape(-1) > 0)
    pixels = Pixels(
        torch.arange(n).repeat_interleave(HEIGHT * WIDTH),
        torch.from_numpy(np.tile(d, (n, 1))),
        torch.from_numpy(frames.reshape(-1, 3) / 255.0).float(),
        torch.from_numpy(inside.reshape(-1).astype(np.float32)),
        torch.from_numpy(np.stack(shrunk).reshape(-1).astype(np.float32)),
        torch.ones(n * HEIGHT * WIDTH, dtype=torch.bool),
        torch.full((n * HEIGHT * WIDTH,), torch.inf),
    )
    return inside, Pixels(*(getattr(pixels, k.name)[near] for k in fields(Pixels)))


def hull(inside: np.ndarray, poses: np.ndarray, R: int, quantile: float) -> SdfGrid:
    views = [View(p, m, np.zeros_like(m)) for p, m in zip(poses, inside, strict=True)]
    h = 2 * SIDE / (R - 1)
    return SdfGrid(visual_hull(views, K, R, np.full(3, -SIDE), h, quantile), (-SIDE,) * 3, h)


def box_sdf(x: np.ndarray) -> np.ndarray:
    q = np.abs(x) - HALF
    return np.linalg.norm(np.maximum(q, 0), axis=-1) + np.minimum(q.max(-1), 0)


def turns(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(V,) degrees, less what all have in common."""
    r = Rotation.from_matrix(np.swapaxes(found[:, :3, :3], 1, 2) @ true[:, :3, :3])
    return np.degrees((r * r.mean().inv()).magnitude())


def test_known_poses_give_the_shape_to_less_than_a_voxel():
    poses = around(14, 0.25)
    inside, pixels = pictures(poses)
    start = hull(inside, poses, 24, 1.0)
    before = start.data.clone()
    stages = (Stage(24, 40, (1.2, 0.8), 1.0), Stage(32, 80, (0.8, 0.4), 1.0))
    config = SdfFitConfig(rays=1024, pose_lr=0.0)
    found = fit_sdf(start, lambda s: pixels, torch.from_numpy(poses), torch.zeros(3), RADIUS, stages, config)
    assert torch.equal(start.data, before)
    assert torch.allclose(found.cam_from_object, torch.from_numpy(poses).float(), atol=1e-6)
    assert found.error.isfinite().all()
    x = surface(found.grid)[0].vertices
    away = np.abs(box_sdf(x)) / found.grid.h
    assert away.mean() < 0.3 and np.quantile(away, 0.9) < 0.7, (away.mean(), np.quantile(away, 0.9))


@pytest.mark.slow
def test_poses_that_are_all_five_degrees_off_come_back():
    true = around(14, 0.25)
    inside, pixels = pictures(true)
    axis = np.random.default_rng(0).normal(size=(14, 3))
    axis *= np.radians(5) / np.linalg.norm(axis, axis=1, keepdims=True)
    given = true.copy()
    given[:, :3, :3] = true[:, :3, :3] @ so3_exp(torch.from_numpy(axis)).numpy()
    stages = (Stage(24, 120, (2.0, 1.0), 1.0), Stage(32, 80, (1.0, 0.6), 1.0))
    found = fit_sdf(
        hull(inside, given, 24, 0.8), lambda s: pixels, torch.from_numpy(given), torch.zeros(3), RADIUS, stages,
        SdfFitConfig(rays=1536, pose_lr=1e-2),
    )  # fmt: skip
    after = turns(found.cam_from_object.double().numpy(), true)
    assert np.median(after) < 2.0 and after.mean() < 2.5, after  # a pixel is three degrees here


def test_hidden_pixels_move_no_pose():
    poses = around(5, 0.25)
    inside, pixels = pictures(poses)
    hidden = replace(pixels, label=-torch.ones_like(pixels.label), clear=torch.zeros_like(pixels.clear))
    found = fit_sdf(
        hull(inside, poses, 16, 1.0), lambda s: hidden, torch.from_numpy(poses), torch.zeros(3), RADIUS,
        (Stage(16, 3, (1.0, 0.8), 1.0),), SdfFitConfig(rays=256),
    )  # fmt: skip
    assert torch.allclose(found.cam_from_object, torch.from_numpy(poses).float(), atol=1e-6)


def test_wrong_input_is_told():
    grid, one = SdfGrid(torch.ones(8, 8, 8), (-SIDE,) * 3, 2 * SIDE / 7), (Stage(8, 1, (1.0, 0.8), 1.0),)
    with pytest.raises(ValueError, match="finite"):
        fit_sdf(grid, lambda s: None, torch.full((2, 4, 4), torch.nan), torch.zeros(3), RADIUS, one)
    with pytest.raises(ValueError, match="per view"):
        fit_sdf(grid, lambda s: None, torch.eye(4).repeat(2, 1, 1), torch.zeros(3), RADIUS, one, weight=torch.ones(3))


def test_gauge_modes_change_no_picture_and_are_taken_out():
    base = torch.from_numpy(around(7, 0.3)).double().float()
    center, radius, step = torch.tensor([0.01, -0.02, 0.005]), 0.05, 1e-3
    modes = gauge_modes(base, center, radius)
    x = center + 0.03 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0))

    def seen(pose: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        q = torch.einsum("vij,pj->vpi", pose[:, :3, :3], p) + pose[:, None, :3, 3]
        return q[..., :2] / q[..., 2:]

    for k in range(7):
        pose = compose(base, step * modes[..., k], center, radius)
        moved = x - center
        turn = so3_exp(-step * torch.eye(3)[k]) if k < 3 else torch.eye(3)
        moved = moved @ turn.T * (1 + step * (k == 6))
        moved = moved - (step * radius * torch.eye(3)[k - 3] if 3 <= k < 6 else 0)
        assert (seen(pose, moved + center) - seen(base, x)).abs().max() < 2e-6
    xi = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    weight = torch.linspace(0.2, 1, 7)
    left = without(xi + modes @ torch.randn(7, generator=torch.Generator().manual_seed(2)), modes, weight)
    assert torch.allclose(left, without(xi, modes, weight), atol=1e-4)
    assert torch.einsum("v,vim,vi->m", weight, modes, left).abs().max() < 1e-3


def test_rays_pass_through_the_points_their_pixels_show():
    pose = torch.from_numpy(around(3, 0.3)).float()
    x = torch.tensor([[0.01, 0.02, -0.01]])
    at = torch.einsum("vij,j->vi", pose[:, :3, :3], x[0]) + pose[:, :3, 3]
    o, d = object_rays(pose, torch.arange(3), torch.nn.functional.normalize(at, dim=1))
    assert torch.allclose(o + at.norm(dim=1, keepdim=True) * d, x.expand(3, 3), atol=1e-6)
