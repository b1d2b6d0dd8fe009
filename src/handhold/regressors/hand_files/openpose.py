"""OpenPose's `--write_json` folder: one `*_keypoints.json` per frame, versions 1.0 to 1.3 (the file's `version`).

`people` is a list; each has `hand_left_keypoints_2d` and `hand_right_keypoints_2d`, 21 times x, y, score (1.0 calls
them `hand_left_keypoints`, ...). x, y are pixels of the source picture with centres at whole numbers (the hand network
reads a crop made by OpenCV's warpAffine, which counts so), hence half a pixel is added. Nothing found is 0, 0, 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import UnusableInput
from ._tree import shaped
from .tracks import Detection

LAYOUT = "OpenPose 1.0-1.3"
SOURCE = "openpose"
_SEEN = 0.05  # score below which a joint says nothing
_KEYS = {s: (f"hand_{s}_keypoints_2d", f"hand_{s}_keypoints") for s in ("right", "left")}


def is_record(value: Any) -> bool:
    """Whether `value` is what OpenPose writes for a frame."""
    return isinstance(value, dict) and isinstance(value.get("people"), list)


def detections(frame: dict, row: int, size: tuple[int, int], source: Any) -> list[Detection]:
    """The hands of one frame; confidence is the mean score of the joints found. Raises UnusableInput."""
    out = []
    for person in frame["people"]:
        if not isinstance(person, dict):
            raise UnusableInput(f"{source}: `people` must be a list of objects, as OpenPose writes it.")
        for side, keys in _KEYS.items():
            values = next((person[k] for k in keys if person.get(k)), None)
            if values is None:
                continue
            joints = shaped(values, (63,), f"{source}: {keys[0]}").reshape(21, 3)
            score = np.nan_to_num(joints[:, 2])
            seen = (score > _SEEN) & np.isfinite(joints).all(1)
            if seen.sum() < 4:
                continue
            if np.abs(joints[seen, :2]).max() <= 1.5:
                raise UnusableInput(
                    f"{source}: joints are scaled to 1, not pixels; run OpenPose with `--keypoint_scale 0`."
                )
            points = np.where(seen[:, None], joints[:, :2] + 0.5, np.nan)
            confidence = float(np.clip(score[seen].mean(), 0, 1))
            out.append(Detection(row, points, np.full((21, 3), np.nan), float(side == "right"), confidence))
    return out
