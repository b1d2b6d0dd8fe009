"""A user's own landmarks: what is read, and one sentence for what is not."""

import json

import numpy as np
import pytest

from handhold.errors import StageFailed, UnusableInput
from handhold.regressors.landmark_files import load_landmarks, save_landmarks
from handhold.scene import Landmarks

F = 4


@pytest.fixture
def good():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 400, (F, 21, 2)).astype(np.float32)
    points[1] = np.nan
    points3d = rng.normal(0, 0.05, (F, 21, 3)).astype(np.float32)
    return {
        "right_points": points,
        "right_points3d": points3d,
        "right_confidence": np.array([1, 0, 0.5, 0.2], np.float32),
    }


def test_round_trip(tmp_path, good):
    np.savez(tmp_path / "a.npz", **good)
    found = load_landmarks(tmp_path / "a.npz", F)
    assert list(found) == ["right"]
    save_landmarks(tmp_path / "b.npz", found)
    again = load_landmarks(tmp_path / "b.npz", F)["right"]
    for name in ("points", "points3d", "confidence"):
        np.testing.assert_array_equal(getattr(found["right"], name), good[f"right_{name}"])
        np.testing.assert_array_equal(getattr(again, name), good[f"right_{name}"])
    assert isinstance(again, Landmarks)


def test_confidence_and_3d_may_be_absent(tmp_path, good):
    np.savez(tmp_path / "a.npz", left_points=good["right_points"])
    left = load_landmarks(tmp_path / "a.npz", F)["left"]
    assert left.confidence.tolist() == [1, 0, 1, 1]
    assert np.isnan(left.points3d).all()


def test_json_with_nulls(tmp_path, good):
    points = good["right_points"].tolist()
    points[1], points[2][3] = None, None
    (tmp_path / "a.json").write_text(json.dumps({"right": {"points": points, "confidence": [1, None, 0.5, 0.2]}}))
    right = load_landmarks(tmp_path / "a.json", F)["right"]
    assert np.isnan(right.points[1]).all() and np.isnan(right.points[2, 3]).all()
    np.testing.assert_allclose(right.points[0], good["right_points"][0], rtol=1e-6)
    assert right.confidence[1] == 0


def test_one_nan_coordinate_is_a_lost_joint(tmp_path, good):
    good["right_points"][0, 5, 0] = np.nan
    np.savez(tmp_path / "a.npz", **good)
    assert np.isnan(load_landmarks(tmp_path / "a.npz", F)["right"].points[0, 5]).all()


def spoil(good, how):
    if how == "inf":
        good["right_points"][0, 0, 0] = np.inf
    elif how == "huge":
        good["right_points"][0, 0, 0] = 1e9
    elif how == "frames":
        good["right_points"] = good["right_points"][:3]
    elif how == "joints":
        good["right_points"] = good["right_points"][:, :16]
    elif how == "confidence":
        good["right_confidence"][0] = -1
    elif how == "text":
        good["right_points"] = np.full((F, 21, 2), "x")
    elif how == "all nan":
        good["right_points"][:] = np.nan
    elif how == "no hand":
        return {"points": good["right_points"]}
    elif how == "3d":
        good["right_points3d"] = good["right_points"]
    return good


@pytest.mark.parametrize("how", ["inf", "huge", "frames", "joints", "confidence", "text", "all nan", "no hand", "3d"])
def test_bad_npz_is_one_sentence(tmp_path, good, how):
    np.savez(tmp_path / "a.npz", **spoil(good, how))
    with pytest.raises(UnusableInput) as e:
        load_landmarks(tmp_path / "a.npz", F)
    assert "a.npz" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"right": 3}', '{"right": {"points": 3}}', '{"right": {"points": [[1, 2]]}}', "[" * 5000,
     '{"right": {"points": [[["a", 1]]]}}', '{"right": {"points": [null, null, null, null]}}', "\x00\xff"],
)  # fmt: skip
def test_bad_json_is_one_sentence(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(UnusableInput) as e:
        load_landmarks(tmp_path / "a.json", F)
    assert "\n" not in str(e.value)


def test_absent_and_pickled_files(tmp_path):
    with pytest.raises(UnusableInput, match="does not exist"):
        load_landmarks(tmp_path / "none.npz", F)
    with pytest.raises(UnusableInput, match="does not exist"):
        load_landmarks(tmp_path / "none.json", F)
    np.savez(tmp_path / "p.npz", right_points=np.array([{}], object))
    with pytest.raises(UnusableInput):
        load_landmarks(tmp_path / "p.npz", F)


def test_require_hands(good):
    from handhold.regressors.landmarks import require_hands

    with pytest.raises(StageFailed, match="No hand was found in a.mp4"):
        require_hands({}, "a.mp4")
    some = {"left": Landmarks(good["right_points"], good["right_points3d"], np.array([0, 0, 0.5, 0], np.float32))}
    assert require_hands(some) is some
