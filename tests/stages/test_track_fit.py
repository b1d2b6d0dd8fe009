"""What track leaves for fit, and the scene that fit makes of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from handhold.config import Config
from handhold.errors import StageFailed, UnusableInput
from handhold.geometry.cameras import default_K
from handhold.hand import HandModel
from handhold.progress import Progress
from handhold.runs import Run
from handhold.scene import Mesh, Rigid, Scene, Sequence, Skinned, save_npz
from handhold.stages.fit import MIN_CONFIDENCE, build_scene, fit, hand_body, resized, size_in, with_poses
from handhold.stages.prepare import save_prepared
from handhold.stages.track import HandTrack, load_tracks
from handhold.stages.track_hands import _common_scale

COUNT = 6


@pytest.fixture
def clip() -> Sequence:
    frames = np.zeros((COUNT, 24, 32, 3), np.uint8)
    masks = {"object": np.ones((COUNT, 24, 32), bool)}
    return Sequence(frames, np.arange(COUNT) * 2, 10.0, default_K(32, 24), "default", masks=masks)


def poses(unknown=()) -> np.ndarray:
    out = np.tile(np.eye(4), (COUNT, 1, 1))
    out[:, :3, 3] = np.stack([np.arange(COUNT) * 0.01, np.zeros(COUNT), np.full(COUNT, 0.5)], 1)
    out[list(unknown)] = np.nan
    return out


def hand(rng) -> dict[str, np.ndarray]:
    return {
        "pose": rng.normal(0, 0.2, (COUNT, 16, 3)),
        "betas": rng.normal(0, 1, 10),
        "transl": rng.normal(0, 0.1, (COUNT, 3)) + [0, 0, 0.5],
        "confidence": np.array([1, 0.8, 0.0, 0.5, 0.7, 0.9]),
        "reason": np.array(["landmarks"] * 2 + ["not found"] + ["carried by the grasp"] * 3),
        "windows": np.array([[0, 2], [3, 6]]),
    }


def write_tracks(run: Run, hands: dict, cam_from_object: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {
        "object.cam_from_object": cam_from_object,
        "object.confidence": np.linspace(0.5, 1, COUNT),
        "object.reason": np.array(["sfm"] * COUNT),
        "points": np.arange(12.0).reshape(4, 3),
        "point_colors": np.full((4, 3), 7, np.uint8),
    }
    arrays |= {f"hand.{s}.{k}": v for s, h in hands.items() for k, v in h.items()}
    save_npz(run.track_dir / "tracks.npz", arrays)
    return arrays


def test_tracks_are_read_back(tmp_path, clip):
    run, rng = Run(tmp_path), np.random.default_rng(0)
    hands = {"right": hand(rng), "left": hand(rng)}
    arrays = write_tracks(run, hands, poses([2]))
    t = load_tracks(run, clip)
    assert np.array_equal(t.cam_from_object, arrays["object.cam_from_object"], equal_nan=True)
    assert (t.confidence == arrays["object.confidence"]).all() and (t.points == arrays["points"]).all()
    assert list(t.hands) == ["right", "left"] and t.reason[0] == "sfm" and t.point_colors.dtype == np.uint8
    for side, h in hands.items():
        assert all((getattr(t.hands[side], k) == v).all() for k, v in h.items())


def test_the_camera_is_read_back_and_old_tracks_have_one_that_stands_still(tmp_path, clip):
    run = Run(tmp_path)
    arrays = write_tracks(run, {}, poses())
    old = load_tracks(run, clip)
    assert (old.world_from_cam == np.eye(4)).all() and old.camera_static and len(old.camera_reason) == COUNT
    camera = {
        "world_from_cam": poses(), "camera.static": np.bool_(False),
        "camera.confidence": np.full(COUNT, 0.5), "camera.reason": np.array(["turning"] * COUNT),
    }  # fmt: skip
    save_npz(run.track_dir / "tracks.npz", arrays | camera)
    new = load_tracks(run, clip)
    assert (new.world_from_cam == poses()).all() and not new.camera_static and set(new.camera_reason) == {"turning"}
    assert (new.camera_confidence == 0.5).all()


def test_tracks_that_cannot_be_used_are_told(tmp_path, clip):
    run = Run(tmp_path)
    with pytest.raises(UnusableInput, match="run `handhold track"):
        load_tracks(run, clip)
    arrays = write_tracks(run, {}, poses())
    with pytest.raises(StageFailed, match="another clip"):
        load_tracks(run, replace(clip, frames=clip.frames[:3], indices=clip.indices[:3]))
    del arrays["points"]
    save_npz(run.track_dir / "tracks.npz", arrays)
    with pytest.raises(UnusableInput, match="run `handhold track"):
        load_tracks(run, clip)


def test_two_hands_agree_on_one_scale():
    report = Progress()
    sure, unsure = SimpleNamespace(scale=0.2, scale_std=0.02), SimpleNamespace(scale=0.3, scale_std=0.2)
    assert _common_scale({"right": sure}, poses(), report) == pytest.approx(0.2) and not report.notes
    assert 0.2 < _common_scale({"right": sure, "left": unsure}, poses(), report) < 0.202
    assert len(report.notes) == 1 and "50 %" in report.notes[0] and not report.reasons


def test_without_a_hand_that_tells_the_size_is_a_guess_and_said_to_be(clip):
    joints = np.full((COUNT, 21, 3), np.nan)
    joints[2:, :, 2] = 0.4
    lost = SimpleNamespace(scale=1.0, scale_std=np.inf, joints=joints, confidence=(np.arange(COUNT) > 1) * 0.5)
    report = Progress()
    assert _common_scale({"right": lost}, 0.5, report) == pytest.approx(0.8)  # the object is 0.5 units away
    assert len(report.reasons) == 1 and "size is a guess" in report.reasons[0]
    sure = SimpleNamespace(scale=0.2, scale_std=0.02)
    assert _common_scale({"right": lost, "left": sure}, 0.5, Progress()) == pytest.approx(0.2)


def test_a_hand_body_is_the_model(clip):
    for side in ("right", "left"):
        h = HandTrack(**hand(np.random.default_rng(1)))
        body = hand_body(side, h)
        model = HandModel.open(side, dtype=torch.float64)
        posed = model.with_shape(torch.as_tensor(h.betas)).with_pose(torch.as_tensor(h.pose), torch.as_tensor(h.transl))
        assert isinstance(body.motion, Skinned) and body.motion.model == model.name
        assert np.allclose(body.motion.vertices, posed.vertices) and np.allclose(body.motion.joints, posed.joints)
        assert body.valid.tolist() == [True, True, False, True, True, True]
        assert body.shape.vertices.shape == (len(model.v_template), 3) and len(body.shape.faces) == len(model.faces)


def result(cam_from_object, **kw) -> SimpleNamespace:
    mesh = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 2]], np.int32))
    confidence = np.array([1, 0.9, 0.8, 0.5 * MIN_CONFIDENCE, 0.9, 1])
    kw = {
        "mesh": mesh,
        "hands": {},
        "object_reason": np.array(["sfm"] * COUNT),
        "ambiguous": (),
        "hand_colors": {},
        **kw,
    }
    return SimpleNamespace(cam_from_object=cam_from_object, object_confidence=confidence, **kw)


def test_unknown_frames_hold_the_nearest_pose_and_are_not_valid(tmp_path, clip):
    scene = build_scene(clip, None, result(poses([0, 2])))
    body = scene.bodies["object"]
    assert isinstance(body.motion, Rigid)
    assert body.valid.tolist() == [False, True, False, False, True, True]  # frame 3: known, but hardly trusted
    assert body.confidence[[0, 2]].tolist() == [0, 0] and np.isfinite(body.motion.world_from_body).all()
    x = body.motion.world_from_body[:, 0, 3]
    assert x[0] == x[1] and x[2] in (x[1], x[3]) and np.allclose(x[[1, 3, 4, 5]], [0.01, 0.03, 0.04, 0.05])
    assert (scene.frames == clip.indices).all() and (scene.world_from_cam == np.eye(4)).all()
    scene.save(tmp_path / "scene.npz")
    again = Scene.load(tmp_path / "scene.npz")
    assert (again.bodies["object"].valid == body.valid).all() and again.size == clip.size


def test_a_scene_without_an_object_has_none(clip):
    h = HandTrack(**hand(np.random.default_rng(2)))
    scene = build_scene(clip, None, result(poses(), mesh=None, hands={"left": h}))
    assert list(scene.bodies) == ["left"]


def test_nothing_tracked_ends_with_one_sentence(tmp_path, clip):
    run = Run(tmp_path)
    save_prepared(run, clip)
    write_tracks(run, {}, poses(range(COUNT)))
    with pytest.raises(StageFailed, match="nothing to fit"):
        fit(run, Config(), Progress())


def test_given_poses_take_the_place_of_the_tracked(tmp_path, clip):
    run, path = Run(tmp_path), tmp_path / "poses.npz"
    write_tracks(run, {}, poses(range(COUNT)))
    tracks = load_tracks(run, clip)
    save_npz(path, {"cam_from_object": poses([3])})
    given = with_poses(tracks, path)
    assert np.array_equal(given.cam_from_object, poses([3]), equal_nan=True)
    assert given.reason.tolist() == ["sfm"] * 3 + ["not found"] + ["sfm"] * 2 and given.confidence[3] == 0
    for wrong in ({"cam_from_object": 1.1 * poses()}, {"cam_from_object": poses()[:3]}, {"other": poses()}):
        save_npz(path, wrong)
        with pytest.raises(UnusableInput):
            with_poses(tracks, path)


def test_hands_take_the_size_of_given_poses():
    rng = np.random.default_rng(4)
    given = poses()
    given[:, :3, :3] = np.linalg.qr(rng.normal(size=(COUNT, 3, 3)))[0]
    given[:, :3, :3] *= np.linalg.det(given[:, :3, :3])[:, None, None]
    tracked = given.copy()
    tracked[:, :3, 3] = 0.9 * (given[:, :3, 3] + given[:, :3, :3] @ [0.1, 0.0, -0.2])
    assert size_in(tracked, given) == pytest.approx(0.9)
    assert size_in(np.full_like(given, np.nan), given) == 1
    h = HandTrack(**(hand(rng) | {"betas": np.zeros(10)}))
    grown = resized("right", h, 1.05)
    model = HandModel.open("right", dtype=torch.float64)
    x, y = (
        model.with_shape(torch.as_tensor(k.betas)).with_pose(torch.as_tensor(k.pose), torch.as_tensor(k.transl)).joints
        for k in (h, grown)
    )
    assert (1.05 * x - y).norm(dim=-1).max() < 0.006
    assert (1.05 * x - y)[:, 0].norm(dim=-1).max() < 1e-9
