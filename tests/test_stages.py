"""The stages that need no reconstruction: prepare from given evidence, evaluate and export of a known scene."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clips import moving_square, write_video
from handhold.cli import main
from handhold.config import Config, EvaluateConfig, PrepareConfig
from handhold.datasets.masks import write_masks
from handhold.errors import StageFailed, UnusableInput
from handhold.progress import Progress
from handhold.regressors.landmark_files import save_landmarks
from handhold.runs import Run
from handhold.scene import HandEstimates, Landmarks, Scene, load_npz, save_npz
from handhold.stages import prepare as prepare_stage
from handhold.stages.evaluate import evaluate
from handhold.stages.export import export
from handhold.stages.prepare import load_prepared, prepare, save_prepared

COUNT, WIDTH, HEIGHT = 12, 96, 64


@pytest.fixture
def evidence(tmp_path) -> tuple[Path, Path]:
    """(joints file, masks folder) for the square's clip."""
    rng = np.random.default_rng(0)
    points = rng.uniform([0, 0], [WIDTH, HEIGHT], (COUNT, 21, 2)).astype(np.float32)
    points[3] = np.nan  # not found in this frame
    nothing = np.full((COUNT, 21, 3), np.nan, np.float32)
    confidence = np.linspace(0.5, 1, COUNT, dtype=np.float32)
    save_landmarks(tmp_path / "joints.npz", {"right": Landmarks(points, nothing, confidence)})
    masks = {name: np.zeros((COUNT, HEIGHT, WIDTH), bool) for name in ("right", "object")}
    masks["right"][:, 10:30, 10:30] = True
    masks["object"][:, 24:40, 20:60] = True
    write_masks(tmp_path / "masks", masks, np.arange(COUNT))
    return tmp_path / "joints.npz", tmp_path / "masks"


def prepared(tmp_path, video, config) -> Run:
    run = Run(tmp_path / "run")
    run.save_info(config, video, "")
    prepare(run, config, Progress())
    return run


def test_given_evidence_is_used_and_read_back(tmp_path, square_video, evidence):
    joints, masks = evidence
    run = prepared(tmp_path, square_video, Config(prepare=PrepareConfig(joints=joints, masks=masks)))
    s = load_prepared(run)
    assert s.frames.shape == (COUNT, HEIGHT, WIDTH, 3) and s.indices.tolist() == list(range(COUNT)) and s.fps == 10
    assert s.K_source == "default" and set(s.masks) == {"right", "object"} and set(s.landmarks) == {"right"}
    assert s.masks["object"][:, 24:40, 20:60].all() and s.masks["object"].sum() == COUNT * 16 * 40
    assert (s.mask_confidence["object"] == 1).all()
    marks = s.landmarks["right"]
    assert marks.confidence[3] == 0 and np.isnan(marks.points[3]).all() and np.isfinite(marks.points[4]).all()
    save_prepared(Run(tmp_path / "again"), s)
    again = load_prepared(Run(tmp_path / "again"))
    assert (again.frames == s.frames).all() and (again.K == s.K).all() and again.notes == s.notes


def test_joints_and_masks_follow_the_frames_when_they_shrink(tmp_path, square_video, evidence):
    joints, masks = evidence
    full = load_prepared(
        prepared(tmp_path / "a", square_video, Config(prepare=PrepareConfig(joints=joints, masks=masks)))
    )
    shrunk = PrepareConfig(joints=joints, masks=masks, max_side=0)
    big = write_video(tmp_path / "big.mp4", np.kron(moving_square(), np.ones((1, 2, 2, 1), np.uint8)))
    twice = {k: np.kron(m, np.ones((1, 2, 2), bool)) for k, m in full.masks.items()}
    write_masks(tmp_path / "twice", twice, np.arange(COUNT))
    marks = full.landmarks["right"]
    save_landmarks(tmp_path / "twice.npz", {"right": replace(marks, points=marks.points * 2)})
    shrunk = PrepareConfig(joints=tmp_path / "twice.npz", masks=tmp_path / "twice", max_side=WIDTH)
    half = load_prepared(prepared(tmp_path / "b", big, Config(prepare=shrunk)))
    assert half.size == full.size and np.allclose(half.K, full.K)
    assert np.allclose(half.landmarks["right"].points, marks.points, equal_nan=True)
    assert all((half.masks[k] == full.masks[k]).all() for k in full.masks)


def estimates(seed: int = 0) -> HandEstimates:
    rng = np.random.default_rng(seed)
    shapes = ((16, 3), (10,), (21, 3), (21, 2))
    values = [rng.uniform(0.1, 0.9, (COUNT, *s)).astype(np.float32) for s in shapes]
    for v in values:
        v[5] = np.nan
    return HandEstimates(*values, rng.uniform(0, 1, (COUNT, 21)).astype(np.float32))


def test_estimates_are_read_back_and_the_first_version_has_none(tmp_path, square_video, evidence):
    joints, masks = evidence
    config = Config(prepare=PrepareConfig(joints=joints, masks=masks, hand_regressor="off", segmenter="off"))
    run = prepared(tmp_path, square_video, config)
    s, e = load_prepared(run), estimates()
    assert s.regressed == {} and not any("trained" in n for n in s.notes)
    save_prepared(run, s.with_evidence(regressed={"right": e}))
    again = load_prepared(run).regressed["right"]
    assert all(np.array_equal(getattr(again, k), v, equal_nan=True) for k, v in vars(e).items())
    arrays = {k: v for k, v in load_npz(run.prepare_dir / "evidence.npz").items() if not k.startswith(("regr", "vers"))}
    save_npz(run.prepare_dir / "evidence.npz", arrays)
    assert load_prepared(run).regressed == {}


def test_a_hand_that_landmarks_miss_is_found_by_the_segmenter(tmp_path, square_video, evidence, monkeypatch):
    _, masks = evidence
    asked = {}

    def segment_clip(model, frames, progress):
        p = np.zeros((COUNT, 5, HEIGHT // 2, WIDTH // 2), np.float16)
        p[:, 0] = 0.5
        p[2:, 1, 5:15, 5:15] = 1
        return p

    def regress_clip(model, frames, K, boxes, report):
        asked.update(boxes)
        return {"right": estimates()}

    monkeypatch.setattr(prepare_stage, "_with_landmarks", lambda sequence, *a: sequence)
    monkeypatch.setattr(prepare_stage, "_networks", lambda *a: (object(), object()))
    monkeypatch.setattr("handhold.regressors.segment_clip.segment_clip", segment_clip)
    monkeypatch.setattr("handhold.regressors.hands.regress_clip", regress_clip)
    (masks / "right").rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(masks / "left")  # the user's masks speak of another side
    with pytest.raises(StopIteration):  # the masks of the hand that was found are then made, which is not tested here
        monkeypatch.setattr(prepare_stage, "_masks", lambda s, *a: next(iter([])) if "right" in s.landmarks else s)
        prepared(tmp_path, square_video, Config(prepare=PrepareConfig(masks=masks)))
    assert set(asked) == {"right", "left"} and np.isnan(asked["right"][:2]).all()
    assert np.allclose(asked["right"][2:], [10, 10, 30, 30])
    assert np.allclose(asked["left"], [10, 10, 30, 30])


def test_no_object_and_unusable_joints(tmp_path, square_video, evidence, capsys):
    joints, masks = evidence
    nothing = {name: np.zeros((COUNT, HEIGHT, WIDTH), bool) for name in ("right", "object")}
    write_masks(tmp_path / "black", nothing, np.arange(COUNT))
    with pytest.raises(StageFailed, match="No handled object"):
        prepared(tmp_path, square_video, Config(prepare=PrepareConfig(joints=joints, masks=tmp_path / "black")))
    np.savez(tmp_path / "nan.npz", right_points=np.full((COUNT, 21, 2), np.nan))
    np.savez(tmp_path / "inf.npz", right_points=np.full((COUNT, 21, 2), np.inf))
    np.savez(tmp_path / "few.npz", right_points=np.ones((COUNT - 1, 21, 2)))
    np.savez(tmp_path / "pickle.npz", right_points=np.array([{}], dtype=object), allow_pickle=True)
    for name in ("nan", "inf", "few", "pickle"):
        argv = ["run", str(square_video), "--joints", str(tmp_path / f"{name}.npz"), "--masks", str(masks)]
        assert main([*argv, "--out", str(tmp_path / "o"), "--quiet"]) == 3
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"{name}.npz" in err, err


def test_missing_weights_say_how_to_get_them(tmp_path, square_video, monkeypatch, capsys):
    monkeypatch.setenv("HANDHOLD_CACHE", str(tmp_path / "none"))
    assert main(["run", str(square_video), "--out", str(tmp_path / "o"), "--quiet"]) == 3
    assert "handhold assets" in capsys.readouterr().err


def test_an_incomplete_prepare_is_not_read(tmp_path, square_video, evidence):
    joints, masks = evidence
    run = prepared(tmp_path, square_video, Config(prepare=PrepareConfig(joints=joints, masks=masks)))
    (run.prepare_dir / "frames" / "000005.png").unlink()
    with pytest.raises(UnusableInput, match="run `handhold prepare"):
        load_prepared(run)


@pytest.fixture(scope="module")
def truth_run(tmp_path_factory, demo_clip) -> Run:
    """A run folder with the demo's truth as the scene, eight frames, and its real frames and masks."""
    sys.path.insert(0, str(Path(__file__).parent / "export"))
    from truth_scene import demo_truth, truth_scene

    from handhold.datasets.video import read_video

    gt = demo_truth()
    scene, s = truth_scene(gt), read_video(demo_clip / "video.mp4")
    masks = {"right": gt["masks"] == 1, "object": gt["masks"] == 3}
    run = Run(tmp_path_factory.mktemp("truth"))
    save_prepared(run, s.with_evidence(masks=masks, mask_confidence={k: np.ones(len(s)) for k in masks}))
    scene.save(run.scene_path)
    return run


def test_truth_scores_as_truth(truth_run, demo_clip):
    report = Progress()
    evaluate(truth_run, Config(evaluate=EvaluateConfig(truth=demo_clip / "gt.npz")), report)
    told = json.loads(truth_run.metrics_path.read_text())
    m = told["metrics"]
    assert told["truth"] and m["frames"] == 100 and m["mpjpe_right"] < 0.5 and m["rot_deg"] < 0.5 and m["f10"] > 99
    assert told["bodies"]["object"]["valid"] == told["bodies"]["object"]["frames"] == 48 and not report.reasons


def test_missing_frames_make_the_result_partial(truth_run, tmp_path):
    scene = Scene.load(truth_run.scene_path)
    body = replace(scene.bodies["object"], valid=np.arange(48) < 20)
    run = Run(tmp_path)
    replace(scene, bodies={"object": body}).save(run.scene_path)
    report = Progress()
    evaluate(run, Config(), report)
    assert report.reasons == ["The object was recovered in 20 of 48 frames.", "No hand was recovered."]
    assert json.loads(run.metrics_path.read_text())["metrics"] == {}


def test_export_writes_every_file(truth_run):
    n = 200
    rng = np.random.default_rng(0)
    truth_run.fit_dir.mkdir(exist_ok=True)
    np.savez(
        truth_run.fit_dir / "object_gaussians.npz",
        means=rng.normal(size=(n, 3)),
        quats=rng.normal(size=(n, 4)),
        scales=np.full((n, 3), 0.01),
        opacities=np.full(n, 0.5),
        colors=rng.random((n, 3)),
    )
    report = Progress()
    export(truth_run, Config(), report)
    for name in ("object.ply", "object_splat.ply", "scene.glb", "preview.mp4", "report.html"):
        assert (truth_run.root / name).stat().st_size > 1000, name
    assert not report.notes


def test_files_of_other_tools_follow_the_frames_and_keep_their_source(tmp_path, square_video, evidence):
    _, masks = evidence
    folder, points = tmp_path / "openpose", np.random.default_rng(0).uniform(10, 50, (COUNT, 21, 2))
    folder.mkdir()
    for i, p in enumerate(points):
        joints = np.hstack([p - 0.5, np.full((21, 1), 0.7)]).ravel().tolist()
        frame = {"version": 1.3, "people": [{"hand_right_keypoints_2d": joints, "hand_left_keypoints_2d": []}]}
        (folder / f"clip_{i:012d}_keypoints.json").write_text(json.dumps(frame))
    c = PrepareConfig(joints=folder, masks=masks, hand_regressor="off", start=0.3)
    run = prepared(tmp_path, square_video, Config(prepare=c))
    marks = load_prepared(run).landmarks["right"]
    assert marks.source == "openpose" and np.allclose(marks.points, points[3:], atol=1e-3)
    swapped = prepared(tmp_path / "b", square_video, Config(prepare=replace(c, joints_handedness="swapped")))
    assert list(load_prepared(swapped).landmarks) == ["left"]
    old = {k: v for k, v in load_npz(run.prepare_dir / "evidence.npz").items() if not k.endswith(".source")}
    save_npz(run.prepare_dir / "evidence.npz", old | {"version": np.int64(2)})
    assert load_prepared(run).landmarks["right"].source == "mediapipe"


def test_sam_goes_over_the_first_masks_and_the_users_win(tmp_path, square_video, evidence, monkeypatch):
    from handhold.regressors import sam
    from handhold.tracking import masks as first

    joints, masks = evidence
    only_object = tmp_path / "object_only"
    low = np.zeros((COUNT, HEIGHT, WIDTH), bool)
    low[:, 41:] = True
    write_masks(only_object, {"object": low}, np.arange(COUNT))

    def segment(sequence, report, seed, probabilities):
        found = {n: np.zeros((COUNT, HEIGHT, WIDTH), bool) for n in ("right", "object")}
        found["right"][:, 10:30, 10:30] = found["object"][:, 24:40, 40:60] = True
        return sequence.with_evidence(masks=found, mask_confidence={n: np.ones(COUNT, np.float32) for n in found})

    def predictor(frames, prompts, bodies, report):
        logits = np.full((2, COUNT, bodies, HEIGHT, WIDTH), -9.0)
        logits[:, :, 0, 10:32, 10:30] = logits[:, :, 1, 24:42, 40:60] = 9
        return logits

    opened = []
    monkeypatch.setattr(first, "segment", segment)
    monkeypatch.setattr(sam, "open_sam", lambda choice, device: opened.append(str(choice)) or predictor)
    monkeypatch.setattr(prepare_stage, "_networks", lambda *a: (None, None))
    c = PrepareConfig(joints=joints, hand_regressor="off", segmenter=Path("sam2:some/name"))
    s = load_prepared(prepared(tmp_path / "a", square_video, Config(prepare=c)))
    assert opened == ["sam2:some/name"] and s.masks["right"][:, 31, 20].all() and s.masks["object"][:, 41, 50].all()
    s = load_prepared(prepared(tmp_path / "b", square_video, Config(prepare=replace(c, masks=only_object))))
    assert s.masks["right"][:, 31, 20].all() and not s.masks["object"][:, 30, 50].any()
    assert s.masks["object"][:, 60, 5].all()
    prepared(tmp_path / "c", square_video, Config(prepare=replace(c, masks=masks)))
    assert len(opened) == 2  # with the object's mask and a hand's there is nothing to segment
