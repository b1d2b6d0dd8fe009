"""Backgrounds: range, seeds, variety, and the user's own pictures."""

import cv2
import numpy as np
import pytest
import torch

from handhold.datasets.synthetic.backgrounds import Backgrounds, read_images
from handhold.errors import UnusableInput

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"n_rooms": 6, "size": 64}


def seeded(k):
    return torch.Generator().manual_seed(k)


def test_pictures_are_positive_linear_and_vary():
    x = Backgrounds(**SMALL).sample(8, 48, 64, seeded(0))
    assert x.shape == (8, 3, 48, 64) and torch.isfinite(x).all() and x.min() >= 0
    assert 0.02 < x.mean() < 0.8 and x.mean((1, 2, 3)).std() > 0.01
    assert torch.equal(x, Backgrounds(**SMALL).sample(8, 48, 64, seeded(0)))
    assert not torch.equal(x, Backgrounds(**SMALL).sample(8, 48, 64, seeded(1)))
    assert not torch.equal(x, Backgrounds(**SMALL, seed=9).sample(8, 48, 64, seeded(0)))


def test_user_pictures_are_used():
    green = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    green[:, 1] = 200
    x = Backgrounds(green, **SMALL, user_share=1.0).sample(6, 32, 32, seeded(0))
    assert (x[:, 1] > 1.5 * x[:, 0]).float().mean() > 0.95
    none = Backgrounds(green, **SMALL, user_share=0.0).sample(6, 32, 32, seeded(0))
    assert torch.equal(none, Backgrounds(**SMALL).sample(6, 32, 32, seeded(0)))


def test_reads_a_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for k, size in enumerate([(30, 50), (64, 20)]):
        img = np.full((*size, 3), (255, 0, 0), np.uint8)  # blue, as OpenCV has it
        cv2.imwrite(str(tmp_path / "sub" / f"{k}.png"), img)
    (tmp_path / "note.jpg").write_text("not a picture")
    x = read_images(tmp_path, size=16)
    assert x.shape == (2, 3, 16, 16) and (x[:, 2] == 255).all() and (x[:, :2] == 0).all()
    with pytest.raises(UnusableInput, match="no picture"):
        read_images(tmp_path / "nowhere")
