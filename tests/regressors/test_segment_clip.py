"""Masks that travel with the flow, and hands that keep their side, on a drawn clip with a network that only looks at
colours."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from handhold.datasets.synthetic.sample import LEFT, OBJECT, RIGHT
from handhold.regressors.segment_clip import confidence, dense_flows, pulled, segment_clip, settle_sides
from handhold.regressors.segmenter import Segmenter, SegmenterConfig

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, HEIGHT, WIDTH, STEP = 6, 144, 192, 4
SKIN, THING = (214, 160, 132), (40, 90, 190)


def texture(height: int, width: int, color, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fine = cv2.resize(rng.uniform(-35, 35, (height // 6, width // 6)).astype(np.float32), (width, height))
    return np.clip(np.array(color, np.float32) + fine[..., None], 0, 255).astype(np.uint8)


def clip() -> tuple[np.ndarray, np.ndarray]:
    """Frames and labels of a hand on the left and one on the right, the first with a thing; all moves to the right."""
    back, hand, thing = (texture(h, w, c, i) for i, (h, w, c) in enumerate(
        ((HEIGHT, WIDTH, (110, 120, 115)), (48, 36, SKIN), (36, 36, THING))
    ))  # fmt: skip
    frames = np.repeat(back[None], COUNT, 0)
    labels = np.zeros(frames.shape[:3], int)
    for i in range(COUNT):
        x = STEP * i
        for (r, c), what, label in (((60, 16), hand, RIGHT), ((24, 16), thing, OBJECT), ((72, 116), hand, LEFT)):
            h, w = what.shape[:2]
            frames[i, r : r + h, x + c : x + c + w] = what
            labels[i, r : r + h, x + c : x + c + w] = label
    return frames, labels


class ByColor:
    """Tells skin and thing by colour, and the sides by the half of the picture a hand is in; wrongly in one frame."""

    def __init__(self, wrong: np.ndarray) -> None:
        self.mean, self.wrong, self.given = torch.zeros(1), torch.from_numpy(wrong).permute(2, 0, 1) / 255, []

    def folded(self) -> ByColor:
        return self

    def __call__(self, x, previous):
        self.given.append(previous)
        skin, thing = (
            1 - (x - torch.tensor(c)[:, None, None] / 255).abs().amax(1, keepdim=True) * 3 for c in (SKIN, THING)
        )
        half = (torch.arange(x.shape[-1]) < x.shape[-1] / 2).float() * 2 - 1
        if torch.equal(x[0], self.wrong):
            half = -half
        zero = torch.zeros_like(skin)
        return 9 * torch.cat([zero + 0.3, skin + 0.2 * half, skin - 0.2 * half, thing, zero - 1], 1)


def iou(a, b):
    return float((a & b).sum() / (a | b).sum())


def test_flow_leads_back_and_carries_masks():
    frames, labels = clip()
    flows = dense_flows(frames)
    assert flows.to_next.shape == (COUNT - 1, HEIGHT, WIDTH, 2) and flows.last_sure.mean() > 0.6
    inside = cv2.erode((labels[2] > 0).astype(np.uint8), np.ones((17, 17))) > 0
    assert np.abs(np.median(flows.to_next[2][inside].astype(float), 0) - (STEP, 0)).max() < 0.7
    mask = (labels == OBJECT).astype(np.float32)[..., None]
    there = flows.carried(mask[2], 3, forward=True)[..., 0] > 0.5
    back = flows.carried(mask[3], 2, forward=False)[..., 0] > 0.5
    assert iou(there, labels[3] == OBJECT) > 0.7 and iou(back, labels[2] == OBJECT) > 0.7


def test_pulling_by_whole_pixels_is_indexing():
    x = np.random.default_rng(0).random((5, 7, 2)).astype(np.float32)
    flow = np.zeros((5, 7, 2), np.float16)
    flow[..., 0] = 2
    assert np.array_equal(pulled(x, flow)[:, :5], x[:, 2:]) and (pulled(x, flow)[:, 5:] == 0).all()


def test_both_directions_get_what_was_before_and_the_sides_are_settled():
    frames, labels = clip()
    net = ByColor(wrong=frames[2])
    told: list[float] = []
    raw = segment_clip(net, frames, lambda share, what: told.append(share), mirror=False, settle=False)
    assert raw.shape == (COUNT, 5, HEIGHT, WIDTH) and raw.dtype == np.float16
    assert np.abs(raw.astype(np.float32).sum(1) - 1).max() < 5e-3 and told == sorted(told) and told[-1] == 1
    assert len(net.given) == 2 * COUNT and sum(p is None for p in net.given) == 2
    assert net.given[-1].shape == (1, 5, HEIGHT, WIDTH) and net.given[-1].sum(1).max() < 1.01
    assert iou(raw[2].argmax(0) == RIGHT, labels[2] == LEFT) > 0.3
    settled = raw.copy()
    settle_sides(settled, dense_flows(frames))
    for i in range(COUNT):
        for c in (RIGHT, LEFT, OBJECT):
            assert iou(settled[i].argmax(0) == c, labels[i] == c) > 0.7, (i, c)
    hands = raw[:, RIGHT].astype(np.float32) + raw[:, LEFT]
    assert np.allclose(hands, settled[:, RIGHT].astype(np.float32) + settled[:, LEFT], atol=2e-3)
    sure = confidence(settled)
    assert sure.shape == (COUNT, 5) and (sure[:, OBJECT] > 0.3).all() and (sure[:, 4] == 0).all()


@pytest.mark.parametrize("frames", [1, 2])
def test_a_real_network_on_mirrored_and_large_frames(frames):
    """The mirrored clip gives the mirrored masks with the sides exchanged, and large frames are shrunk."""
    torch.manual_seed(0)
    model = Segmenter(SegmenterConfig((8, 12, 16, 24, 32), (1, 1, 1, 1, 1), (1, 1, 1, 1), heads=2)).eval()
    torch.nn.init.normal_(model.head[1].weight, std=0.5)
    x = clip()[0][:frames]
    p = segment_clip(model, x, side=64, settle=False)
    assert p.shape == (frames, 5, 48, 64)
    q = segment_clip(model, np.ascontiguousarray(x[:, :, ::-1]), side=64, settle=False)
    if frames == 1:  # flow is not exactly mirrored
        assert np.abs(q[..., ::-1][:, [0, 2, 1, 3, 4]].astype(np.float32) - p).max() < 5e-3


def test_what_goes_wrong_on_the_way_is_told():
    class Breaks(ByColor):
        def __call__(self, x, previous):
            if previous is not None:
                raise ValueError("no")
            return super().__call__(x, previous)

    frames = clip()[0]
    with pytest.raises(ValueError, match="no"):
        segment_clip(Breaks(frames[2]), frames, mirror=False)

    def interrupted(share: float, what: str) -> None:
        if what == "segmenting":
            raise KeyboardInterrupt

    net = ByColor(frames[2])
    with pytest.raises(KeyboardInterrupt):
        segment_clip(net, frames, interrupted, mirror=False)
