"""A camera that stands still is told from one that moves; turning and moving are found; so is the scale of the path."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import moving_camera as film
from handhold.scene import Body, Mesh, Rigid, Scene, Skinned
from handhold.tracking import _camera_motion as motion
from handhold.tracking import _sfm_bundle as bundle
from handhold.tracking import camera


def never():
    raise AssertionError("the tracks alone should have done")


def degrees(truth, ours):
    return np.degrees(Rotation.from_matrix(truth[:, :3, :3].transpose(0, 2, 1) @ ours[:, :3, :3]).magnitude())


def off_path(truth, ours):
    """Mean distance of the centres after one scale, % of the path's extent."""
    a, b = truth[:, :3, 3], ours[:, :3, 3]
    s = (a * b).sum() / (b * b).sum()
    return 100 * np.linalg.norm(a - s * b, axis=1).mean() / np.linalg.norm(np.ptp(a, axis=0)), s


def tracks(world_from_cam, noise=0.1, points=160, seed=0):
    """What flow would give: points of a room, seen with `noise` pixels."""
    rng = np.random.default_rng(seed)
    X = rng.uniform([-1.2, -0.8, 0.8], [1.2, 0.5, 2.2], (points, 3))
    c = np.einsum("fji,fnj->fni", world_from_cam[:, :3, :3], X[None] - world_from_cam[:, None, :3, 3])
    x = c[..., :2] / c[..., 2:] + rng.normal(0, noise / 230, c[..., :2].shape)
    f, p = np.nonzero((np.abs(x) < [0.52, 0.39]).all(-1))
    p = np.unique(p, return_inverse=True)[1]
    none = np.zeros((0, 128), np.float32)
    xy = x[np.nonzero((np.abs(x) < [0.52, 0.39]).all(-1))]
    return bundle.Tracks(f, p, xy, 230.0, len(x), np.zeros(0, np.int64), none, motion.MIN_ANGLE)


def test_a_static_camera_is_static_in_noise_and_before_a_hand(tmp_path):
    frames, hand = film.film(film.path(7, 0, 0), noise=10, blob=film.subject(7))
    got = camera.estimate_camera(frames, film.K, hand, tmp_path)
    assert got.static and (got.world_from_cam == np.eye(4)).all() and set(got.reason) == {"static"}
    assert got.confidence.min() > 0.9 and "static" in got.evidence
    flat = np.full_like(frames, 120)
    got = camera.estimate_camera(flat, film.K, hand, tmp_path)
    assert got.static and got.confidence.max() < 0.5 and set(got.reason) == {"static: assumed"}
    assert "too little" in got.evidence


def test_exposure_and_things_that_move_do_not_make_a_camera_move():
    frames, hand = film.film(film.path(8, 0, 0), blob=film.subject(8, reach=0.2))
    light = (frames * np.linspace(0.75, 1.0, 8)[:, None, None, None]).astype(np.uint8)
    assert camera.judge_stillness(light, np.ones_like(hand)).still  # the ball is not even masked


@pytest.mark.parametrize(("turn", "shift"), [(0.4, 0.0), (0.0, 0.01)])
def test_little_motion_is_seen_over_long_baselines(turn, shift):
    frames, hand = film.film(film.path(7, turn, shift))
    assert camera.judge_stillness(frames, ~hand).still is False


def test_a_filmed_camera_is_found(tmp_path):
    truth, ball = film.path(7, 3, 0.12, seed=3), film.subject(7)
    frames, hand = film.film(truth, blob=ball)
    got = camera.estimate_camera(frames, film.K, hand, tmp_path)
    off, _ = off_path(truth, got.world_from_cam)
    assert not got.static and got.translates and got.confidence.min() > 0.5
    assert degrees(truth, got.world_from_cam).max() < 0.5 and off < 3
    assert (got.world_from_cam[0] == np.eye(4)).all() and not (tmp_path / "job.npz").exists()


def test_a_pan_has_no_translation():
    truth = film.path(16, 10, 0)
    got = camera._moving(tracks(truth), never, "", 0)
    assert not got.translates and (got.world_from_cam[:, :3, 3] == 0).all() and set(got.reason) == {"turning"}
    assert degrees(truth, got.world_from_cam).max() < 0.05 and "no parallax" in got.evidence


@pytest.mark.parametrize("shift", [0.03, 0.15])
def test_a_hand_held_camera_is_found_up_to_scale(shift):
    truth = film.path(16, 5, shift)
    got = camera._moving(tracks(truth), never, "", 0)
    off, _ = off_path(truth, got.world_from_cam)
    assert got.translates and degrees(truth, got.world_from_cam).max() < 0.1 and off < 1


def test_where_no_position_fits_the_rotation_is_kept_and_doubted():
    t = tracks(film.path(12, 5, 0.15))
    rng = np.random.default_rng(0)
    t = replace(t, x=t.x + rng.normal(0, 4 / 230, t.x.shape))
    got = camera._moving(t, lambda: np.full((12, 4, 4), np.nan), "", 0)
    assert not got.translates and got.confidence.max() < 0.3 and "left out" in got.evidence


def test_between_known_frames_a_pose_is_interpolated():
    poses = np.full((5, 4, 4), np.nan)
    poses[1] = poses[3] = np.eye(4)
    poses[3, :3, :3], poses[3, :3, 3] = Rotation.from_rotvec([0, 0.4, 0]).as_matrix(), [2, 0, 0]
    got = motion.interpolated(poses)
    assert np.allclose(Rotation.from_matrix(got[2, :3, :3]).as_rotvec(), [0, 0.2, 0]) and got[2, 0, 3] == 1
    assert (got[0] == poses[1]).all() and (got[4] == poses[3]).all()


def still_track(world):
    ones = np.ones(len(world))
    return camera.CameraTrack(world, False, True, ones, ones.astype(str), "", 0.4)


def seen(world, ball):
    return np.einsum("fji,fj->fi", world[:, :3, :3], ball - world[:, :3, 3])


def test_the_scale_is_that_at_which_the_subject_moves_least():
    truth, noise = film.path(48, 5, 0.2), np.random.default_rng(0).normal(0, 0.003, (48, 3))
    units = truth.copy()
    units[:, :3, 3] /= 0.37
    resting = seen(truth, np.tile([0.1, 0, 0.6], (48, 1)))
    got = camera.metric_scale(still_track(units), [resting], [np.ones(48)])
    assert got.value == pytest.approx(0.37, rel=1e-3) and got.observable
    drifting = seen(truth, film.subject(48, reach=0.03)) + noise
    got = camera.metric_scale(still_track(units), [drifting], [np.ones(48)])
    assert got.observable and abs(np.log(got.value / 0.37)) < 3 * max(got.log_std, 0.02)
    moved = camera.scaled(still_track(units), got)
    assert np.allclose(moved.world_from_cam[:, :3, 3], got.value * units[:, :3, 3])
    gone = drifting.copy()
    gone[::3] = np.nan
    assert camera.metric_scale(still_track(units), [gone], [np.ones(48)]).value == pytest.approx(got.value, rel=0.3)


def test_a_subject_that_moves_more_than_the_camera_says_nothing_of_its_scale():
    truth = film.path(48, 5, 0.01)
    wild = seen(truth, film.subject(48, seed=1, reach=0.15))
    got = camera.metric_scale(still_track(truth), [wild], [np.ones(48)])
    assert not got.observable and got.value > 0 and "unobservable" in camera.scale_note(got)
    none = camera.metric_scale(still_track(truth), [], [])
    assert none == camera.CameraScale(1.0, np.inf, False)


def test_bodies_go_into_the_world_and_come_back():
    world = film.path(6, 20, 0.3)
    rng = np.random.default_rng(0)
    rest = rng.normal(size=(30, 3)) * 0.05
    wrist = rest[0]
    pose, transl = rng.normal(size=(6, 16, 3)), rng.normal(size=(6, 3))
    G = Rotation.from_rotvec(pose[:, 0]).as_matrix()
    put = lambda pose, transl: (  # noqa: E731
        np.einsum("fij,nj->fni", Rotation.from_rotvec(pose[:, 0]).as_matrix(), rest - wrist) + (wrist + transl)[:, None]
    )
    v = put(pose, transl)
    ok = (np.ones(6, bool), np.ones(6), np.full(6, ""))
    mesh = Mesh(rest, np.zeros((0, 3), int))
    cam_from_object = film.path(6, 50, 1.0, seed=5)
    bodies = {
        "right": Body(mesh, Skinned("m", pose, np.zeros(10), transl, v, v[:, :21]), *ok),
        "object": Body(mesh, Rigid(cam_from_object), *ok),
    }
    scene = Scene(film.K, film.SIZE, 15.0, np.arange(6), np.tile(np.eye(4), (6, 1, 1)), bodies)
    assert camera.in_world(scene, scene.world_from_cam) is scene
    got = camera.in_world(scene, world)
    m = got.bodies["right"].motion
    assert np.allclose(put(m.pose, m.transl), m.vertices) and np.allclose(m.joints, m.vertices[:, :21])
    back = np.linalg.inv(world)
    assert np.allclose(np.einsum("fij,fnj->fni", back[:, :3, :3], m.vertices) + back[:, None, :3, 3], v)
    assert np.allclose(back @ got.bodies["object"].motion.world_from_body, cam_from_object)
    assert np.allclose(Rotation.from_rotvec(m.pose[:, 0]).as_matrix(), world[:, :3, :3] @ G)
    assert (got.world_from_cam == world).all()
