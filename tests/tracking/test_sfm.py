"""Structure from motion on a turning textured cube drawn with numpy, on noise, and twice."""

import numpy as np
import pytest

from handhold.tracking.sfm import flow_rotation, structure_from_motion

SIZE, FOCAL = 160, 240.0
K = np.array([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])


def turn(axis, degrees):
    axis = np.asarray(axis, float) / np.linalg.norm(axis)
    a = np.radians(degrees)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + np.sin(a) * k + (1 - np.cos(a)) * k @ k


def angle(R):
    return np.degrees(np.arccos(np.clip((np.trace(R) - 1) / 2, -1, 1)))


def cube_clip(count=7, step=8.0, seed=0):
    """Frames (F,H,W,3), masks and true cam_from_object of a cube with blocky random paint, ray-cast per pixel."""
    rng = np.random.default_rng(seed)
    paint = rng.integers(20, 236, (6, 14, 14, 3))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    rays = np.stack([(x - SIZE / 2) / FOCAL, (y - SIZE / 2) / FOCAL, np.ones_like(x)], -1)
    frames, masks, poses = [], [], []
    for f in range(count):
        pose = np.eye(4)
        pose[:3, :3] = turn([0.15, 1, 0.1], step * f) @ turn([1, 0.3, 0], 25)
        pose[:3, 3] = [0.02 * np.sin(f), 0.01 * f, 4.2]
        o, d = -pose[:3, :3].T @ pose[:3, 3], rays @ pose[:3, :3]
        with np.errstate(divide="ignore"):
            near, far = np.sort(np.stack([(-1 - o) / d, (1 - o) / d]), 0)
        t, hit = near.max(-1), near.max(-1) < far.min(-1)
        p = o + t[..., None] * d
        side = near.argmax(-1)
        u = np.take_along_axis(p, ((side + 1) % 3)[..., None], -1)[..., 0]
        v = np.take_along_axis(p, ((side + 2) % 3)[..., None], -1)[..., 0]
        face = 2 * side + (np.take_along_axis(p, side[..., None], -1)[..., 0] > 0)
        ij = np.clip(((np.stack([u, v], -1) + 1) * 7).astype(int), 0, 13)
        color = np.where(hit[..., None], paint[face, ij[..., 0], ij[..., 1]], 110) + rng.normal(0, 2, (SIZE, SIZE, 3))
        frames.append(np.clip(color, 0, 255).astype(np.uint8))
        masks.append(hit)
        poses.append(pose)
    return np.stack(frames), np.stack(masks), np.stack(poses)


@pytest.fixture(scope="module")
def clip():
    return cube_clip()


@pytest.fixture(scope="module")
def solved(clip, tmp_path_factory):
    frames, masks, _ = clip
    told = []
    folder = tmp_path_factory.mktemp("sfm")
    result = structure_from_motion(frames, masks, K, folder, progress=lambda s, _: told.append(s))
    assert told and told == sorted(told) and told[-1] == 1.0
    return result


def test_cube_rotations_are_recovered(clip, solved):
    truth = clip[2]
    assert solved.registered.all(), solved.reason
    R, G = solved.cam_from_object[:, :3, :3], truth[:, :3, :3]
    errors = [angle(R[i] @ R[j].T @ (G[i] @ G[j].T).T) for i in range(len(R)) for j in range(i)]
    assert max(errors) < 3.0
    np.testing.assert_allclose(R @ R.transpose(0, 2, 1), np.broadcast_to(np.eye(3), R.shape), atol=1e-9)


def test_points_reproject_and_lie_on_one_cube(clip, solved):
    assert len(solved.points) > 50 and len(solved.point_colors) == len(solved.points)
    frame, point = solved.tracks.T
    T = solved.cam_from_object[frame]
    c = np.einsum("nij,nj->ni", T[:, :3, :3], solved.points[point]) + T[:, :3, 3]
    xy = c @ K.T
    error = np.linalg.norm(xy[:, :2] / xy[:, 2:] - solved.track_xy, axis=1)
    assert np.median(error) < 0.7 and error.max() < 4
    assert (solved.inliers == np.bincount(frame, minlength=len(solved.registered))).all()
    # the global scale is free: fit it, then every point is on the surface of the unit cube
    truth = clip[2]
    centre = [-np.einsum("fji,fj->fi", P[:, :3, :3], P[:, :3, 3]) for P in (truth, solved.cam_from_object)]
    s = np.divide(*(np.linalg.norm(c[3:] - c[:-3], axis=1).sum() for c in centre))
    on = (s * c - truth[frame, :3, 3])[:, None] @ truth[frame, :3, :3]
    assert np.median(np.abs(np.abs(on).max(-1) - 1)) < 0.08


def test_same_input_gives_same_numbers(clip, solved, tmp_path):
    again = structure_from_motion(*clip[:2], K, tmp_path)
    assert np.array_equal(again.cam_from_object, solved.cam_from_object)
    assert np.array_equal(again.points, solved.points)


def test_noise_registers_nothing_and_says_why(tmp_path):
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    masks = np.zeros((5, 64, 64), bool)
    masks[:, 16:48, 16:48] = True
    r = structure_from_motion(frames, masks, K, tmp_path)
    assert not r.registered.any() and np.isnan(r.cam_from_object).all() and (r.confidence == 0).all()
    assert all(r.reason) and r.notes


def test_empty_masks_are_no_error(clip, tmp_path):
    r = structure_from_motion(clip[0][:3], np.zeros_like(clip[1][:3]), K, tmp_path)
    assert not r.registered.any() and len(r.points) == 0


def test_flow_rotation_between_neighbours(clip):
    frames, masks, poses = clip
    R, inliers = flow_rotation(frames[0], frames[1], masks[0], masks[1], K)
    assert inliers > 100 and angle(R @ (poses[1, :3, :3] @ poses[0, :3, :3].T).T) < 3
    assert flow_rotation(frames[0], frames[1], masks[0], np.zeros_like(masks[1]), K) is None
