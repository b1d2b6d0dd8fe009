"""Cameras: projection laws, intrinsics under resizing and turning, and the text format."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.errors import UnusableInput
from handhold.geometry import cameras as c

K = c.make_K(500, 510, 330, 235)


@pytest.fixture
def points():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.uniform(-0.3, 0.3, (50, 2)), rng.uniform(0.5, 2, (50, 1))], 1)


def test_unproject_inverts_project_in_numpy_and_torch(points):
    pixels = c.project(points, K)
    assert np.allclose(c.unproject(pixels, points[:, 2], K), points)
    t, k = torch.as_tensor(points), torch.as_tensor(K)
    assert np.allclose(c.project(t, k).numpy(), pixels)
    assert torch.allclose(c.unproject(c.project(t, k), t[:, 2], k), t)


def test_projection_agrees_with_opencv_after_its_half_pixel(points):
    import cv2

    theirs = cv2.projectPoints(points, np.zeros(3), np.zeros(3), c.opencv_K(K), None)[0][:, 0]
    assert np.allclose(theirs + 0.5, c.project(points, K))


def test_scaling_the_frame_scales_pixels(points):
    assert np.allclose(c.project(points, c.scale_K(K, 0.5, 0.25)), c.project(points, K) * [0.5, 0.25])


@pytest.mark.parametrize(
    "turn", [[[0, -1], [1, 0]], [[0, 1], [-1, 0]], [[-1, 0], [0, -1]], [[-1, 0], [0, 1]], [[0, 1], [1, 0]]]
)
def test_turning_the_frame_turns_points_and_pixels_alike(points, turn):
    w, h = 640, 480
    turn = np.array(turn)
    size = np.abs(turn) @ [w, h]
    turned_points = np.concatenate([points[:, :2] @ turn.T, points[:, 2:]], 1)
    pixels = c.project(turned_points, c.orient_K(K, turn, w, h))
    expected = (c.project(points, K) - np.array([w, h]) / 2) @ turn.T + size / 2
    assert np.allclose(pixels, expected)
    # and the image moves the same way: mark one pixel and find it again
    image = np.zeros((h, w), np.uint8)
    x, y = 100, 37
    image[y, x] = 1
    moved = c.orient_frame(image, turn)
    found = np.argwhere(moved)[0][::-1] + 0.5
    assert moved.shape == (size[1], size[0])
    assert np.allclose(found, (np.array([x, y]) + 0.5 - np.array([w, h]) / 2) @ turn.T + size / 2)


def test_pixel_centres_are_at_half():
    p = c.pixel_centres(4, 3)
    assert p.shape == (3, 4, 2) and p[0, 0].tolist() == [0.5, 0.5] and p[2, 3].tolist() == [3.5, 2.5]


def test_transform_is_rigid_and_batched(points):
    a_from_b = np.tile(np.eye(4), (3, 1, 1))
    a_from_b[:, :3, 3] = np.arange(9).reshape(3, 3)
    a_from_b[1, :3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    moved = c.transform(a_from_b, points)
    assert moved.shape == (3, 50, 3)
    assert np.allclose(moved[1], points @ a_from_b[1, :3, :3].T + [3, 4, 5])


@pytest.mark.parametrize(
    "text",
    [
        "500 510 330 235",
        "500,510,330,235\n",
        "# a camera\n500 0 330\n0 510 235\n0 0 1",
        "[[500, 0, 330], [0, 510, 235], [0, 0, 1]]",
    ],
)
def test_intrinsics_text(tmp_path, text):
    (tmp_path / "K.txt").write_text(text)
    assert np.array_equal(c.read_K(tmp_path / "K.txt"), K)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "0 numbers"),
        ("500 500", "2 numbers"),
        ("500 nan 1 2", "not the intrinsics"),
        ("-5 500 1 2", "not the intrinsics"),
        ("five 5 5 5", "not a number"),
        ("500 9 330 0 510 235 0 0 1", "skew"),
        ("500 0 330 0 510 235 0 0 2", "not the intrinsics"),
    ],
)
def test_bad_intrinsics_text(tmp_path, text, words):
    (tmp_path / "K.txt").write_text(text)
    with pytest.raises(UnusableInput, match=words):
        c.read_K(tmp_path / "K.txt")


def test_missing_or_binary_intrinsics(tmp_path):
    (tmp_path / "K.bin").write_bytes(bytes(range(256)))
    for path in (tmp_path / "none.txt", tmp_path / "K.bin"):
        with pytest.raises(UnusableInput, match="cannot be read"):
            c.read_K(path)


def test_default_and_equivalent_focal_length():
    assert c.default_K(640, 480)[0, 0] == 640
    full_frame = c.K_from_equivalent_focal(36, 3600, 2400)
    assert np.isclose(full_frame[0, 0], 3600, rtol=1e-4)  # 36 mm on a 36 mm wide frame
