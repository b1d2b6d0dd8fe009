"""The tracking benchmark: exact tracks score no error, known errors are told as they are, damage is repeatable."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))
tables = pytest.importorskip("tables_tracking", reason="an installed package without benchmarks/")
scores = pytest.importorskip("tracking_scores")

import tracking as benchmark  # noqa: E402
from handhold.config import BadConfig, Config, TrackConfig, TrackingStep, from_dict  # noqa: E402
from handhold.geometry.rigid import so3_exp  # noqa: E402
from handhold.runs import Run  # noqa: E402
from handhold.scene import HandEstimates, Landmarks, Sequence  # noqa: E402
from handhold.stages.prepare import load_prepared, save_prepared  # noqa: E402
from handhold.stages.track import HandTrack, Tracks, evidence_without  # noqa: E402
from handhold.stages.track_hands import sides_of  # noqa: E402

F, H, W = 20, 24, 32
pytestmark = pytest.mark.usefixtures("one_thread")


def turn(*w: float) -> np.ndarray:
    import torch

    return so3_exp(torch.tensor(w, dtype=torch.float64)).numpy()


@pytest.fixture
def poses() -> np.ndarray:
    rng = np.random.default_rng(0)
    T = np.tile(np.eye(4), (F, 1, 1))
    for f in range(F):
        T[f, :3, :3] = turn(*(0.1 * f * np.array([0.5, 1, 0.2])))
        T[f, :3, 3] = [0.02 * rng.normal(), 0.02 * rng.normal(), 0.5 + 0.05 * rng.normal()]
    return T


@pytest.fixture
def clip(poses) -> tuple[Sequence, Tracks, dict]:
    rng = np.random.default_rng(1)
    labels = np.zeros((F + 2, H, W), np.uint8)
    labels[:, 4:14, 4:16], labels[:, 10:20, 16:28] = 1, 3
    hand = HandTrack(
        0.2 * rng.normal(size=(F, 16, 3)), np.zeros(10), np.array([0, 0, 0.5]) + 0.02 * rng.normal(size=(F, 3)),
        np.ones(F, np.float32), np.full(F, "landmarks"), np.zeros((0, 2), np.int64),
    )  # fmt: skip
    joints = scores.posed_joints("right", hand)
    indices = np.setdiff1d(np.arange(F + 2), [3, 11])
    spread = lambda x: x[np.searchsorted(indices, np.arange(F + 2)).clip(max=F - 1)]  # noqa: E731
    gt = {"object_poses": spread(poses), "right_joints": spread(joints), "masks": labels}
    marks = Landmarks(rng.uniform(4, 14, (F, 21, 2)).astype(np.float32), joints.astype(np.float32), np.ones(F))
    seen = HandEstimates(hand.pose, np.zeros((F, 10)), joints, marks.points, np.ones((F, 21)))
    sequence = Sequence(
        rng.integers(0, 255, (F, H, W, 3), np.uint8), indices, 15.0, np.diag([30.0, 30, 1]), "given",
        landmarks={"right": marks}, regressed={"right": seen},
        masks={"right": labels[indices] == 1, "object": labels[indices] == 3},
        mask_confidence={"right": np.ones(F, np.float32), "object": np.ones(F, np.float32)},
    )  # fmt: skip
    reason = np.array(["sfm"] * (F - 1) + ["not registered"])
    camera = np.tile(np.eye(4), (F, 1, 1)), True, np.ones(F), np.full(F, "static")
    points = np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    tracks = Tracks(poses.copy(), np.ones(F), reason, *points, {"right": hand}, *camera)
    return sequence, tracks, gt


def test_exact_tracks_have_no_error(clip):
    out = scores.score_tracks(*clip)
    assert out["poses"] == out["poses_sure"] == out["frames_right"] == 100
    for name in ("rot_deg", "place_mm", "mpjpe_right", "pa_mpjpe_right", "scale_error"):
        assert out[name] == pytest.approx(0, abs=1e-4), name
    assert all(out[f"iou_{k}{p}"] == 1 for k in ("right", "object", "hand") for p in ("", "_pooled"))
    assert "iou_left" not in out and "mpjpe_left" not in out


def test_another_frame_and_size_of_the_object_are_no_error(poses):
    """x_object = s A x_true + c changes neither rotations between frames nor, once taken out, where the object is."""
    s, A, c = 1.25, turn(0.3, -1, 2), np.array([0.03, -0.01, 0.02])
    ours = poses.copy()
    ours[:, :3, :3] = poses[:, :3, :3] @ A.T
    ours[:, :3, 3] = s * poses[:, :3, 3] - ours[:, :3, :3] @ c
    out = scores.score_object(ours, np.ones(F), poses)
    assert out["rot_deg"] == pytest.approx(0, abs=1e-4) and out["place_mm"] == pytest.approx(0, abs=1e-6)
    assert out["pose_scale"] == pytest.approx(s)


def test_known_errors_are_told(clip):
    sequence, tracks, gt = clip
    ours = tracks.cam_from_object.copy()
    ours[0] = np.nan
    ours[1::2, :3, :3] = turn(0, 0, np.radians(10)) @ ours[1::2, :3, :3]
    confidence = np.where(np.arange(F) == 1, 0.01, 1.0)
    out = scores.score_object(ours, confidence, gt["object_poses"][sequence.indices])
    assert out["poses"] == pytest.approx(95) and out["poses_sure"] == pytest.approx(90)
    assert 0 < out["rot_deg"] <= 10 + 1e-6
    true = gt["right_joints"][sequence.indices]
    moved = true.copy()
    moved[:, 1:, 0] += 0.005  # every joint but the wrist, 5 mm
    figures, size = scores.score_hand("right", moved, np.ones(F, bool), true)
    assert figures["mpjpe_right"] == pytest.approx(5 * 20 / 21)
    figures, size = scores.score_hand("right", 1.1 * true, np.ones(F, bool), true)
    assert figures["pa_mpjpe_right"] == pytest.approx(0, abs=1e-6) and size == pytest.approx(1.1)


def test_an_object_too_large_for_its_hand_is_told(clip):
    sequence, tracks, gt = clip
    ours = tracks.cam_from_object.copy()
    ours[:, :3, 3] *= 1.2
    out = scores.score_tracks(sequence, replace(tracks, cam_from_object=ours), gt)
    assert out["scale_error"] == pytest.approx(20, abs=1e-3)


def test_a_peers_joints_are_marked_as_such(clip):
    sequence, tracks, gt = clip
    gt["right_peer_joints"] = gt.pop("right_joints").copy()
    gt["right_peer_joints"][:, [1, 2, 3, 5, 6, 7]] = np.nan
    out = scores.score_tracks(sequence, tracks, gt)
    assert out["mpjpe_right_peer"] == pytest.approx(0, abs=1e-4) and "mpjpe_right" not in out
    assert out["scale_error"] == pytest.approx(0, abs=1e-3)


def test_a_hand_that_is_not_there_and_one_that_was_not_found(clip):
    sequence, tracks, gt = clip
    hand = tracks.hands["right"]
    out = scores.score_tracks(sequence, replace(tracks, hands={"left": hand}), gt)
    assert out["frames_right"] == 0 and out["frames_left_phantom"] == 100 and "scale_error" not in out


def test_masks_by_frame_and_pooled():
    labels = np.zeros((3, 10, 10), np.uint8)
    labels[0, :2], labels[1, :8] = 3, 3
    ours = np.zeros((3, 10, 10), bool)
    ours[0, :1], ours[1, :8] = True, True
    out = scores.score_masks({"object": ours}, labels)
    assert out["iou_object"] == pytest.approx((0.5 + 1) / 2) and out["iou_object_pooled"] == pytest.approx(90 / 100)
    larger = np.kron(labels, np.ones((1, 2, 2), np.uint8))
    assert scores.score_masks({"object": ours}, larger) == out
    swapped = scores.score_masks({"left": labels == 3}, np.where(labels == 3, 1, 0))
    assert swapped["iou_right"] == swapped["iou_left"] == 0 and swapped["iou_hand"] == 1


def test_damage_is_repeatable_and_takes_the_estimates_along(clip):
    sequence = clip[0]
    a, b, other = benchmark.spoilt(sequence, 0), benchmark.spoilt(sequence, 0), benchmark.spoilt(sequence, 1)
    assert len(a) == F - 2 and set(a.landmarks) == {"right", "left"}
    for side in a.landmarks:
        np.testing.assert_array_equal(a.landmarks[side].points, b.landmarks[side].points)
    np.testing.assert_array_equal(a.masks["object"], b.masks["object"])
    assert not np.array_equal(a.indices, other.indices) or not np.array_equal(a.masks["object"], other.masks["object"])
    lost = a.landmarks["right"].confidence == 0
    assert 0 < lost.sum() < len(a)
    np.testing.assert_array_equal((a.regressed["right"].confidence == 0).all(1), lost)


def test_a_prepared_clip_is_taken_over_and_spoilt_once(clip, tmp_path):
    source, target = Run(tmp_path / "a"), Run(tmp_path / "b")
    source.root.mkdir()
    (source.root / "run.json").write_text("{}")
    save_prepared(source, clip[0])
    source.finish("prepare", "key", ("1_prepare",), 1.0, (), ())
    benchmark.take_prepared(source, target, 0)
    assert len(load_prepared(target)) == F - 2 and target.stamp("prepare") is not None
    (target.root / "note").write_text("still there")
    benchmark.take_prepared(source, target, 0)
    assert (target.root / "note").is_file()
    benchmark.take_prepared(source, target, 1)
    assert not (target.root / "note").is_file()


def test_steps_to_leave_out(monkeypatch):
    assert from_dict({"track": {"without": ["loops"]}}).track.without == ("loops",)
    with pytest.raises(BadConfig, match="must be one of"):
        from_dict({"track": {"without": ["everything"]}})
    with pytest.raises(BadConfig, match="everything"):
        TrackConfig(without=("everything",))
    assert Config().track.without == ()
    every = benchmark.configurations(["all"], None)
    assert set(every) == {f"without:{name}" for name in get_args(TrackingStep)}
    for missing, name in ((["kornia"], "corrupt"), ([], "corrupt+learned")):
        monkeypatch.setattr(benchmark, "missing_packages", lambda missing=missing: missing)
        assert benchmark.configurations(["loops+merging"], 3) == {
            "without:loops+merging": (("loops", "merging"), None),
            name: ((), 3),
        }
    assert benchmark.configurations([], None) == {"default": ((), None)}


def test_evidence_can_be_left_out(clip):
    out = evidence_without(clip[0], ("regressor", "landmarks-3d"))
    assert not out.regressed and np.isnan(out.landmarks["right"].points3d).all()
    assert evidence_without(clip[0], ()) is clip[0]


def test_a_hand_misread_now_and_then_is_no_second_hand(clip):
    told = []
    notes = SimpleNamespace(note=told.append)
    spoilt = [benchmark.spoilt(clip[0], seed) for seed in range(4)]
    assert all(sides_of(s, notes) == ["right"] for s in spoilt)
    assert len(told) == sum((s.landmarks["left"].confidence > 0).any() for s in spoilt) > 0
    both = replace(clip[0], landmarks={s: clip[0].landmarks["right"] for s in ("right", "left")})
    assert sides_of(both, notes) == ["right", "left"]


def test_results_are_merged_and_make_tables(tmp_path):
    path = tmp_path / "results" / "tracking.json"
    figures = {"poses": 100.0, "rot_deg": 1.5, "mpjpe_right": 9.0, "iou_object": 0.91}
    row = {
        "frames": 48, "tracks": figures, "fit": {"frames_given": 100.0, "cd_right": 2.0},
        "rungs": {"object": scores.rungs(["sfm", "lost", "sfm"])}, "seconds": {"track": 40.0},
        "peak_mb": {"track": 900},
        "handhold": "0", "machine": "2 cores", "date": "today",
    }  # fmt: skip
    benchmark.keep(path, "demo", "default", row)
    benchmark.keep(path, "demo", "without:loops", row | {"tracks": figures | {"rot_deg": 3.0}})
    benchmark.keep(path, "demo", "default", row | {"peak_mb": {}})  # up to date: its peak was not measured again
    benchmark.keep(
        path, "soup", "default", {k: row[k] for k in ("handhold", "machine", "date")} | {"error": "too dark"}
    )
    results = json.loads(path.read_text())
    assert results["clips"]["demo"]["default"]["peak_mb"] == {"track": 900}
    assert row["rungs"]["object"] == {"sfm": 2, "lost": 1}
    for make in (tables.results_table, tables.baselines_table, tables.rungs_table, tables.ablation_table):
        assert "No results yet" in make({}) or make is tables.baselines_table
        blocks = [b.splitlines() for b in make(results).split("\n\n")]
        assert any(block[0].startswith("|") for block in blocks)
        for block in (b for b in blocks if b[0].startswith("|")):
            assert len({line.count("|") for line in block}) == 1, (make.__name__, block)
    assert "3.0 (1.5)" in tables.ablation_table(results) and "48 @ 1.5°" in tables.baselines_table(results)
    assert "too dark" in tables.results_table(results)
