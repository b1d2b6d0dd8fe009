"""Frames missing from the video: a model in which the object halts there is turned on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from handhold.tracking._sfm_bundle import Tracks
from handhold.tracking._sfm_gaps import confirmed, cut_tracks, false_bridges, turn_on

TIMES = np.array([0, 1, 2, 3, 6, 7, 8, 9, 11, 12, 13])  # two frames missing after the fourth, one after the eighth


def turning(degrees_per_frame: float, halts: bool) -> np.ndarray:
    """(F,4,4) an object that turns evenly, or does so but for the time of the missing frames after the fourth."""
    t = TIMES - 2.9 * (TIMES > 3) * halts
    poses = np.tile(np.eye(4), (len(t), 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(np.radians(degrees_per_frame) * t[:, None] * [0.6, 0.8, 0]).as_matrix()
    return poses


@pytest.mark.parametrize("degrees", [0.0, 3.0, 9.0])
def test_even_turning_is_believed(degrees):
    assert false_bridges(turning(degrees, False), TIMES) == {}


def test_a_halt_over_missing_frames_is_not_believed():
    assert list(false_bridges(turning(9.0, True), TIMES)) == [3]
    assert false_bridges(turning(9.0, True), np.arange(11)) == {}  # nothing is missing
    assert false_bridges(turning(2.0, True), TIMES) == {}  # too little turning to tell


def test_the_model_turns_on_evenly_about_its_middle():
    halting, middle = turning(9.0, True), np.array([0.1, -0.2, 1.0])
    mended = turn_on(halting, false_bridges(halting, TIMES), middle)
    assert np.allclose(mended[:, :3, :3], turning(9.0, False)[:, :3, :3], atol=1e-6)
    assert np.allclose(mended @ [*middle, 1], halting @ [*middle, 1])


def test_tracks_end_at_the_gap_and_what_spans_it_confirms_it():
    frame, track = np.repeat(np.arange(11), 2), np.tile([0, 1], 11)
    t = Tracks(frame, track, np.zeros((22, 2)), 500.0, 11, np.zeros(0, int), np.zeros((0, 128)))
    cut = cut_tracks(t, [3])
    assert len(cut.common(3, 4)[0]) == 0 and len(cut.common(0, 3)[0]) == 2 and len(cut.common(4, 10)[0]) == 2
    assert np.array_equal(cut_tracks(t, []).track, track)
    every = np.ones(22, bool)
    assert confirmed(t, every, 3, least=2) and not confirmed(cut, every, 3, least=1)
