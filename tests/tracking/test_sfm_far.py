"""Loops closed by dense flow between frames far apart: points are found where they are, or not at all."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from handhold.tracking._sfm_bundle import Tracks
from handhold.tracking._sfm_far import APART, close_by_flow, far_pairs

K = np.array([[240.0, 0, 120.5], [0, 240.0, 90.5], [0, 0, 1]])
FRAMES = 12


def pose(degrees: float) -> np.ndarray:
    out = np.eye(4)
    out[:3, :3] = Rotation.from_rotvec(np.radians(degrees) * np.array([0.5, 0.8, 0.33])).as_matrix()
    out[:3, 3] = [0.01, -0.01, 0.5]
    return out


def picture(cam_from_plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A printed card of 24 x 20 cm, grey (180,240), and its mask."""
    print_ = cv2.GaussianBlur(np.random.default_rng(3).integers(0, 255, (200, 240)).astype(np.float32), (0, 0), 2.5)
    print_ = cv2.normalize(print_, None, 0, 255, cv2.NORM_MINMAX)
    metres = np.array([[0.001, 0, -0.12], [0, 0.001, -0.1], [0, 0, 1]])
    H = K @ cam_from_plane[:3, [0, 1, 3]] @ metres
    grey = cv2.warpPerspective(print_, H, (240, 180), flags=cv2.INTER_LINEAR)
    mask = cv2.warpPerspective(np.ones_like(print_, np.uint8), H, (240, 180), flags=cv2.INTER_NEAREST)
    return grey.astype(np.uint8), mask > 0


@pytest.fixture
def clip():
    """Frames 0 and 10 see the card from 8 degrees apart; the rest is unknown. Points were followed in frame 0."""
    true = np.full((FRAMES, 4, 4), np.nan)
    true[0], true[10] = pose(0), pose(8)
    grey, masks = np.zeros((FRAMES, 180, 240), np.uint8), np.zeros((FRAMES, 180, 240), bool)
    for f in (0, 10):
        grey[f], masks[f] = picture(true[f])
    X = np.stack([*np.meshgrid(np.linspace(-0.09, 0.09, 12), np.linspace(-0.07, 0.07, 10)), np.zeros((10, 12))], -1)
    X = X.reshape(-1, 3)
    n = len(X)
    none = np.zeros(0, np.int64), np.zeros((0, 128), np.float32)
    return true, grey, masks, X, Tracks(np.zeros(n, int), np.arange(n), seen(X, true[0]), K[0, 0], FRAMES, *none)


def seen(X: np.ndarray, cam_from_plane: np.ndarray) -> np.ndarray:
    c = X @ cam_from_plane[:3, :3].T + cam_from_plane[:3, 3]
    return c[:, :2] / c[:, 2:]


def test_points_are_found_though_the_poses_are_off(clip):
    true, grey, masks, X, t = clip
    off = true.copy()
    off[10] = pose(12)
    more, count = close_by_flow(grey, masks, K, off, X, t)
    new = more.frame == 10
    assert count == new.sum() > 0.6 * len(X) and (more.frame == 0).sum() == len(X)
    error = np.linalg.norm(more.x[new] - seen(X[more.track[new]], true[10]), axis=1) * K[0, 0]
    assert np.median(error) < 0.3 and error.max() < 2.5
    assert close_by_flow(grey, masks, K, off, X, more)[1] == 0  # each is found once


def test_another_print_gives_nothing(clip):
    true, grey, masks, X, t = clip
    other = grey.copy()
    other[10] = other[10][::-1, ::-1]
    assert close_by_flow(other, masks, K, true, X, t)[1] == 0
    assert close_by_flow(grey, masks, K, true, np.full_like(X, np.nan), t) == (t, 0)


def test_only_frames_far_in_time_and_near_in_view_are_paired():
    poses = np.stack([pose(9.0 * f) for f in range(20)])  # never back
    assert far_pairs(poses, np.zeros(3)) == []
    poses[13:] = poses[:7]
    pairs = far_pairs(poses, np.zeros(3))
    assert {(0, 13), (13, 0), (6, 19)} <= set(pairs) and all(abs(i - j) >= APART for i, j in pairs)
