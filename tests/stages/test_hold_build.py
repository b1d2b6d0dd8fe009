"""A run folder becomes HOLD's build, and a build becomes a run folder."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import handhold.hand
from handhold.cli import _default_out, main
from handhold.config import Config, PrepareConfig
from handhold.datasets.hold import read_build
from handhold.datasets.masks import write_masks
from handhold.errors import UnusableInput
from handhold.geometry.cameras import make_K
from handhold.geometry.rigid import se3_exp
from handhold.hand import HandModel
from handhold.progress import Progress
from handhold.regressors.landmark_files import save_landmarks
from handhold.runs import Run
from handhold.scene import Body, Landmarks, Mesh, Rigid, Scene, Sequence, Skinned, save_npz
from handhold.stages.hold_build import filled, write_hold_build
from handhold.stages.prepare import load_prepared, prepare, save_prepared

N, W, H = 10, 64, 48
K = make_K(70, 70, W / 2, H / 2)


def motions(seed: int, place=(0, 0, 0.6)) -> np.ndarray:
    twists = np.random.default_rng(seed).normal(size=(N, 6)) * [0.02, 0.02, 0.02, 0.4, 0.4, 0.4]
    twists[:, :3] += place
    return se3_exp(torch.as_tensor(twists)).numpy()


def landmarks() -> Landmarks:
    points = np.random.default_rng(1).uniform(10, 30, (N, 21, 2)).astype(np.float32)
    return Landmarks(points, np.full((N, 21, 3), np.nan, np.float32), np.ones(N, np.float32))


@pytest.fixture
def run(tmp_path) -> Run:
    """A run up to tracking, with an unknown object pose and an unknown hand pose."""
    rng = np.random.default_rng(0)
    run = Run(tmp_path / "run")
    run.save_info(Config(), tmp_path / "video.mp4", "")
    masks = {name: np.zeros((N, H, W), bool) for name in ("right", "object")}
    masks["right"][:, 5:20, 5:30], masks["object"][:, 20:40, 10:40] = True, True
    frames = rng.integers(0, 255, (N, H, W, 3), dtype=np.uint8)
    save_prepared(run, Sequence(frames, np.arange(N), 30.0, K, "given", landmarks={"right": landmarks()}, masks=masks))
    poses, pose = motions(2), rng.normal(size=(N, 16, 3)) * 0.3
    poses[4], pose[6] = np.nan, np.nan
    arrays = {"object.cam_from_object": poses, "object.confidence": np.ones(N), "object.reason": np.full(N, "sfm")}
    arrays |= {"points": rng.normal(size=(60, 3)) * 0.03, "point_colors": np.zeros((60, 3), np.uint8)}
    hand = {"pose": pose, "betas": rng.normal(size=10), "transl": rng.normal(size=(N, 3)) * 0.02 + [0, 0, 0.6]}
    hand |= {"confidence": np.ones(N), "reason": np.full(N, "grasp"), "windows": np.zeros((0, 2), np.int64)}
    save_npz(run.track_dir / "tracks.npz", arrays | {f"hand.right.{k}": v for k, v in hand.items()})
    return run


def test_tracks_become_a_build_and_the_build_a_run(run, tmp_path, capsys):
    build = tmp_path / "hold_mug" / "build"
    assert main(["convert", str(run.root), str(build), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == "hold-build" and any("1 frames without an object pose" in n for n in told["notes"])
    assert (build / "notes.txt").read_text().splitlines() == told["notes"]
    made, s = read_build(build), load_prepared(run)
    known = np.arange(N) != 4
    assert np.allclose(made.cam_from_object[known], motions(2)[known], atol=1e-9)
    assert np.isfinite(made.hands["right"].pose).all()
    assert _default_out(build).name == "hold_mug"

    save_landmarks(tmp_path / "joints.npz", {"right": landmarks()})
    config = Config(prepare=PrepareConfig(joints=tmp_path / "joints.npz", hand_regressor="off", max_side=0))
    again, report = Run(tmp_path / "again"), Progress()
    again.save_info(config, build, "")
    prepare(again, config, report)
    p = load_prepared(again)
    assert (p.frames == s.frames).all() and np.allclose(p.K, K) and p.K_source == "given"
    assert set(p.masks) == set(p.settled) == {"right", "object"}
    assert all((p.masks[k] == s.masks[k]).all() for k in p.masks)
    assert any("HOLD build" in note for note in report.notes)


def test_the_users_own_masks_and_intrinsics_win_over_the_builds(run, tmp_path):
    write_hold_build(run, tmp_path / "build")
    write_masks(tmp_path / "masks", {"object": np.ones((N, H, W), bool)}, np.arange(N))
    save_landmarks(tmp_path / "joints.npz", {"right": landmarks()})
    (tmp_path / "K.txt").write_text("80 80 32 24")
    c = PrepareConfig(tmp_path / "K.txt", tmp_path / "masks", tmp_path / "joints.npz", hand_regressor="off", max_side=0)
    again = Run(tmp_path / "again")
    again.save_info(Config(prepare=c), tmp_path / "build", "")
    prepare(again, Config(prepare=c), Progress())
    p = load_prepared(again)
    assert p.K[0, 0] == 80 and p.masks["object"].all() and p.masks["right"].sum() == N * 15 * 25


def test_a_fitted_scene_seen_by_a_moving_camera(run, tmp_path):
    rng = np.random.default_rng(5)
    cam_from_object, world_from_cam = motions(6), motions(7, (0, 0, 0))
    model = HandModel.open("right", dtype=torch.float64)
    pose, betas, transl = rng.normal(size=(N, 16, 3)) * 0.3, rng.normal(size=10), rng.normal(size=(N, 3)) * 0.1
    posed = model.with_shape(torch.as_tensor(betas)).with_pose(torch.as_tensor(pose), torch.as_tensor(transl))
    joints, ones = posed.joints.numpy(), np.ones(N)
    hand = Skinned(model.name, pose, betas, transl, posed.vertices.numpy(), joints)
    mesh = Mesh(rng.normal(size=(90, 3)) * 0.03, np.zeros((1, 3), np.int32))
    known = np.arange(N) > 1
    bodies = {
        "right": Body(Mesh(hand.vertices[0], model.faces.numpy()), hand, ones > 0, ones, np.full(N, "grasp")),
        "object": Body(mesh, Rigid(world_from_cam @ cam_from_object), known, ones, np.full(N, "sfm")),
    }
    Scene(K, (W, H), 30.0, np.arange(N), world_from_cam, bodies).save(run.scene_path)
    notes = write_hold_build(run, tmp_path / "build")
    assert any("2 frames without an object pose" in n for n in notes)
    build = read_build(tmp_path / "build")
    assert np.allclose(build.cam_from_object[known], cam_from_object[known], atol=1e-5)
    assert np.allclose(build.cam_from_object[0], cam_from_object[2], atol=1e-5)  # the nearest known one
    shaped = model.with_shape(torch.as_tensor(betas))
    h = build.hands["right"].in_camera(build.cam_from_build, shaped.rest_joints[0].numpy())
    found = shaped.joints(torch.as_tensor(h.pose), torch.as_tensor(h.transl)).numpy()
    want = np.einsum("fij,fkj->fki", world_from_cam[:, :3, :3].swapaxes(1, 2), joints - world_from_cam[:, None, :3, 3])
    assert np.abs(found - want).max() < 1e-5


def test_with_mano_the_hands_are_manos(run, tmp_path, monkeypatch):
    def load_mano(path, side, **_):  # a hand of another size and mean pose; nobody may ship MANO
        assert path.name == "MANO_RIGHT.pkl"
        ours = HandModel.open(side, dtype=torch.float64)
        mean = torch.cat([torch.zeros(1, 3), torch.full((15, 3), 0.1)]).double()
        return replace(ours, name="mano_right(flat_hand_mean=False)", v_template=1.04 * ours.v_template, pose_mean=mean)

    monkeypatch.setattr(handhold.hand, "load_mano", load_mano)
    notes = write_hold_build(run, tmp_path / "build", tmp_path / "MANO_LEFT.pkl")
    assert not any("another pose" in n for n in notes)
    (distance,) = [float(n.split(" mm")[0].split()[-1]) for n in notes if "MANO's joints" in n]
    assert distance < 2
    assert read_build(tmp_path / "build").hands["right"].model == "mano_right(flat_hand_mean=False)"


def test_gaps_are_filled_between_their_neighbours():
    poses = motions(8)
    poses[[0, 3, 4, 9]] = np.nan
    full = filled(poses, np.zeros(3))
    assert np.isfinite(full).all() and np.allclose(full[0], poses[1]) and np.allclose(full[9], poses[8])
    assert np.allclose(full[3, :3, 3], (2 * poses[2] + poses[5])[:3, 3] / 3)


def test_a_run_that_is_not_that_far_is_refused(run, tmp_path):
    z = dict(np.load(run.track_dir / "tracks.npz"))
    save_npz(run.track_dir / "tracks.npz", z | {"points": np.zeros((0, 3))})
    with pytest.raises(UnusableInput, match="run `handhold fit` first"):
        write_hold_build(run, tmp_path / "build")
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "x"), "--kind", "hold-build"]) == 3
