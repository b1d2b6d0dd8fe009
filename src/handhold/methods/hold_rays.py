"""The pixels HOLD learns from: what each shows, how far that is believed, and which are drawn together."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from ..render.samplers import Rays
from ..scene import Sequence
from ..tracking.object import Observations, beside

NOTHING, UNKNOWN = -1, -2  # labels that are no body


@dataclass(frozen=True)
class PixelTable:
    """Pixels of all frames, a row each, frame after frame."""

    frame: Tensor  # (N,) long
    direction: Tensor  # (N,3) unit, camera frame
    color: Tensor  # (N,3) in [0,1]
    label: Tensor  # (N,) long: index of the body seen, NOTHING or UNKNOWN
    clear: Tensor  # (N,) float: 1 where the colour is one body's alone
    sure: Tensor  # (N,) float: 1 where the label is believed
    start: Tensor  # (F+1,) long: rows of each frame
    weight: Tensor  # (F,) how far a frame is believed; 0 for those without pixels

    def draw(self, frames: int, rays: int, generator: torch.Generator) -> Tensor:
        """Rows (rays,) of as many frames, drawn by weight."""
        chosen = torch.multinomial(self.weight, min(frames, int((self.weight > 0).sum())), generator=generator)
        each = rays // len(chosen)
        lo, n = self.start[chosen], self.start[chosen + 1] - self.start[chosen]
        u = torch.rand(len(chosen), each, generator=generator)
        return (lo[:, None] + (u * n[:, None]).long()).reshape(-1)

    def rays(self, rows: Tensor, device: torch.device) -> Rays:
        """Of rows, from each frame's camera."""
        d = self.direction[rows].to(device)
        return Rays(torch.zeros_like(d), d, self.frame[rows].to(device))


def pixel_table(
    sequence: Sequence,
    obs: Observations,
    names: list[str],
    weight: np.ndarray,
    ring: int = 14,
    whole: bool = False,
    seed: int = 0,
) -> PixelTable:
    """Pixels of the bodies `names` and within `ring` (at 480 wide) of them; or, with `whole`, of all of the frame.

    weight (F,): of the object's evidence in each frame. What else may hide the bodies is UNKNOWN. Labels are not
    believed beside the border of two bodies, nor where `obs.doubtful`. A hand has at most as many pixels as the object.
    """
    generator = np.random.default_rng(seed)
    w = sequence.size[0]
    r = max(5, round(ring * w / 480))
    disk = np.ones((2 * r + 1, 2 * r + 1), np.uint8)
    blank = np.zeros(sequence.frames.shape[:3], bool)
    masks = {k: sequence.masks.get(k, blank) for k in names}
    others = [m for k, m in sequence.masks.items() if k not in names] or [blank]  # hands that no body stands for too
    masks["other"] = np.any(others, axis=0)
    out: dict[str, list[np.ndarray]] = {k: [] for k in ("frame", "direction", "color", "label", "clear", "sure")}
    counts = []
    for i in range(len(sequence)):
        label = np.full(blank.shape[1:], NOTHING)
        label[masks["other"][i]] = UNKNOWN
        for k, name in reversed(list(enumerate(names))):
            label[masks[name][i]] = k
        seen = np.any([masks[n][i] for n in names], axis=0)
        near = np.ones_like(seen) if whole else cv2.dilate(seen.astype(np.uint8), disk) > 0
        object_ = label == 0 if names[0] == "object" else np.zeros_like(seen)
        doubtful = beside(obs.unknown[i]) if obs.doubtful is None else beside(obs.unknown[i]) | obs.doubtful[i]
        other = beside(masks["other"][i])
        rim = beside(object_)
        sure = np.where(label >= 1, ~rim & ~other, ~doubtful) & (label != UNKNOWN)
        core = np.zeros_like(seen)
        for k in range(len(names)):
            core |= cv2.erode((label == k).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        clear = core & sure & (label >= 0)
        y, x = np.nonzero(near & (label != UNKNOWN) & (sure | (label >= 1)))
        most, hand = int(object_.sum()), label[y, x] >= 1
        if not whole and 0 < most < hand.sum():
            keep = ~hand | (generator.random(len(x)) < most / hand.sum())
            y, x = y[keep], x[keep]
        d = np.stack(
            [(x + 0.5 - obs.K[0, 2]) / obs.K[0, 0], (y + 0.5 - obs.K[1, 2]) / obs.K[1, 1], np.ones(len(x))], -1
        )
        out["frame"].append(np.full(len(x), i))
        out["direction"].append((d / np.linalg.norm(d, axis=1, keepdims=True)).astype(np.float32))
        out["color"].append((sequence.frames[i][y, x] / 255.0).astype(np.float32))
        out["label"].append(label[y, x])
        out["clear"].append(clear[y, x].astype(np.float32))
        out["sure"].append(sure[y, x].astype(np.float32))
        counts.append(len(x))
    rows = {k: torch.from_numpy(np.concatenate(v)) for k, v in out.items()}
    start = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    believed = torch.as_tensor(np.clip(np.nan_to_num(weight), 0.02, 1), dtype=torch.float32)
    return PixelTable(**rows, start=start, weight=believed * torch.tensor([c > 50 for c in counts]))
