"""Where frames of the video are missing, look-alike places can be matched over the gap.

The object then seems to halt, every link over the gap agrees with every other, and all that follows is turned by what
is missing. Turning does not stop for a gap: a model that turns otherwise over one than before and after it is cut
there.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from ._sfm_bundle import Tracks, is_registered

GAP = 1.5  # of the usual time between frames
LEAST = np.radians(12.0)  # of difference
PART = 0.5  # of the expected turn, likewise


def false_bridges(poses: np.ndarray, times: np.ndarray) -> list[int]:
    """Last frames before gaps in time over which the model (F,4,4), NaN where unknown, turns otherwise than about
    them."""
    step = np.diff(times)
    here, out = is_registered(poses), []
    for a in np.flatnonzero(step > GAP * np.median(step)) if len(step) else ():
        if a < 2 or a + 3 >= len(times) or not here[a - 2 : a + 4].all():
            continue
        before, after, over = (_turn(poses, i, j) for i, j in ((a - 2, a), (a + 1, a + 3), (a, a + 1)))
        rate = 0.5 * (before / (times[a] - times[a - 2]) + after / (times[a + 3] - times[a + 1]))
        expected = rate * step[a]
        apart = (Rotation.from_rotvec(expected) * Rotation.from_rotvec(over).inv()).magnitude()
        if apart > max(LEAST, PART * np.linalg.norm(expected)):
            out.append(int(a))
    return out


def cut_models(models: np.ndarray, at: list[int]) -> np.ndarray:
    """Models (M,F,4,4) as pieces that do not go on over the gaps after the frames `at`."""
    edges = [0, *(a + 1 for a in sorted(at)), models.shape[1]]
    pieces = []
    for m in models:
        for a, b in zip(edges, edges[1:], strict=False):
            piece = np.full_like(m, np.nan)
            piece[a:b] = m[a:b]
            if is_registered(piece).sum() > 1:
                pieces.append(piece)
    return np.stack(pieces) if pieces else models[:0]


def cut_tracks(t: Tracks, at: list[int]) -> Tracks:
    """Tracks that end at the gaps after the frames `at`."""
    part = np.searchsorted(sorted(at), t.frame, side="left")  # how many gaps lie before the frame
    return replace(t, track=np.unique(t.track * (len(at) + 1) + part, return_inverse=True)[1])


def _turn(poses: np.ndarray, a: int, b: int) -> np.ndarray:
    """(3,) rotation vector of the object from frame a to b, camera frame."""
    return Rotation.from_matrix(poses[b, :3, :3] @ poses[a, :3, :3].T).as_rotvec()
