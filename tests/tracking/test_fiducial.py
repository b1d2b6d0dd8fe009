"""The hand as a fiducial, contact windows, the vocabulary of rungs, and the leash of the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from handhold.tracking import rungs
from handhold.tracking.bootstrap import on_leash
from handhold.tracking.contact import beside_in_picture, contact_windows, gaps
from handhold.tracking.fiducial import (
    CONTRADICTS,
    bridge_gaps,
    carry_clip,
    carry_missing,
    contradiction,
)

COUNT = 20


def pose(turn, place) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = Rotation.from_rotvec(turn).as_matrix(), place
    return out


def path(axis=(0.0, 1.0, 0.2), step=0.12) -> np.ndarray:
    return np.stack([pose(step * i * np.array(axis), [0.01 * i, 0.0, 0.5]) for i in range(COUNT)])


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.degrees(Rotation.from_matrix(a[:3, :3].T @ b[:3, :3]).magnitude()))


def test_missing_frames_go_along_with_the_hand_of_the_same_grasp():
    wrist, held = path(), pose([0.3, -0.2, 0.9], [0.02, 0.05, -0.01])
    regrasped = pose([1.5, 0.0, 0.0], [0.0, 0.05, 0.0])
    true = np.stack([w @ (held if i < 10 else regrasped) for i, w in enumerate(wrist)])
    given = true.copy()
    given[[4, 5, 12, 19]] = np.nan
    own = np.full(COUNT, 0.8)
    own[5] = 0.0
    holds = np.arange(COUNT) != 19
    hands, windows = {"right": (wrist, own, holds)}, {"right": np.array([[0, 10], [10, COUNT]])}
    found = carry_missing(given, np.ones(COUNT), hands, windows)
    assert np.allclose(found.cam_from_object[[4, 12]], true[[4, 12]], atol=1e-6)
    assert np.isnan(found.cam_from_object[[5, 19]]).all()  # an unseen hand; a hand that does not hold it
    rest = np.delete(np.arange(COUNT), [4, 5, 12, 19])
    assert (found.cam_from_object[rest] == given[rest]).all() and (found.confidence[rest] == 0).all()
    assert 0.1 < found.confidence[4] < 0.35


def test_a_clip_without_any_pose_takes_the_surest_hands_frame():
    sure, unsure = np.full(COUNT, 0.6), np.full(COUNT, 0.3)
    holds = np.arange(COUNT) >= 5
    found = carry_clip({"left": (path(), unsure, holds), "right": (2 * path(), sure, holds)})
    assert found.side == "right" and np.isnan(found.cam_from_object[:5]).all() and (found.confidence[:5] == 0).all()
    assert (found.cam_from_object[5:] == 2 * path()[5:]).all()
    assert carry_clip({"left": (path(), unsure, np.zeros(COUNT, bool))}) is None and carry_clip({}) is None


def test_a_model_that_turns_otherwise_than_the_hand_is_contradicted():
    wrist, sure, holds = path(), np.full(COUNT, 0.7), np.ones(COUNT, bool)
    assert contradiction(wrist @ pose([1, 2, 3], [0.1, 0, 0]), wrist, sure, holds) < 1e-6
    other = np.linalg.inv(path())  # the mirrored motion: turns the other way
    assert contradiction(other, wrist, sure, holds) > CONTRADICTS
    assert contradiction(other, wrist, 0.1 * sure, holds) is None
    still = np.tile(np.eye(4), (COUNT, 1, 1))
    assert contradiction(still, still, sure, holds) is None


def test_short_gaps_close_along_the_geodesic():
    true, centre = path(), np.array([0.01, 0.0, 0.02])
    given = true.copy()
    given[[3, 4, 9, 10, 11, 12, 0]] = np.nan
    filled = bridge_gaps(given, centre)
    assert np.flatnonzero(filled).tolist() == [3, 4]  # the ends and longer gaps stay open
    assert all(apart(given[i], true[i]) < 1e-3 for i in (3, 4)) and np.isnan(given[[0, 9, 12]]).all()
    at = given[:, :3, :3] @ centre + given[:, :3, 3]
    assert np.allclose(at[3], (2 * at[2] + at[5]) / 3)
    fast = path(step=0.9)
    fast[3:5] = np.nan
    assert not bridge_gaps(fast, centre).any()


def test_contact_is_lasting_nearness():
    gap = np.full(30, 0.05)
    gap[2:12], gap[6] = 0.004, np.nan
    gap[9] = 0.03  # lost for a frame
    gap[15:17] = 0.001  # a moment
    gap[20:30] = 0.01
    assert contact_windows(gap).tolist() == [[2, 12], [20, 30]]
    assert contact_windows(np.full(5, np.nan)).shape == (0, 2)


def test_gaps_are_measured_in_the_objects_frame():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(4000, 3))
    points *= 0.03 / np.linalg.norm(points, axis=1, keepdims=True)  # a ball
    poses = path()
    patch = np.array([0.0, 0.0, 0.04]) + np.stack([np.linspace(0, 1e-3, 20)] * 3, 1) * [1, 1, 0]
    vertices = np.einsum("fab,vb->fva", poses[:, :3, :3], patch) + poses[:, None, :3, 3]
    poses[3] = np.nan
    found = gaps(vertices, poses, points)
    assert np.isnan(found[3]) and np.abs(np.delete(found, 3) - 0.01).max() < 0.002
    assert np.isnan(gaps(vertices, poses, np.zeros((0, 3)))).all()


def test_masks_beside_each_other():
    hand, thing = np.zeros((2, 20, 200), bool), np.zeros((2, 20, 200), bool)
    hand[:, :, :50] = thing[0, :, 51:90] = thing[1, :, 70:90] = True
    assert beside_in_picture(hand, thing).tolist() == [True, False]


@pytest.mark.parametrize("leash", [0.0, 0.5])
def test_the_leash_keeps_turns_near_the_start_and_takes_places(leash):
    start, centre = path(), np.array([0.0, 0.02, 0.01])
    turn = pose([0.2, 0.0, 0.0], [0.0, 0.0, 0.0])
    moved = start.copy()
    moved[:, :3, :3] = turn[:3, :3] @ start[:, :3, :3]
    moved[:, :3, 3] += [0.0, 0.0, 0.03]
    moved[5] = np.nan
    out = on_leash(moved, start, start, centre, leash)
    assert (out[5] == start[5]).all()
    rest = np.delete(np.arange(COUNT), 5)
    assert np.allclose([apart(out[i], start[i]) for i in rest], np.degrees(0.2) * leash, atol=1e-4)
    assert np.allclose(
        (out[:, :3, :3] @ centre + out[:, :3, 3])[rest], (moved[:, :3, :3] @ centre + moved[:, :3, 3])[rest]
    )


def test_reasons_are_rungs():
    told = {
        "sfm": rungs.SFM, "sfm: merged sub-model": rungs.SFM, "sfm: hand's texture": rungs.SFM_HAND,
        "not registered": rungs.NOT_FOUND, "disagrees with its neighbours": rungs.NOT_FOUND,
        "too little texture": rungs.NOT_FOUND, rungs.FIDUCIAL: rungs.FIDUCIAL,
    }  # fmt: skip
    assert {k: rungs.object_rung(k) for k in told} == told and rungs.object_rung("sfm", True) == rungs.SFM_HAND
    assert rungs.hand_rung("landmarks and regressor", 0.5) == rungs.GRASP
    assert rungs.hand_rung("regressor only, object pose unknown", 0.5) == rungs.ALONE
    assert rungs.hand_rung("carried by the grasp", 0.5) == rungs.CARRIED
    assert [rungs.hand_rung("not found", c) for c in (0.0, 0.2)] == [rungs.NOT_FOUND, rungs.INTERPOLATED]
    assert rungs.codes(np.array(["sfm", "what"]), rungs.OBJECT_RUNGS).tolist() == [len(rungs.OBJECT_RUNGS) - 1, -1]
    assert set(rungs.OBJECT_RUNGS) | set(rungs.HAND_RUNGS) == set(rungs.MEANING)
    assert rungs.doubts(np.array(["sfm", "sfm"])) == []
    assert "2 where it turns suddenly" in rungs.doubts(np.array(["sfm: turns suddenly"] * 2))[0]
