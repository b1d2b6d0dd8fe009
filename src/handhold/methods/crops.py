"""What the appearance fit looks at: each frame's crop around the bodies, and what its pixels say."""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np
import torch
from torch import Tensor

from ..scene import SIDES, Sequence
from ..tracking.object import beside

HELD_OUT = 8  # every so many frames, one teaches no colour
LONGER_SIDE = 192  # pixels of the crops that are rendered


@dataclass(frozen=True)
class View:
    """One frame's crop around the bodies, and what its pixels say."""

    frame: int
    image: Tensor  # (h,w,3)
    label: Tensor  # (h,w,B) 1 where the pixel is surely that body's, object first
    target: Tensor  # (h,w) share of the pixel that is the object
    known: Tensor  # (h,w) 1 where `target` is to be believed
    empty: Tensor  # (h,w) 1 where there is surely no body
    K: Tensor  # (3,3) of the crop
    weight: float
    has_object: bool
    held_out: bool

    def to(self, device: str | torch.device) -> View:
        """The same with its tensors on a device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return View(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()})


def crops(sequence: Sequence, weight: np.ndarray, poses: np.ndarray, hands: dict[str, np.ndarray]) -> list[View]:
    """Every frame with a posed body, in order. hands: side -> vertices (F,V,3)."""
    views, sides = [], list(hands)
    blank = np.zeros(sequence.frames.shape[:3], bool)
    masks = {k: sequence.masks.get(k, blank) for k in ("object", *SIDES, "other")}
    for i in range(len(sequence)):
        posed = bool(np.isfinite(poses[i]).all() and weight[i] > 0.02 and masks["object"][i].sum() > 50)
        if posed or any(np.isfinite(hands[s][i]).all() for s in sides):
            view = _crop(sequence.frames[i], {k: m[i] for k, m in masks.items()}, sides, sequence.K)
            if view is not None:
                views.append(View(i, *view, float(np.clip(weight[i], 0.1, 1)), posed, i % HELD_OUT == HELD_OUT // 2))
    return views


def _crop(image: np.ndarray, masks: dict[str, np.ndarray], sides: list[str], K: np.ndarray):
    inside = masks["object"]
    any_hand = masks["right"] | masks["left"]
    hidden = any_hand | masks["other"]
    rows, columns = np.nonzero((inside | any_hand).any(1))[0], np.nonzero((inside | any_hand).any(0))[0]
    if len(rows) < 4 or len(columns) < 4:
        return None
    h, w = inside.shape
    margin = round(0.08 * max(rows[-1] - rows[0], columns[-1] - columns[0])) + 2
    y0, y1 = max(rows[0] - margin, 0), min(rows[-1] + 1 + margin, h)
    x0, x1 = max(columns[0] - margin, 0), min(columns[-1] + 1 + margin, w)
    s = min(1.0, LONGER_SIDE / max(y1 - y0, x1 - x0))
    size = (max(round((x1 - x0) * s), 1), max(round((y1 - y0) * s), 1))

    def share(m: np.ndarray) -> Tensor:
        return torch.from_numpy(cv2.resize(m[y0:y1, x0:x1].astype(np.float32), size, interpolation=cv2.INTER_AREA))

    # labels are a few pixels off where one body meets another
    near_hidden, near_object = beside(hidden), beside(inside)
    clear = inside & ~hidden & ~near_hidden
    labels = [clear, *(masks[k] & ~inside & ~masks["other"] & ~near_object for k in sides)]
    label = torch.stack([(share(m) > 0.9).float() for m in labels], -1)
    nothing = share(~(inside | hidden | near_hidden))
    known = ((nothing + share(clear)) > 0.99).float()
    scale = np.array([size[0] / (x1 - x0), size[1] / (y1 - y0)])
    crop = np.array([[scale[0], 0, -scale[0] * x0], [0, scale[1], -scale[1] * y0], [0, 0, 1]]) @ K
    picture = cv2.resize(np.ascontiguousarray(image[y0:y1, x0:x1]), size, interpolation=cv2.INTER_AREA)
    empty = (share(~(inside | hidden)) > 0.99).float()
    image = torch.from_numpy(picture).float() / 255
    return image, label, share(clear) * known, known, empty, torch.from_numpy(crop).float()


def median_color(sequence: Sequence, side: str) -> Tensor:
    """(3,) median colour of a hand's mask."""
    mask = sequence.masks.get(side)
    if mask is None or not mask.any():
        return torch.full((3,), 0.5)
    i = np.flatnonzero(mask.any((1, 2)))[:: max(1, len(mask) // 8)]
    return torch.from_numpy(np.median(sequence.frames[i][mask[i]], axis=0) / 255.0).float()
