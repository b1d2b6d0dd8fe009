"""The bootstrap from outlines: it is gated, and leaves poses alone where outlines do not agree better."""

from __future__ import annotations

import numpy as np
import pytest

from handhold.tracking.bootstrap import bootstrap, held_out_iou
from handhold.tracking.object import Observations
from solids import K, around, box_depth

HALF = np.array([0.03, 0.042, 0.022])

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_box(poses: np.ndarray) -> Observations:
    depth = np.stack([box_depth(p, HALF) for p in poses])
    frames = np.where(np.isfinite(depth)[..., None], np.uint8(130), np.uint8(30)).repeat(3, -1)
    return Observations(frames, np.isfinite(depth), np.zeros(depth.shape, bool), K)


def test_too_few_frames_are_left_as_they_are():
    poses = around(5, 0.25)
    found = bootstrap(plain_box(poses), poses, np.ones(5))
    assert found.cam_from_object is poses and found.steps == () == found.iou


@pytest.mark.slow
def test_places_that_are_off_are_mended_by_outlines():
    true = around(16, 0.25)
    obs = plain_box(true)
    given = true.copy()
    given[:, :3, 3] += np.random.default_rng(0).normal(0, [0.012, 0.012, 0.02], (16, 3))
    found = bootstrap(obs, given, np.full(16, 0.6))
    usable = np.ones(16, bool)
    assert found.steps and held_out_iou(obs, found.cam_from_object, usable, np.ones(16)) > found.iou[0] + 0.05
    image = lambda p: (p[:, :3, 3] @ K.T)[:, :2] / p[:, 2:3, 3]  # noqa: E731
    before, after = (np.median(np.linalg.norm(image(p) - image(true), axis=1)) for p in (given, found.cam_from_object))
    assert after < 0.6 * before
