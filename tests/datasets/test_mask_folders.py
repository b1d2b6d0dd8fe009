"""Mask folders: round trip, numbering, and refusals."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from handhold.datasets.masks import read_masks, write_masks, write_png
from handhold.errors import UnusableInput


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    return {name: rng.random((5, 24, 32)) > 0.5 for name in ("right", "object")}


def test_round_trip_by_source_index(tmp_path, masks):
    indices = np.array([0, 2, 4, 6, 8])
    write_masks(tmp_path, masks, indices)
    again, confidence = read_masks(tmp_path, indices, (32, 24))
    assert set(again) == set(masks)
    assert all((again[k] == masks[k]).all() and (confidence[k] == 1).all() for k in masks)


def test_frames_without_a_file_have_no_confidence(tmp_path, masks):
    write_masks(tmp_path, masks, np.arange(5))
    again, confidence = read_masks(tmp_path, np.array([3, 4, 5]), (32, 24))
    assert confidence["right"].tolist() == [1, 1, 0]
    assert (again["right"][0] == masks["right"][3]).all() and not again["right"][2].any()


def test_other_names_are_taken_in_order_and_zero_one_masks_are_understood(tmp_path, masks):
    for i, m in enumerate(masks["object"]):
        write_png(tmp_path / "object" / f"mask{i}x.png", m.astype(np.uint8))
    again, _ = read_masks(tmp_path, np.arange(5), (32, 24))
    assert (again["object"] == masks["object"]).all()
    with pytest.raises(UnusableInput, match="5 masks for 4 frames"):
        read_masks(tmp_path, np.arange(4), (32, 24))


def test_masks_of_the_videos_own_size_are_resampled_without_new_labels(tmp_path, masks):
    big = {k: np.kron(m, np.ones((1, 2, 2), bool)) for k, m in masks.items()}
    write_masks(tmp_path, big, np.arange(5))
    again, _ = read_masks(tmp_path, np.arange(5), (32, 24), full_size=(64, 48))
    assert all((again[k] == masks[k]).all() for k in masks)


def test_refusals_are_one_sentence(tmp_path, masks):
    write_masks(tmp_path / "a", masks, np.arange(5))
    (tmp_path / "b" / "object").mkdir(parents=True)
    (tmp_path / "b" / "object" / "000000.png").write_bytes(b"no picture")
    for folder, indices, size, words in (
        (tmp_path / "none", np.arange(5), (32, 24), "has no masks"),
        (tmp_path / "a", np.arange(5), (64, 24), "is 32x24, but the video is 64x24"),
        (tmp_path / "a", np.arange(50, 60), (32, 24), "no mask of a frame in use"),
        (tmp_path / "b", np.arange(5), (32, 24), "not a readable PNG"),
    ):
        with pytest.raises(UnusableInput, match=words) as e:
            read_masks(folder, indices, size)
        assert "\n" not in str(e.value)


def test_png_is_lossless(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    assert (cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1] == image).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
