"""Pinhole cameras and the one place where image conventions are converted.

OpenCV axes: x right, y down, z forward. A pixel is a unit square: the centre of the top-left one is (0.5, 0.5), and
the image spans [0, W] x [0, H]. So resizing by s scales all of K's first two rows by s, without half-pixel terms. `K`
is (3,3): fx 0 cx / 0 fy cy / 0 0 1, in pixels. OpenCV's own functions put pixel centres on integers: see `opencv_K`.

Functions on points take numpy arrays or torch tensors alike; those on K take and return float64 numpy.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnusableInput

FULL_FRAME_DIAGONAL = 43.2666  # mm, of a 36 x 24 frame, to which "35 mm equivalent" focal lengths refer


def make_K(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """(3,3) intrinsics, pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def default_K(width: int, height: int) -> np.ndarray:
    """A guess for an unknown camera: focal length of one longer side (53 degrees across it), principal point
    central.
    """
    f = float(max(width, height))
    return make_K(f, f, width / 2, height / 2)


def K_from_equivalent_focal(mm: float, width: int, height: int) -> np.ndarray:
    """Intrinsics from a 35 mm equivalent focal length, by the diagonal, as CIPA DCG-001 defines it."""
    f = mm / FULL_FRAME_DIAGONAL * float(np.hypot(width, height))
    return make_K(f, f, width / 2, height / 2)


def read_K(path: str | os.PathLike) -> np.ndarray:
    """Read intrinsics from text: `fx fy cx cy`, or nine numbers of a 3x3 matrix, row by row.

    Numbers may be separated by spaces, commas, semicolons, brackets or line breaks; `#` begins a comment.
    Raises `UnusableInput` when they are not usable intrinsics.
    """
    path = Path(path)
    how = "give `fx fy cx cy`, or nine numbers of a 3x3 matrix, in pixels"
    try:
        if path.stat().st_size > 1 << 16:
            raise UnusableInput(f"{path} is too large to be intrinsics; {how}.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UnusableInput(f"The intrinsics {path} cannot be read; {how}.") from e
    text = " ".join(line.split("#")[0] for line in text.splitlines())
    try:
        v = np.array([float(x) for x in text.translate(str.maketrans(",;[]()", "      ")).split()])
    except ValueError as e:
        raise UnusableInput(f"{path} holds something that is not a number; {how}.") from e
    if v.size == 4:
        K = make_K(*v)
    elif v.size == 9:
        K = v.reshape(3, 3)
    else:
        raise UnusableInput(f"{path} holds {v.size} numbers; {how}.")
    ok = np.isfinite(K).all() and K[0, 0] > 0 and K[1, 1] > 0 and (K[2] == [0, 0, 1]).all() and K[1, 0] == 0
    if not ok:
        raise UnusableInput(f"{path} is not the intrinsics of a camera (fx and fy positive, last row 0 0 1); {how}.")
    if abs(K[0, 1]) > 1e-3 * K[0, 0]:
        raise UnusableInput(f"{path} has skew, which handhold does not model; undistort the video or {how}.")
    return make_K(K[0, 0], K[1, 1], K[0, 2], K[1, 2])


def check_K(K: np.ndarray, width: int, height: int, name: str = "K") -> None:
    """Raises `UnusableInput` when K cannot belong to frames of this size."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    side = max(width, height)
    if not (0 <= cx <= width and 0 <= cy <= height):
        raise UnusableInput(
            f"{name} has its principal point ({cx:g}, {cy:g}) outside the {width}x{height} frame; "
            "give the intrinsics of the video at its own size."
        )
    if not (0.2 * side < fx < 20 * side and 0.2 * side < fy < 20 * side and 0.5 < fx / fy < 2):
        raise UnusableInput(
            f"{name} has focal lengths ({fx:g}, {fy:g}) that no camera with {width}x{height} pixels has; "
            "give them in pixels."
        )


def scale_K(K: np.ndarray, sx: float, sy: float | None = None) -> np.ndarray:
    """Intrinsics of frames resized by (sx, sy)."""
    return np.diag([sx, sx if sy is None else sy, 1.0]) @ np.asarray(K, np.float64)


def orient_K(K: np.ndarray, turn: np.ndarray, width: int, height: int) -> np.ndarray:
    """Intrinsics after the frame of (width, height) was turned by `turn`.

    turn: (2,2) of -1, 0, 1: displayed axes from stored axes, x right and y down (see `orient_frame`).
    """
    turn = np.asarray(turn, np.float64)
    fx, fy = np.abs(turn) @ [K[0, 0], K[1, 1]]
    centre = np.array([width, height]) / 2
    cx, cy = turn @ (np.array([K[0, 2], K[1, 2]]) - centre) + np.abs(turn) @ centre
    return make_K(fx, fy, cx, cy)


def orient_frame(frame: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """(H,W,...) turned by (2,2) `turn`, a rotation by a multiple of 90 degrees or a reflection."""
    turn = np.asarray(turn).round().astype(int)
    if turn[0, 0] == 0:  # x and y change places
        frame = frame.swapaxes(0, 1)
        flip_x, flip_y = turn[0, 1] < 0, turn[1, 0] < 0
    else:
        flip_x, flip_y = turn[0, 0] < 0, turn[1, 1] < 0
    if flip_x:
        frame = frame[:, ::-1]
    if flip_y:
        frame = frame[::-1]
    return np.ascontiguousarray(frame)


def opencv_K(K: np.ndarray) -> np.ndarray:
    """The same camera for OpenCV functions, whose pixel centres are integers: half a pixel less."""
    K = np.array(K, np.float64)
    K[:2, 2] -= 0.5
    return K


def project(points: Any, K: Any) -> Any:
    """Camera points to pixels, numpy or torch.

    points: (...,3) metres, camera frame, z > 0; K: (3,3). Returns (...,2) pixels. Not guarded against z <= 0.
    """
    xy = points[..., :2] / points[..., 2:3]
    return xy @ K[:2, :2].T + K[:2, 2]


def unproject(pixels: Any, depth: Any, K: Any) -> Any:
    """Pixels with depth to camera points, numpy or torch.

    pixels: (...,2); depth: (...) metres along z; K: (3,3) without skew. Returns (...,3) metres.
    """
    focal = K[[0, 1], [0, 1]]
    xy = (pixels - K[:2, 2]) / focal * depth[..., None]
    if isinstance(xy, np.ndarray):
        return np.concatenate([xy, np.asarray(depth)[..., None]], -1)
    import torch

    return torch.cat([xy, depth[..., None]], -1)


def pixel_centres(width: int, height: int) -> np.ndarray:
    """(H,W,2) float32, x and y of each pixel's centre."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    return np.stack([x, y], -1)


def transform(a_from_b: Any, points_b: Any) -> Any:
    """Rigidly move points, numpy or torch. a_from_b: (...,4,4); points_b: (...,N,3). Returns (...,N,3) in frame a."""
    rotation, translation = a_from_b[..., :3, :3], a_from_b[..., :3, 3]
    return points_b @ rotation.swapaxes(-1, -2) + translation[..., None, :]
