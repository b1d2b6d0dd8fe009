"""Scoring of held-out pictures by true masks: only truly visible pixels of the bodies count."""

import numpy as np
import pytest
import torch

from handhold.methods.crops import View
from handhold.methods.held_out import HeldOut, score
from handhold.scene import Sequence

SIZE = (40, 30)
K = np.array([[50.0, 0, 20], [0, 50.0, 15], [0, 0, 1]])
CROP = np.array([[25.0, 0, 5], [0, 25.0, 5], [0, 0, 1]])  # columns 10-34, rows 5-29 at half the size


def held(drawn: torch.Tensor, share: torch.Tensor) -> dict[str, np.ndarray]:
    """`held_out.npz` of one frame, the sixth of its video, that shows grey."""
    sequence = Sequence(np.zeros((1, SIZE[1], SIZE[0], 3), np.uint8), np.array([5]), 10.0, K, "given")
    none = torch.zeros(12, 12)
    view = View(
        0, torch.full((12, 12, 3), 0.5), none[..., None], none, none, none, torch.from_numpy(CROP), 1.0, True, True
    )
    out = HeldOut(sequence, ["right"])
    out.add(view, drawn, share)
    return out.arrays()


@pytest.fixture
def masks():
    m = np.zeros((6, SIZE[1], SIZE[0]), np.uint8)
    m[5, 9:17, 14:22] = 3  # the object, pixels 2-5 of the crop both ways
    m[5, 17:21, 14:22] = 1
    return m


def test_only_true_pixels_of_the_bodies_count(masks):
    drawn, share = torch.full((12, 12, 3), 0.5), torch.zeros(12, 12, 2)
    drawn[:2], drawn[8:], drawn[:, :2], drawn[:, 6:] = 0, 0, 0, 0  # wrong wherever there is no body
    share[2:6, 2:6, 0] = 1
    exact = score(held(drawn, share), masks)
    assert exact["psnr"] > 100 and exact["mask_iou"] == 1 and exact["ssim"] > 0.99
    drawn[2:6, 2:6] += 0.1
    figures = score(held(drawn, share), masks)
    assert figures["psnr_object"] == pytest.approx(20, abs=0.3) and figures["psnr_hands"] > 100
    assert figures["psnr"] == pytest.approx(20 + 10 * np.log10(24 / 16), abs=0.3)
    share[2:6, 2:4, 0] = 0
    assert score(held(drawn, share), masks)["mask_iou"] == 0.5


def test_pictures_of_another_clip_are_refused(masks):
    with pytest.raises((IndexError, ValueError)):
        score(held(torch.zeros(12, 12, 3), torch.zeros(12, 12, 2)), masks[:3])
    assert np.isnan(score(held(torch.zeros(12, 12, 3), torch.zeros(12, 12, 2)), masks * 0)["psnr"])
