"""Joining readings into tracks: laws that need no network."""

from dataclasses import replace

import numpy as np

from handhold.regressors.landmarks import Reading, _as_landmarks, _tracks, spread_confidence


def reading(x, y=100.0, right=0.95, confidence=0.9, scale=60.0):
    p = np.zeros((21, 2))
    for f in range(5):
        for k in range(4):
            p[1 + 4 * f + k] = [(f - 2) * 0.3, -(0.6 if f == 0 else 1.0) - 0.2 * k]
    return Reading(p * scale + [x, y], np.zeros((21, 3)), np.zeros(21), 0.9, right, confidence)


def test_confidence_falls_with_spread_and_without_presence():
    c = [spread_confidence(s, 0.9) for s in (0.01, 0.03, 0.05, 0.1, 0.3)]
    assert all(a > b for a, b in zip(c, c[1:], strict=False))
    assert c[0] > 0.95 and c[-1] < 0.02
    assert spread_confidence(0.01, 0.1) == 0


def test_handedness_is_one_decision_a_clip():
    clip = [[reading(100 + 3 * i)] for i in range(20)]
    for i in (4, 9, 15):
        clip[i] = [replace(clip[i][0], right=0.02)]  # the network sees a left hand now and then
    tracks = _tracks(clip, None)
    assert list(tracks) == ["right"]
    assert all(tracks["right"][i] is None for i in (4, 9, 15))  # mirror readings are wrong readings
    assert sum(r is not None for r in tracks["right"]) == 17


def test_two_hands_cross():
    clip = [[reading(100 + 20 * i), reading(480 - 20 * i, y=260, right=0.05)] for i in range(20)]
    tracks = _tracks(clip, None)
    assert list(tracks) == ["right", "left"]
    assert all(r.right > 0.5 for r in tracks["right"]) and all(r.right < 0.5 for r in tracks["left"])


def test_teleport_is_rejected_and_gap_is_bridged():
    clip = [[reading(100 + 3 * i)] for i in range(20)]
    clip[7] = [reading(900, y=700, confidence=0.7)]
    clip[10] = []
    track = _tracks(clip, ("right",))["right"]
    assert track[7] is None and track[10] is None
    assert sum(r is not None for r in track) == 18


def test_wrong_size_is_rejected():
    clip = [[reading(100 + 3 * i)] for i in range(12)]
    clip[5] = [reading(115, scale=300.0, confidence=0.5)]
    assert _tracks(clip, ("right",))["right"][5] is None


def test_brief_second_hand_needs_to_be_asked_for():
    clip = [[reading(100)] for _ in range(40)]
    clip[3].append(reading(500, right=0.02))
    assert list(_tracks(clip, None)) == ["right"]
    assert list(_tracks(clip, ("right", "left"))) == ["right", "left"]
    assert list(_tracks(clip, ("left",))) == ["left"]
    assert _tracks([[], []], None) == {}


def test_landmarks_are_nan_where_nothing_was_found():
    out = _as_landmarks({"right": [None, reading(50), None]}, 3)["right"]
    assert out.confidence.tolist() == [0, np.float32(0.9), 0]
    assert np.isnan(out.points[[0, 2]]).all() and np.isfinite(out.points[1]).all()
