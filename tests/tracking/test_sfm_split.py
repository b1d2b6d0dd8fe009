"""Where a model of structure from motion is cut."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from handhold.tracking._sfm_bundle import Tracks, is_registered
from handhold.tracking._sfm_refine import split

FRAMES, FOCAL = 12, 600.0


def poses_of(turned: np.ndarray) -> np.ndarray:
    out = np.tile(np.eye(4), (FRAMES, 1, 1))
    out[:, :3, :3] = Rotation.from_euler("y", turned[:, None], degrees=True).as_matrix()
    out[:, 2, 3] = 0.6
    return out


def seen(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    c = points @ pose[:3, :3].T + pose[:3, 3]
    return c[:, :2] / c[:, 2:]


def test_look_alikes_of_one_pair_do_not_bridge_what_neighbours_contradict():
    rng = np.random.default_rng(0)
    true = poses_of(8.0 * np.arange(FRAMES))
    wrong = true.copy()  # from the middle on, the thing is taken for its other side
    wrong[6:, :3, :3] = true[6:, :3, :3] @ Rotation.from_rotvec([1.4, 0.3, -1.5]).as_matrix()
    frame, track, x = [], [], []
    for a, b, poses, count in [*((f, f + 1, true, 60) for f in range(FRAMES - 1)), (4, 6, wrong, 25)]:
        points = rng.uniform(-0.08, 0.08, (count, 3))
        first = max(track[-1]) + 1 if track else 0
        for f in (a, b):
            frame.append(np.full(count, f))
            track.append(first + np.arange(count))
            x.append(seen(points, poses[f]))
    t = Tracks(
        np.concatenate(frame), np.concatenate(track), np.concatenate(x), FOCAL, FRAMES,
        np.zeros(0, np.int64), np.zeros((0, 128), np.float32),
    )  # fmt: skip
    pieces = [np.flatnonzero(is_registered(p)).tolist() for p in split(wrong, t, {})]
    assert pieces == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    joined = [np.flatnonzero(is_registered(p)).tolist() for p in split(wrong, t, {}, broken=0.0)]
    assert joined == [list(range(FRAMES))]  # which the pair alone would have held together
