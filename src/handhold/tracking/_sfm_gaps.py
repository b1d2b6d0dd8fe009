"""Where frames of the video are missing, look-alike places can be matched over the gap.

The object then seems to halt, every link over the gap agrees with every other, and all that follows is turned by what
is missing. Turning does not stop for a gap: a model that turns otherwise over one than before and after it is turned on
by as much, and its tracks end there. Loops that close over the gap confirm it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from ._sfm_bundle import Tracks, is_registered

GAP = 1.5  # of the usual time between frames
LEAST = np.radians(12.0)  # of difference
PART = 0.5  # of the expected turn, likewise


def false_bridges(poses: np.ndarray, times: np.ndarray) -> dict[int, np.ndarray]:
    """Gaps in time over which the model (F,4,4), NaN where unknown, turns otherwise than about them: the last frame
    before it -> the (3,3) turn over it, camera frame, that would go on evenly."""
    step = np.diff(times)
    here, out = is_registered(poses), {}
    for a in np.flatnonzero(step > GAP * np.median(step)) if len(step) else ():
        if a < 2 or a + 3 >= len(times) or not here[a - 2 : a + 4].all():
            continue
        before, after, over = (_turn(poses, i, j) for i, j in ((a - 2, a), (a + 1, a + 3), (a, a + 1)))
        rate = 0.5 * (before / (times[a] - times[a - 2]) + after / (times[a + 3] - times[a + 1]))
        expected = Rotation.from_rotvec(rate * step[a])
        apart = (expected * Rotation.from_rotvec(over).inv()).magnitude()
        if apart > max(LEAST, PART * expected.magnitude()):
            out[int(a)] = expected.as_matrix()
    return out


def turn_on(poses: np.ndarray, bridges: dict[int, np.ndarray], middle: np.ndarray) -> np.ndarray:
    """The model (F,4,4) with the object turned about its `middle` (3,) from each gap on, so that it turns evenly."""
    out = poses.copy()
    for a, turn in bridges.items():
        if not is_registered(out)[[a, a + 1]].all():
            continue
        S = np.eye(4)
        S[:3, :3] = out[a + 1, :3, :3].T @ turn @ out[a, :3, :3]
        S[:3, 3] = middle - S[:3, :3] @ middle
        out[a + 1 :] = out[a + 1 :] @ S
    return out


def confirmed(t: Tracks, fits: np.ndarray, a: int, least: int = 8) -> bool:
    """Whether points that fit, `fits` (N,) bool of the observations, are seen on both sides of the gap after frame
    `a`."""
    before, after = t.track[fits & (t.frame <= a)], t.track[fits & (t.frame > a)]
    return len(np.intersect1d(before, after)) >= least


def cut_tracks(t: Tracks, at: list[int]) -> Tracks:
    """Tracks that end at the gaps after the frames `at`."""
    part = np.searchsorted(sorted(at), t.frame, side="left")  # how many gaps lie before the frame
    return replace(t, track=np.unique(t.track * (len(at) + 1) + part, return_inverse=True)[1])


def _turn(poses: np.ndarray, a: int, b: int) -> np.ndarray:
    """(3,) rotation vector of the object from frame a to b, camera frame."""
    return Rotation.from_matrix(poses[b, :3, :3] @ poses[a, :3, :3].T).as_rotvec()
