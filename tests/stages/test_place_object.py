"""Which rung places the object in which frame, and what is said of its size."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from handhold.geometry.cameras import default_K
from handhold.hand import HandModel
from handhold.progress import Progress
from handhold.scene import Sequence
from handhold.stages.track_object import place_object, scale_is_known
from handhold.tracking import rungs
from handhold.tracking.sfm import SfmResult, nothing

COUNT, SCALE = 16, 0.5
HELD = np.array([-0.09, -0.03, 0.0])  # the object's middle in the hand's frame: before the palm


def hand_track(confidence=0.8):
    """An open hand that turns and moves, and its wrist's poses."""
    model = HandModel.open("right", dtype=torch.float64)
    pose, transl = np.zeros((COUNT, 16, 3)), np.zeros((COUNT, 3))
    pose[:, 0] = np.outer(np.arange(COUNT), [0.02, 0.1, 0.03])
    transl[:, 2], transl[:, 0] = 0.5, 0.005 * np.arange(COUNT)
    posed = model.with_shape(torch.zeros(10, dtype=torch.float64)).with_pose(
        torch.as_tensor(pose), torch.as_tensor(transl)
    )
    h = SimpleNamespace(
        pose=pose, joints=posed.joints.numpy(), vertices=posed.vertices.numpy(),
        confidence=np.full(COUNT, confidence), windows=[(0, COUNT)], scale_std=0.02,
    )  # fmt: skip
    wrist = np.tile(np.eye(4), (COUNT, 1, 1))
    wrist[:, :3, :3], wrist[:, :3, 3] = Rotation.from_rotvec(pose[:, 0]).as_matrix(), h.joints[:, 0]
    return h, wrist


def clip(beside=True) -> Sequence:
    hand, thing = np.zeros((COUNT, 24, 32), bool), np.zeros((COUNT, 24, 32), bool)
    hand[:, :, :10] = True
    thing[:, 4:20, 10 if beside else 20 : 28] = True
    frames = np.zeros((COUNT, 24, 32, 3), np.uint8)
    return Sequence(frames, np.arange(COUNT), 10.0, default_K(32, 24), "given", masks={"right": hand, "object": thing})


def found(h, wrist, missing, far=0.0) -> tuple[SfmResult, np.ndarray]:
    """Structure from motion in units of SCALE, with some frames missing, and the true poses in metres."""
    true = wrist.copy()
    true[:, :3, 3] += wrist[:, :3, :3] @ HELD
    points = (h.vertices[0][::7] - true[0, :3, 3]) @ true[0, :3, :3] + far
    given = true.copy()
    given[:, :3, 3] /= SCALE
    given[missing] = np.nan
    ok = np.isfinite(given[:, 0, 0])
    sfm = replace(
        nothing(COUNT, "not registered", ()), cam_from_object=given, registered=ok, confidence=0.9 * ok,
        reason=np.where(ok, "sfm: merged sub-model", "not registered"), points=points / SCALE,
    )  # fmt: skip
    return sfm, true


def test_the_hand_places_what_structure_from_motion_could_not():
    h, wrist = hand_track()
    sfm, true = found(h, wrist, [3, 4, 11])
    report = Progress()
    placed = place_object(clip(), sfm, SCALE, {"right": h}, report)
    assert np.allclose(placed.cam_from_object, true, atol=1e-6)
    assert np.flatnonzero(placed.reason == rungs.FIDUCIAL).tolist() == [3, 4, 11]
    assert (np.delete(placed.reason, [3, 4, 11]) == rungs.SFM).all() and placed.carried_by == ""
    assert 0 < placed.confidence[4] < 0.35 and placed.confidence[0] == np.float32(0.9)
    assert placed.contacts["right"].tolist() == [[0, COUNT]]
    assert scale_is_known({"right": h}, placed, report) and not report.reasons and "0-15" in report.notes[-1]


def test_without_contact_the_size_is_not_observable():
    h, wrist = hand_track()
    sfm, _ = found(h, wrist, [3], far=0.2)
    report = Progress()
    placed = place_object(clip(beside=False), sfm, SCALE, {"right": h}, report)
    assert placed.reason[3] == rungs.NOT_FOUND and not len(placed.contacts["right"])
    assert not scale_is_known({"right": h}, placed, report) and "not observable" in report.reasons[0]


def test_an_uncertain_scale_is_said_to_be():
    h, wrist = hand_track()
    sfm, _ = found(h, wrist, [])
    h.scale_std, report = 0.4, Progress()
    placed = place_object(clip(), sfm, SCALE, {"right": h}, report)
    assert not scale_is_known({"right": h}, placed, report) and "40 %" in report.reasons[0]


def test_a_clip_without_structure_from_motion_takes_the_hands_frame():
    h, wrist = hand_track()
    report = Progress()
    placed = place_object(clip(), nothing(COUNT, "plain", ()), 1.0, {"right": h}, report)
    assert placed.carried_by == "right" and (placed.reason == rungs.FIDUCIAL).all()
    assert np.allclose(placed.cam_from_object, wrist) and "rests on the hand" in report.reasons[0]
    lost = place_object(clip(beside=False), nothing(COUNT, "plain", ()), 1.0, {"right": h}, report)
    assert np.isnan(lost.cam_from_object).all() and (lost.reason == rungs.NOT_FOUND).all() and lost.carried_by == ""
    assert "no hand that holds it" in report.reasons[-1]
