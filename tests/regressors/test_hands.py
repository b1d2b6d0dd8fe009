"""The regressor over a clip: where it looks, how looks merge, what is not believed. The network is played by truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from handhold.errors import MissingAsset
from handhold.geometry import rigid
from handhold.hand import HandModel
from handhold.regressors import hands
from handhold.regressors.crops import HandPrediction, project
from handhold.scene import Landmarks

K = np.array([[400.0, 0, 160], [0, 400, 120], [0, 0, 1]])
COUNT = 6


def motion(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotations (F,16,3,3) and joints (F,21,3) of a hand that turns slowly half a metre away."""
    hand = HandModel.open(side)
    w = torch.zeros(COUNT, 16, 3)
    w[:, 0] = torch.tensor([1.2, 0.3, 0.0]) + 0.08 * torch.arange(COUNT)[:, None] * torch.tensor([0.0, 1.0, 0.5])
    w[:, 1:, 2] = -0.2
    rot = rigid.so3_exp(w)
    return rot, hand.with_shape().joints(rot, torch.tensor([0.02, 0.0, 0.55]))


class Oracle(torch.nn.Module):
    """Knows the hand of each picture (its number is its grey value) and errs as it is told, look by look."""

    image_size = (64, 64)

    def __init__(self, side: str, errors=(0.0, 0.0, 0.0, 0.0)):
        super().__init__()
        self.dummy, self.side, self.errors, self.calls = torch.nn.Parameter(torch.zeros(1)), side, errors, 0
        self.boxes, self.flipped = [], []

    def predict(self, crops) -> HandPrediction:
        rot, joints = motion(self.side)
        k = crops.image[:, 0, 30:34, 30:34].mean((1, 2)).mul(255 / 20).round().long() - 1
        self.flipped.append(crops.flipped)
        off = self.errors[self.calls % len(self.errors)]
        self.calls += 1
        joints = joints[k] + off * torch.linspace(-1, 1, 21)[:, None]
        seen = project(joints, torch.as_tensor(K, dtype=torch.float32).expand(len(k), 3, 3))
        n = len(k)
        return HandPrediction(
            crops.flipped, crops.picture, rot[k], torch.zeros(n, 10), torch.zeros(n, 3), joints,
            torch.zeros(n, 1609, 3), seen, torch.ones(n, 21), torch.full((n, 21), 0.8),
        )  # fmt: skip


def clip() -> np.ndarray:
    return np.tile(20 * np.arange(1, COUNT + 1, dtype=np.uint8)[:, None, None, None], (1, 240, 320, 3))


def boxes_of(side: str) -> np.ndarray:
    p = project(motion(side)[1], torch.as_tensor(K, dtype=torch.float32).expand(COUNT, 3, 3)).numpy()
    return np.concatenate([p.min(1), p.max(1)], 1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_the_network_knows_arrives(side):
    where = boxes_of(side)
    where[2] = np.nan
    net = Oracle(side)
    told = []
    e = hands.regress_clip(net, clip(), K, {side: where}, lambda s, t: told.append((s, t)), batch=4)[side]
    rot, joints = motion(side)
    found = np.arange(COUNT) != 2
    assert np.isnan(e.pose[2]).all() and np.isnan(e.points[2]).all() and not e.confidence[2].any()
    assert np.allclose(e.joints[found], joints[found], atol=1e-5)
    hand = HandModel.open(side)
    assert np.allclose(hand.rotations(torch.as_tensor(e.pose[found])), rot[found], atol=1e-4)
    assert np.allclose(e.confidence[found], 0.8, atol=1e-4)
    assert all(bool((f == (side == "left")).all()) for f in net.flipped)  # left hands are mirrored, never right ones
    assert told[-1] == (1.0, f"{side} hand")


def test_looks_that_disagree_are_trusted_less_where_they_do():
    agree = hands.regress_clip(Oracle("right"), clip(), K, {"right": boxes_of("right")})["right"]
    net = Oracle("right", (0.0, 0.0, 0.01, -0.01))
    differ = hands.regress_clip(net, clip(), K, {"right": boxes_of("right")})["right"]
    assert np.allclose(differ.joints, agree.joints, atol=1e-4)
    lost = agree.confidence - differ.confidence
    assert (lost[:, [0, 20]] > 0.05).all() and (abs(lost[:, 10]) < 0.01).all()  # the errors grow away from joint 10


def test_a_frame_that_no_neighbour_resembles_is_an_outlier():
    _, joints = motion("right")
    e = hands.regress_clip(Oracle("right"), clip(), K, {"right": boxes_of("right")})["right"]
    assert not hands.outliers(e).any()
    moved, turned = e.points.copy(), e.joints.copy()
    moved[3] += 150
    assert hands.outliers(replace(e, points=moved)).tolist() == [i == 3 for i in range(COUNT)]
    turned[3] = turned[3] * [1, -1, -1]
    assert hands.outliers(replace(e, joints=turned)).tolist() == [i == 3 for i in range(COUNT)]


def test_boxes_come_from_the_surest_source():
    n, points = 8, np.zeros((8, 21, 2), np.float32)
    points[:] = np.random.default_rng(0).uniform(40, 80, (21, 2))
    marks = Landmarks(points, np.full((n, 21, 3), np.nan), np.array([0.9, 0.1, 0.1, 0, 0, 0, 0, 0.9], np.float32))
    marks.points[3:7] = np.nan
    mask = np.zeros((n, 120, 160), bool)
    mask[1, 20:60, 30:90] = True  # a hand, and a speck beside it
    mask[1, 100:103, 100:103] = True
    b = hands.hand_boxes(marks, mask, n)
    own = [*points[0].min(0), *points[0].max(0)]
    assert np.allclose(b[0], own)  # sure landmarks
    assert np.allclose(b[1], [30, 20, 90, 60])  # the mask rather than unsure ones
    assert np.allclose(b[2], own)  # unsure ones rather than nothing
    assert np.allclose(b[3:7], own)  # filled in between
    assert np.isnan(hands.hand_boxes(None, None, n)).all()
    late = replace(marks, confidence=np.eye(n, dtype=np.float32)[2])
    assert np.isfinite(hands.hand_boxes(late, None, n)).all(1).tolist() == [i == 2 for i in range(n)]


def test_networks_that_are_off_or_missing(tmp_path):
    assert hands.open_network("off", hands.REGRESSOR) is None
    assert hands.open_network("auto", "no_such_network.safetensors") is None
    with pytest.raises(MissingAsset, match="does not exist"):
        hands.open_network(tmp_path / "none.safetensors", hands.REGRESSOR)
