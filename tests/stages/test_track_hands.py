"""Which frame a hand is fitted in, and the size that two hands tell of one object."""

from types import SimpleNamespace

import numpy as np
import pytest

from handhold.config import Config
from handhold.stages import track_hands
from handhold.stages.track_hands import _common_scale, _distance, fit_hands
from handhold.tracking import grasp


def test_hands_that_disagree_are_averaged_and_told_of_once():
    hands = {"right": SimpleNamespace(scale=1.0, scale_std=0.02), "left": SimpleNamespace(scale=2.0, scale_std=0.02)}
    told = []
    both = [_common_scale(hands, 1.0, r) for r in (None, SimpleNamespace(note=told.append))]
    assert both == [pytest.approx(2**0.5)] * 2
    assert len(told) == 1 and "100 %" in told[0]


def test_a_guess_of_the_size_stands_on_the_points_distance():
    behind = np.tile(np.diag([-1.0, 1, -1, 1]), (4, 1, 1))
    behind[:, 2, 3] = -1.0  # the frame's origin lies behind the camera, its points before it
    sfm = SimpleNamespace(registered=np.ones(4, bool), cam_from_object=behind, points=np.array([[0.0, 0, -3.0]]))
    assert _distance(sfm) == pytest.approx(2.0)
    nobody = {"right": SimpleNamespace(scale=1.0, scale_std=np.inf, confidence=np.ones(4), joints=np.ones((4, 21, 3)))}
    assert _common_scale(nobody, _distance(sfm), None) == pytest.approx(0.5)


def clip(left_beside: bool) -> SimpleNamespace:
    """Five frames of an object with a hand on either side of it."""
    masks = {k: np.zeros((5, 60, 80), bool) for k in ("right", "left", "object")}
    masks["right"][:, :, 40:50] = masks["object"][:, :, 30:40] = True
    masks["left"][:, :, 20 if left_beside else 0 : 30 if left_beside else 10] = True
    marks = SimpleNamespace(source="user")
    return SimpleNamespace(masks=masks, landmarks=dict.fromkeys(("right", "left"), marks), regressed={}, K=np.eye(3))


def fitted(confidence: float, scale: float = 1.0, std: float = 0.02) -> SimpleNamespace:
    return SimpleNamespace(confidence=np.full(5, confidence), scale=scale, scale_std=std, joints=np.ones((5, 21, 3)))


@pytest.fixture
def placed(monkeypatch):
    """`fit_hands` with hands fitted in the object's frame at a confidence of 0.5."""
    monkeypatch.setattr(track_hands, "sides_of", lambda sequence, report: ["right", "left"])
    monkeypatch.setattr(grasp, "fit_grasp", lambda *_, **__: fitted(0.5, scale=3.0))
    sfm = SimpleNamespace(
        registered=np.ones(5, bool),
        cam_from_object=np.tile(np.eye(4), (5, 1, 1)),
        confidence=None,
        points=np.zeros((0, 3)),
    )
    return lambda sequence, alone: fit_hands(sequence, sfm, Config(), None, alone=alone)


def test_a_hand_stays_alone_where_the_object_explains_it_no_better(placed):
    alone = {"right": fitted(0.4, std=np.inf), "left": fitted(0.6, std=np.inf)}
    hands, scale = placed(clip(left_beside=True), alone)
    assert hands["left"] is alone["left"] and hands["right"] is not alone["right"]
    assert scale == pytest.approx(3.0)  # the other hand tells it


def test_a_hand_that_is_never_beside_the_object_is_fitted_alone(placed):
    alone = {"right": fitted(0.4, std=np.inf), "left": fitted(0.1, std=np.inf)}
    hands, _ = placed(clip(left_beside=False), alone)
    assert hands["left"] is alone["left"] and hands["right"].confidence.mean() == 0.5
    hands, _ = placed(clip(left_beside=True), alone)
    assert hands["left"].confidence.mean() == 0.5
