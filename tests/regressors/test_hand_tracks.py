"""One hand per side from detections of single frames: laws that need no tool."""

import numpy as np
import pytest

from drawn_hands import hand, posed
from handhold.regressors.hand_files.tracks import Detection, chirality, join

NONE3 = np.full((21, 3), np.nan)


def seen(frame, x, right, y=100.0, confidence=1.0, points3d=NONE3):
    return Detection(frame, hand(x, y), points3d, right, confidence)


@pytest.mark.parametrize("side, sign", [("right", 1), ("left", -1)])
def test_bent_fingers_tell_which_hand_it_is(side, sign):
    joints = np.stack([posed(side, bend, seed) for bend in (0.2, 0.5, 0.8) for seed in range(4)])
    assert chirality(joints) == pytest.approx(sign)
    assert chirality(joints * (-1, 1, 1)) == pytest.approx(-sign)
    assert chirality(NONE3[None]) == 0


def test_sides_that_flip_in_single_frames_are_one_vote_a_track():
    """Two hands cross while the detector swaps their names now and then."""
    rng = np.random.default_rng(0)
    found = []
    for i in range(30):
        flip = rng.random() < 0.25
        there = rng.normal(0, 0.05, (21, 3))
        found += [seen(i, 100 + 14 * i, 1.0 - flip, points3d=there), seen(i, 520 - 14 * i, float(flip), y=140)]
    rng.shuffle(found)
    out, notes = join(found, 30, "mano")
    assert list(out) == ["right", "left"] and out["right"].source == "mano"
    for side, x, y in (("right", 100 + 14 * np.arange(30), 100), ("left", 520 - 14 * np.arange(30), 140)):
        wrist = out[side].points[:, 0]
        assert np.allclose(wrist, np.stack([x, np.full(30, y)], -1))
    flipped = out["right"].confidence == 0.5
    assert 0 < flipped.sum() < 15 and np.isnan(out["right"].points3d[flipped]).all()
    assert np.isfinite(out["right"].points3d[~flipped]).all() and "other hand" in notes[0]


def test_confidence_is_the_weight_of_the_vote():
    found = [seen(i, 100, 0.0, confidence=0.2) for i in range(6)] + [seen(i, 100, 1.0, confidence=0.9) for i in (6, 7)]
    assert list(join(found, 8)[0]) == ["right"]


def test_one_hand_detected_as_both_is_one_hand():
    found = [d for i in range(10) for d in (seen(i, 100, 1.0, confidence=0.9), seen(i, 104, 0.0, confidence=0.4))]
    out, _ = join(found, 10)
    assert list(out) == ["right"] and np.allclose(out["right"].points[3], hand(100))


def test_a_brief_reading_of_the_other_side_is_the_same_hand():
    found = [seen(i, 100 + i, 1.0) for i in range(40) if i < 5 or i > 20] + [seen(12, 400, 0.0)]
    out, notes = join(found, 40)
    assert list(out) == ["right"] and out["right"].confidence[12] == 0.5
    beside = [seen(i, 100, 1.0) for i in range(40)] + [seen(12, 400, 0.0)]
    out, notes = join(beside, 40)
    assert list(out) == ["right"] and "left out" in notes[0]


def test_two_hands_at_once_are_not_both_right_and_a_third_is_nobodys():
    hands = ((100, 1.0, 1.0), (400, 0.9, 0.8), (700, 1.0, 0.3))
    out, notes = join([seen(i, x, right, confidence=c) for i in range(10) for x, right, c in hands], 10)
    assert np.allclose(out["right"].points[:, 0, 0], 100) and np.allclose(out["left"].points[:, 0, 0], 400)
    assert "third hand" in notes[-1]


def test_a_hand_found_anew_in_the_frame_where_its_track_ends_keeps_its_side():
    found = [seen(i, 100, 1.0, confidence=0.8) for i in range(10)] + [seen(i, 200, 1.0) for i in range(9, 20)]
    out, _ = join(found, 20)
    assert list(out) == ["right"] and out["right"].points[9, 0, 0] == 200 and out["right"].points[8, 0, 0] == 100


def test_missing_joints_do_not_part_a_track():
    found = [seen(i, 100 + 5 * i, 1.0) for i in range(12)]
    for d in found[3:6]:
        d.points[5:12] = np.nan
    out, _ = join(found, 12)
    assert (out["right"].confidence == 1).all() and np.isnan(out["right"].points[4, 6]).all()
    assert join([], 12) == ({}, [])
