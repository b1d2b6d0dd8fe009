"""Parts joined by nothing that is followed, and the hand that tells how they stand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from handhold.tracking import rungs
from handhold.tracking.seams import MOVED, Witness, mend, parts
from handhold.tracking.sfm import SfmResult, nothing

F, SEAM = 24, 14


def tracked(turn: float, size: float = 1.0) -> tuple[SfmResult, Witness]:
    """A turning object seen from two sides: no point of frames 0..13 is seen later. From the seam on, the model is
    `turn` radians and `size` off. And the hand that holds it, exactly known."""
    rng = np.random.default_rng(0)
    true = np.tile(np.eye(4), (F, 1, 1))
    true[:, :3, :3] = Rotation.from_rotvec(np.linspace(0, 2.5, F)[:, None] * [0.6, 0.8, 0]).as_matrix()
    true[:, :3, 3] = [0.02, -0.01, 0.5] + 0.05 * np.sin(np.linspace(0, 3, F))[:, None]
    X = rng.normal(0, 0.03, (120, 3))
    grasp = np.eye(4)
    grasp[:3, :3], grasp[:3, 3] = Rotation.from_rotvec([0.3, -1.0, 0.4]).as_matrix(), [0.04, 0.05, -0.02]
    hand = Witness(true @ grasp, np.full(F, 0.7), np.ones(F, bool))
    frame, point = np.nonzero((np.arange(F)[:, None] < SEAM) == (np.arange(120)[None] < 60))
    poses, points, late = true.copy(), X.copy(), np.arange(F) >= SEAM
    wrong = Rotation.from_rotvec([0, turn, 0]).as_matrix()  # x = size wrong^T x' + c
    shift = turn * np.array([0.02, 0.01, -0.03])
    poses[late, :3, 3] = size * poses[late, :3, 3] - poses[late, :3, :3] @ wrong @ shift
    poses[late, :3, :3] = poses[late, :3, :3] @ wrong
    points[60:] = size * X[60:] @ wrong + shift
    good = np.ones(F, bool)
    sfm = replace(
        nothing(F, "sfm", ()), cam_from_object=poses, registered=good, confidence=np.full(F, 0.9, np.float32),
        points=points, point_colors=np.zeros((120, 3), np.uint8), tracks=np.stack([frame, point], 1),
        track_xy=np.zeros((len(frame), 2)), notes=(),
    )  # fmt: skip
    return sfm, hand


def test_the_model_of_the_test_projects_alike():
    right, wrong = tracked(0.0)[0], tracked(1.5, 1.7)[0]
    x, y = (s.cam_from_object[20, :3, :3] @ s.points[80] + s.cam_from_object[20, :3, 3] for s in (right, wrong))
    assert np.allclose(x[:2] / x[2], y[:2] / y[2])


def test_seams_are_where_nothing_is_followed():
    sfm, _ = tracked(0.0)
    assert [p.tolist() for p in parts(sfm)] == [list(range(SEAM)), list(range(SEAM, F))]
    joined = replace(sfm, tracks=np.argwhere(np.ones((F, 120), bool)))
    assert len(parts(joined)) == 1
    assert parts(nothing(F, "", ())) == [] or not len(parts(nothing(F, "", ()))[0])


@pytest.mark.parametrize("size", [1.0, 1.7])
def test_a_part_joined_wrongly_is_moved_as_the_hand_says(size):
    sfm, hand = tracked(1.5, size)
    right, _ = tracked(0.0)
    mended = mend(sfm, {"right": hand})
    # units are told by distances alone; with an exact hand they are exact too, but for the pull of its depth
    assert np.allclose(mended.cam_from_object[:, :3, :3], right.cam_from_object[:, :3, :3], atol=1e-6)
    assert np.allclose(mended.cam_from_object[:, :3, 3], right.cam_from_object[:, :3, 3], atol=0.01)
    assert np.allclose(mended.points, right.points, atol=0.01)
    assert np.allclose(mended.confidence[SEAM:], MOVED) and np.allclose(mended.confidence[:SEAM], 0.9)
    assert {rungs.object_rung(str(r)) for r in mended.reason[SEAM:]} == {rungs.SFM} and len(mended.notes) == 1


def test_what_no_hand_contradicts_stays_as_it_is():
    for turn in (0.0, 0.5):  # within what hands are wrong by
        sfm, hand = tracked(turn)
        assert mend(sfm, {"right": hand}) is sfm
    sfm, hand = tracked(1.5)
    assert mend(sfm, {}) is sfm
    unseen = replace(hand, confidence=np.where(np.arange(F) < SEAM, 0.7, 0.0))
    assert mend(sfm, {"right": unseen}) is sfm
    agrees = replace(hand, cam_from_hand=sfm.cam_from_object)  # one of two hands bears the join out
    assert mend(sfm, {"right": hand, "left": agrees}) is sfm
    assert mend(nothing(F, "", ()), {"right": hand}).cam_from_object.shape == (F, 4, 4)
