"""Detections of HaMeR and WiLoR as people save them: a dictionary per hand, with the names their demos use.

The released demos (HaMeR of 2024, WiLoR of 2025) write only meshes and pictures; what is saved beside them are the
demos' variables, and the list that WiLoR-mini's `predict` returns. Read here:

| key (first that is there) | shape | meaning |
|---|---|---|
| `pred_keypoints_3d`, `joints` | (21,3) | metres, OpenPose order |
| `is_right`, `right` | () | 1 right, 0 left |
| `pred_cam_t_full`, `cam_t_full`, `cam_t` | (3,) | added to the joints: the camera of the whole picture |
| `scaled_focal_length` | () | pixels; without it 5000 / 256 of the longer side, as in the demos |
| `img_size` | (2,) | width, height of the picture, where it was another size than the video |
| `pred_keypoints_2d` | (21,2) | only without the camera: pixels, or shares of the crop of `box_center`, `box_size` |
| `score`, `conf`, `det_conf` | () | of the detector |

The principal point is the picture's middle. Crops are made by OpenCV's warpAffine, for which pixel centres are whole
numbers, hence half a pixel is added. Left hands are computed as right ones in a mirrored crop; the demos mirror the
joints back, the network's raw output does not, and the joints themselves tell (`tracks.chirality`).

MANO's angles and betas are not taken over: they turn about MANO's own rest pose and joints, and mean another pose on
the open hand. What is used are the joints, in the picture and relative to the wrist.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UnusableInput
from ._frames import FRAME_KEYS
from ._tree import numbers, shaped
from .tracks import Detection, chirality

LAYOUT = "HaMeR / WiLoR dictionaries (HaMeR 2024, WiLoR 2025, WiLoR-mini)"
SOURCE = "mano"
_JOINTS = ("pred_keypoints_3d", "joints")
_RIGHT = ("is_right", "right")
_CAMERA = ("pred_cam_t_full", "cam_t_full", "cam_t")
_SCORE = ("score", "conf", "det_conf")
_PER_HAND = (*_JOINTS, *_RIGHT, *_CAMERA, *_SCORE, *FRAME_KEYS, "pred_keypoints_2d", "box_center", "box_size")
_FLAT = 0.3  # chirality between this and its negative does not tell


def is_record(value: Any) -> bool:
    """Whether `value` is a hand, or several stacked along a first axis."""
    if not isinstance(value, dict):
        return False
    inner = value.get("wilor_preds")
    return any(k in value for k in _RIGHT) and (
        isinstance(inner, dict) or any(k in value for k in (*_JOINTS, "pred_keypoints_2d"))
    )


def unstacked(record: dict) -> list[dict]:
    """The hands of a record, one dictionary each: a record may hold N of them along the first axis of its arrays."""
    hand = {**record.get("wilor_preds", {}), **{k: v for k, v in record.items() if k != "wilor_preds"}}
    sides = np.asarray(_first(hand, _RIGHT))
    if sides.ndim == 0 or sides.size == 1:
        return [hand]
    n = len(sides)
    out = []
    for i in range(n):
        one = dict(hand)
        for key in _PER_HAND:
            value = hand.get(key)
            if isinstance(value, list | np.ndarray) and np.ndim(value) and len(value) == n:
                one[key] = value[i]
        out.append(one)
    return out


def left_as_right(hands: list[dict], source: Any) -> bool:
    """Whether the left hands of a file are still right ones: raw output, in the mirrored crop."""
    joints = [_joints(h, source) for h in hands if _right(h, source) < 0.5 and _first(h, _JOINTS) is not None]
    return bool(joints) and chirality(np.stack(joints)) > _FLAT


def detection(hand: dict, row: int, size: tuple[int, int], source: Any, mirror_left: bool) -> Detection:
    """One hand in a video of `size` (width, height). mirror_left: as `left_as_right`. Raises UnusableInput."""
    right = _right(hand, source)
    points3d = np.full((21, 3), np.nan)
    if _first(hand, _JOINTS) is not None:
        points3d = _joints(hand, source)
        if mirror_left and right < 0.5:
            points3d = points3d * (-1, 1, 1)
    if _first(hand, _CAMERA) is not None and np.isfinite(points3d).all():
        points = _projected(hand, points3d, size, source)
    else:
        points = _given(hand, right, size, source)
    score = _first(hand, _SCORE)
    confidence = 1.0 if score is None else float(np.clip(np.nan_to_num(_scalar(score, f"{source}: score")), 0, 1))
    return Detection(row, points, points3d, right, confidence)


def _projected(hand: dict, joints: np.ndarray, size: tuple[int, int], source: Any) -> np.ndarray:
    picture = _picture(hand, size, source)
    focal = hand.get("scaled_focal_length")
    focal = 5000.0 / 256.0 * max(picture) if focal is None else _scalar(focal, f"{source}: scaled_focal_length")
    x = joints + shaped(_first(hand, _CAMERA), (3,), f"{source}: {_CAMERA[0]}")
    if not focal > 0 or not (x[:, 2] > 0).all():
        raise UnusableInput(f"{source}: a hand is behind the camera; `pred_cam_t_full` must be the whole picture's.")
    points = focal * x[:, :2] / x[:, 2:] + np.array(picture) / 2 + 0.5
    return points * np.array(size) / np.array(picture)


def _given(hand: dict, right: float, size: tuple[int, int], source: Any) -> np.ndarray:
    if hand.get("pred_keypoints_2d") is None:
        raise UnusableInput(
            f"{source}: a hand has neither `pred_cam_t_full` nor `pred_keypoints_2d`, hence no place in the picture."
        )
    points = shaped(hand["pred_keypoints_2d"], (21, 2), f"{source}: pred_keypoints_2d")
    picture = _picture(hand, size, source)
    if np.abs(points).max() <= 2:
        if hand.get("box_center") is None or hand.get("box_size") is None:
            raise UnusableInput(
                f"{source}: `pred_keypoints_2d` are shares of a crop; save `pred_cam_t_full`, or `box_center` and "
                "`box_size`, with them."
            )
        centre = shaped(hand["box_center"], (2,), f"{source}: box_center")
        box = float(numbers(hand["box_size"], f"{source}: box_size").max())
        points = points * (1 if right >= 0.5 else -1, 1) * box + centre
    return (points + 0.5) * np.array(size) / np.array(picture)


def _picture(hand: dict, size: tuple[int, int], source: Any) -> tuple[float, float]:
    """(width, height) of the picture the network saw."""
    if hand.get("img_size") is None:
        return size
    sizes = numbers(hand["img_size"], f"{source}: img_size").reshape(-1)
    if len(sizes) < 2:
        raise UnusableInput(f"{source}: img_size must be width and height.")
    w, h = sizes[:2]  # the same for all hands of a picture
    if not (w > 0 and h > 0) or abs(np.log(w / h * size[1] / size[0])) > 0.02:
        raise UnusableInput(
            f"{source}: hands are of a picture of {w:g}x{h:g}, but the video is {size[0]}x{size[1]}, of another shape."
        )
    return float(w), float(h)


def _joints(hand: dict, source: Any) -> np.ndarray:
    return shaped(_first(hand, _JOINTS), (21, 3), f"{source}: {_JOINTS[0]}")


def _right(hand: dict, source: Any) -> float:
    value = np.asarray(_first(hand, _RIGHT))
    if value.dtype.kind in "US" and value.size == 1:
        return float(str(value.reshape(-1)[0]).lower() == "right")
    right = _scalar(value, f"{source}: is_right")
    if not 0 <= right <= 1:
        raise UnusableInput(f"{source}: is_right must be 1 for a right hand and 0 for a left one.")
    return right


def _scalar(value: Any, what: str) -> float:
    array = numbers(value, what).reshape(-1)
    if array.size == 0 or not (array == array[0]).all():
        raise UnusableInput(f"{what} must be one number.")
    return float(array[0])


def _first(hand: dict, keys: tuple[str, ...]) -> Any:
    return next((hand[k] for k in keys if hand.get(k) is not None), None)
