"""Appearance of a small coloured ball that the renderer itself drew: colours, hidden pixels, poses, a bound hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from drawn_ball import RADIUS, ball, paint
from handhold.geometry.meshes import sample_surface
from handhold.geometry.rigid import geodesic, matrix_from_quat, mean_rotation, so3_exp
from handhold.methods.appearance import fit_appearance, lit
from handhold.methods.bound import pose_hand
from handhold.render import splat
from handhold.scene import Mesh, Sequence

SIZE, FRAMES = 64, 12
K = np.array([[150.0, 0, SIZE / 2], [0, 150.0, SIZE / 2], [0, 0, 1]])
SMALL = {"count": 900, "hand_count": 300}


pytestmark = pytest.mark.usefixtures("one_thread")


def rendered(poses: np.ndarray) -> tuple[Sequence, Mesh]:
    """The clip, and the mesh it shows (without its colours)."""
    v, f = ball()
    many = torch.Generator().manual_seed(5)
    x, _, _ = sample_surface(torch.from_numpy(v), torch.from_numpy(f).long(), 6000, many)
    n = len(x)
    quats, scales = torch.tensor([1.0, 0, 0, 0]).repeat(n, 1), torch.full((n, 3), 0.0012)
    colors, camera = torch.from_numpy(paint(x.numpy())), torch.from_numpy(K).float().expand(len(poses), 3, 3)
    view = torch.from_numpy(poses).float()
    out = splat(x, quats, scales, torch.full((n,), 0.9), colors, view, camera, SIZE, SIZE)
    frames = (out.color.clamp(0, 1).numpy() * 255).round().astype(np.uint8)
    masks = {"object": out.alpha[..., 0].numpy() > 0.5}
    grey = np.full((len(v), 3), 0.5, np.float32)
    sequence = Sequence(frames, np.arange(len(poses)), 10.0, K, "given", masks=masks)
    return sequence, Mesh(v, f, grey, np.ones(len(v), bool))


def turning(n: int = FRAMES) -> np.ndarray:
    poses = np.tile(np.eye(4), (n, 1, 1))
    w = torch.tensor([[0.2, 1.0, 0.1]]) * torch.arange(n)[:, None] * 0.35
    poses[:, :3, :3] = so3_exp(w.double()).numpy()
    poses[:, :3, 3] = [0.0, 0.0, 0.35]
    return poses


@pytest.fixture(scope="module")
def clip():
    poses = turning()
    return *rendered(poses), poses, np.ones(len(poses))


def test_recovers_colours(clip):
    sequence, mesh, poses, weight = clip
    a = fit_appearance(sequence, mesh, poses, weight, {}, iterations=200, **SMALL)
    assert a.psnr > 24 and a.iou > 0.95
    assert a.psnr == a.psnr_object  # no hands
    error = np.abs(a.object.colors.numpy() - paint(a.object.means.numpy()))
    assert np.median(error) < 0.06  # 0.22 before
    assert np.linalg.norm(a.object.means.numpy(), axis=1).max() < 1.25 * RADIUS  # on the surface
    assert (a.object.scales[:, 2] < 0.5 * a.object.scales[:, :2].amin(1)).float().mean() > 0.95  # flat


def test_hidden_pixels_say_nothing(clip):
    sequence, mesh, poses, weight = clip
    hand, other = np.zeros_like(sequence.masks["object"]), np.zeros_like(sequence.masks["object"])
    hand[:, 20:34, 20:34] = True
    other[:, 44:, :20] = True
    masks = {"object": sequence.masks["object"] & ~hand & ~other, "right": hand, "other": other}
    found = []
    for value in (0, 255):
        frames = sequence.frames.copy()
        frames[hand | other] = value
        shown = replace(sequence, frames=frames, masks=masks)
        found.append(fit_appearance(shown, mesh, poses, weight, {}, iterations=40, **SMALL))
    for name in ("means", "quats", "scales", "opacities", "colors"):
        assert torch.equal(getattr(found[0].object, name), getattr(found[1].object, name)), name
    assert np.array_equal(found[0].cam_from_object, found[1].cam_from_object)


def test_unseen_surface_keeps_its_colour(clip):
    sequence, mesh, poses, weight = clip
    mesh = replace(mesh, observed=mesh.vertices[:, 2] > 0, colors=np.full_like(mesh.vertices, 0.3))
    a = fit_appearance(sequence, mesh, poses, weight, {}, iterations=30, **SMALL)
    below = a.object.means[:, 2] < -0.3 * RADIUS
    assert torch.allclose(a.object.colors[below], torch.tensor(0.3), atol=1e-3)


def rotation_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean degrees, up to one rotation of the object's frame."""
    d = torch.from_numpy(found[:, :3, :3]).mT @ torch.from_numpy(truth[:, :3, :3])
    return float(torch.rad2deg(geodesic(d, mean_rotation(d).expand_as(d))).mean())


def test_pose_errors_shrink(clip):
    sequence, mesh, poses, weight = clip
    mesh = replace(mesh, colors=paint(mesh.vertices))
    axis = torch.randn(len(poses), 3, generator=torch.Generator().manual_seed(1)).double()
    off = poses.copy()
    off[:, :3, :3] = off[:, :3, :3] @ so3_exp(torch.nn.functional.normalize(axis, dim=-1) * np.radians(2)).numpy()
    off[3] = np.nan
    a = fit_appearance(sequence, mesh, off, weight, {}, iterations=360, pose_lr=4e-3, refine_poses=True, **SMALL)
    assert np.isnan(a.cam_from_object[3]).all()
    known = np.arange(len(poses)) != 3
    before, after = (rotation_error(p[known], poses[known]) for p in (off, a.cam_from_object))
    assert before > 1.5 and after < 0.6 * before
    change = torch.from_numpy(off[known, :3, :3]).mT @ torch.from_numpy(a.cam_from_object[known, :3, :3])
    assert float(geodesic(mean_rotation(change), torch.eye(3).double())) < 1e-3  # the object frame stays
    fixed = fit_appearance(sequence, mesh, off, weight, {}, iterations=10, refine_poses=False, **SMALL)
    assert np.array_equal(fixed.cam_from_object, off, equal_nan=True)


def test_same_seed_same_numbers(clip):
    sequence, mesh, poses, weight = clip
    a, b = (fit_appearance(sequence, mesh, poses, weight, {}, seed=3, iterations=20, **SMALL) for _ in range(2))
    assert torch.equal(a.object.means, b.object.means) and torch.equal(a.object.colors, b.object.colors)
    assert a.psnr == b.psnr and np.array_equal(a.cam_from_object, b.cam_from_object)


def test_hand_follows_its_mesh(clip):
    sequence, mesh, poses, weight = clip
    # the "hand" is a second ball, beside and in front
    v, f = ball(16)
    place = np.stack([0.4 * v + [0.05, 0.0, 0.3]] * len(poses)).astype(np.float32)
    place[5] = np.nan
    mask = np.zeros_like(sequence.masks["object"])
    mask[:, 26:39, 50:63] = True
    frames = sequence.frames.copy()
    frames[mask] = [200, 120, 100]
    masks = {"object": sequence.masks["object"] & ~mask, "right": mask}
    shown = replace(sequence, frames=frames, masks=masks)
    a = fit_appearance(shown, mesh, poses, weight, {"right": (place, f)}, iterations=60, **SMALL)
    g = a.hands["right"]
    here = pose_hand(g, place[0])
    assert len(here) == 300 and (here.ids == 1).all()
    spin = so3_exp(torch.tensor([0.3, -0.5, 0.8]))
    moved = pose_hand(g, place[0] @ spin.numpy().T + np.float32([0.1, 0.2, 0.3]))
    assert torch.allclose(moved.means, here.means @ spin.T + torch.tensor([0.1, 0.2, 0.3]), atol=1e-5)
    assert torch.allclose(matrix_from_quat(moved.quats), spin @ matrix_from_quat(here.quats), atol=1e-4)
    assert torch.allclose(g.colors.median(0).values, torch.tensor([200, 120, 100]) / 255, atol=0.08)
    bright = lit(here, torch.zeros(9), np.full(3, 2.0))
    assert torch.allclose(bright.colors, 2 * here.colors)


def test_needs_a_posed_and_masked_frame(clip):
    sequence, mesh, poses, weight = clip
    with pytest.raises(ValueError, match="no frame"):
        fit_appearance(sequence, mesh, np.full_like(poses, np.nan), weight, {}, **SMALL)
