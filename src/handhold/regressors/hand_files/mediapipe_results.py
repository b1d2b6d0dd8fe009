"""Results of MediaPipe Hands as people save them: a frame is a dictionary of what the API returned.

| layout | keys of a frame |
|---|---|
| solutions (`mp.solutions.hands`) | `multi_hand_landmarks`, `multi_hand_world_landmarks`, `multi_handedness` |
| tasks (`HandLandmarker`) | `hand_landmarks`, `hand_world_landmarks`, `handedness` |
| tasks in JavaScript | `landmarks`, `worldLandmarks`, `handedness` |
| holistic | `left_hand_landmarks`, `right_hand_landmarks` |

Or the same in camelCase.

A hand is a list of 21 {"x", "y", "z"}, of [x, y, z], or {"landmark": [...]} (`MessageToDict`). x, y are shares of the
picture's width and height, from its corner: times the size they are our pixels, without a half. `solutions` names the
side as in a mirrored (selfie) picture, so for a video as it was filmed it is the other one; the others are taken as
written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UnusableInput
from ._tree import numbers
from .tracks import Detection

LAYOUTS = {
    "solutions": "MediaPipe solutions 0.8-0.10",
    "tasks": "MediaPipe tasks 0.10",
    "holistic": "MediaPipe holistic 0.8-0.10",
}
SOURCE = "mediapipe"
_LANDMARKS = {
    "solutions": ("multi_hand_landmarks", "multiHandLandmarks"),
    "tasks": ("hand_landmarks", "handLandmarks", "landmarks"),
}
_WORLD = ("multi_hand_world_landmarks", "multiHandWorldLandmarks", "hand_world_landmarks", "handWorldLandmarks")
_WORLD += ("worldLandmarks", "world_landmarks")
_SIDES = ("multi_handedness", "multiHandedness", "handedness", "handednesses")
_HOLISTIC = {s: (f"{s}_hand_landmarks", f"{s}HandLandmarks", f"{s}_hand") for s in ("right", "left")}


def kind_of(value: Any) -> str | None:
    """ "solutions", "tasks", "holistic", or None when `value` is not a frame of MediaPipe's."""
    if not isinstance(value, dict):
        return None
    if any(k in value for keys in _HOLISTIC.values() for k in keys):
        return "holistic"
    for kind, keys in _LANDMARKS.items():
        if any(k in value for k in keys) and any(k in value for k in _SIDES):
            return kind
    return None


def is_record(value: Any) -> bool:
    """Whether `value` is one frame of MediaPipe's."""
    return kind_of(value) is not None


def unpacked(arrays: dict[str, np.ndarray]) -> list[dict] | None:
    """Frames of an .npz, or None when it is none of MediaPipe's: the keys of a frame with a leading axis of frames,
    and NaN (or all 0) for a hand that was not found.

    `landmarks` or `hand_landmarks` (F,H,21,2 or 3) with `handedness` (F,H), names or 1 for right and 0 for left, and
    perhaps `world_landmarks`; or `left_hand_landmarks`, `right_hand_landmarks` (F,21,2 or 3).
    """
    kind = kind_of(arrays)
    if kind is None:
        return None
    frames: list[dict] = []
    if kind == "holistic":
        keys = [k for keys in _HOLISTIC.values() for k in keys if k in arrays]
        if any(arrays[k].ndim != 3 for k in keys):
            raise UnusableInput(f"{keys[0]} must have shape (frames, 21, 3).")
        return [{k: a[i] for k, a in ((k, arrays[k]) for k in keys) if i < len(a)} for i in range(len(arrays[keys[0]]))]
    marks = _first(arrays, _LANDMARKS[kind])
    sides, world = _first(arrays, _SIDES), _first(arrays, _WORLD)
    if marks.ndim != 4 or sides.shape[:2] != marks.shape[:2] or sides.ndim != 2:
        raise UnusableInput(
            f"MediaPipe's landmarks have shape {marks.shape} and handedness {sides.shape}; "
            "expected (frames, hands, 21, 3) and (frames, hands)."
        )
    if world is not None and world.shape[:2] != marks.shape[:2]:
        raise UnusableInput(f"world landmarks have shape {world.shape}, unlike landmarks {marks.shape}.")
    for i in range(len(marks)):
        there = [k for k in range(marks.shape[1]) if np.nan_to_num(marks[i, k].astype(float)).any()]
        frame = {"hand_landmarks": [marks[i, k] for k in there], "handedness": [sides[i, k] for k in there]}
        if world is not None:
            frame["hand_world_landmarks"] = [world[i, k] for k in there]
        frames.append(frame if kind == "tasks" else {"multi_hand_landmarks": frame.pop("hand_landmarks"), **frame})
    return frames


def detections(frame: dict, row: int, size: tuple[int, int], source: Any, swap: bool | None = None) -> list[Detection]:
    """The hands of one frame of a picture of `size` (width, height). Confidence is 1: MediaPipe gives none for
    landmarks; its score is how sure it is of the side, and is the weight of the vote.

    swap: whether the side is the other one than written; None follows the layout. Raises UnusableInput.
    """
    kind = kind_of(frame)
    swap = kind == "solutions" if swap is None else swap
    out = []
    if kind == "holistic":
        for side, keys in _HOLISTIC.items():
            points = _points(_first(frame, keys), source)
            if points is not None:
                out.append(_detection(points, None, row, float((side == "right") != swap), size, source))
        return out
    hands, sides, world = (_hands(_first(frame, k), source) for k in (_LANDMARKS[kind], _SIDES, _WORLD))
    if len(sides) != len(hands) or (world and len(world) != len(hands)):
        raise UnusableInput(f"{source}: a frame has {len(hands)} hands, but {len(sides)} sides.")
    for k, hand in enumerate(hands):
        points = _points(hand, source)
        if points is None:
            continue
        right = _right(sides[k], source)
        world3d = _points(world[k], source) if world else None
        out.append(_detection(points, world3d, row, 1 - right if swap else right, size, source))
    return out


def _first(values: dict, keys: tuple[str, ...]) -> Any:
    return next((values[k] for k in keys if values.get(k) is not None), None)


def _hands(value: Any, source: Any) -> list:
    """A list of hands: JavaScript and `MessageToDict` sometimes leave an empty one out."""
    if value is not None and not isinstance(value, list | np.ndarray):
        raise UnusableInput(f"{source}: the hands of a frame must be a list, as MediaPipe returns them.")
    return [] if value is None else list(value)


def _detection(points, world, row, right, size, source) -> Detection:
    xy = points[:, :2]
    if np.nanmedian(np.abs(xy)) > 3:
        raise UnusableInput(f"{source}: MediaPipe's x and y must be shares of the picture, as it returns them.")
    points3d = world if world is not None and world.shape[1] == 3 else np.full((21, 3), np.nan)
    return Detection(row, xy * np.array(size, np.float64), points3d, right)


def _points(value: Any, source: Any) -> np.ndarray | None:
    """(21,2 or 3), or None for a hand that is not there."""
    if isinstance(value, dict):
        value = value.get("landmark", value.get("landmarks"))
    if value is None:
        return None
    if not isinstance(value, list | np.ndarray):
        raise UnusableInput(f"{source}: a hand must be a list of 21 landmarks.")
    if len(value) == 0:
        return None
    if isinstance(value, list) and all(isinstance(p, dict) for p in value):
        value = [[p.get(k, 0.0) for k in "xyz"] for p in value]  # protobuf leaves zeros out
    array = numbers(value, f"{source}: landmarks")
    if array.shape not in ((21, 2), (21, 3)):
        raise UnusableInput(f"{source}: a hand has landmarks of shape {array.shape}, expected 21 of x, y, z.")
    return array if np.isfinite(array).all(1).any() and np.nan_to_num(array).any() else None


def _right(value: Any, source: Any) -> float:
    """Probability that the hand is called right, from any of the forms in which a side is saved."""
    score = 1.0
    for _ in range(3):
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, dict):
            score = value.get("score", 1.0)
            value = next(
                (value[k] for k in ("classification", "label", "category_name", "categoryName") if value.get(k)), None
            )
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, str) and value.lower() in ("right", "left"):
        score = score if isinstance(score, int | float) and score == score else 1.0
        score = min(max(score, 0.5), 1.0)
        return score if value.lower() == "right" else 1 - score
    if isinstance(value, int | float) and value in (0, 1):
        return float(value)
    raise UnusableInput(f"{source}: handedness must be Left or Right, not {str(value)[:40]!r}.")
