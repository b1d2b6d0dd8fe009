"""Pictures of the frames that taught no colour, drawn beside the video's, to be scored by masks that are not our own.

A method's own score on its labels hangs on those: an outline that is a pixel fat counts background as an error of the
object. Where the truth says which pixels show what, these figures are for all of them.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from ..losses import ssim_within
from ..scene import SIDES, Sequence, load_npz
from .crops import View

NAME = "held_out"  # of `3_fit/held_out.npz`
TRUE_LABELS = {"right": 1, "left": 2, "object": 3}  # in the truth's `masks`
SURE = 0.9  # of a pixel of the picture must be one body's, as where colours are learnt


class HeldOut:
    """Collects drawn pictures; `arrays` are those of `held_out.npz`.

    frames (N,) indices in the source video; bodies (B,) their names; box (N,4) x0, y0, x1, y1 of the crop as shares of
    the picture; per frame `drawn.I` and `picture.I` (h,w,3), `share.I` (h,w,B), what of each pixel each body is, and
    `other.I` (h,w), what of it something else may hide (a sleeve, by our masks), all uint8.
    """

    def __init__(self, sequence: Sequence, hands: list[str]) -> None:
        self.sequence = sequence
        self.bodies = ("object", *hands)
        self.frames: list[int] = []
        self.boxes: list[np.ndarray] = []
        self.pictures: dict[str, np.ndarray] = {}

    def add(self, view: View, color: torch.Tensor, share: torch.Tensor) -> None:
        """One frame: color (h,w,3) and share (h,w,B) as drawn, in [0,1]."""
        i, k = int(self.sequence.indices[view.frame]), len(self.frames)
        h, w = view.image.shape[:2]
        zoom = np.diag(view.K.cpu().numpy())[:2] / np.diag(self.sequence.K)[:2]
        corner = self.sequence.K[:2, 2] - view.K.cpu().numpy()[:2, 2] / zoom
        self.frames.append(i)
        self.boxes.append(np.r_[corner, corner + [w, h] / zoom] / np.tile(self.sequence.size, 2))
        other = torch.from_numpy(_shares(self._other(view.frame), self.boxes[-1], (h, w), {"other": 1})["other"])
        for name, x in (("drawn", color), ("picture", view.image), ("share", share), ("other", other)):
            self.pictures[f"{name}.{k}"] = (x.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    def _other(self, frame: int) -> np.ndarray:
        mask = self.sequence.masks.get("other")
        return np.zeros(self.sequence.frames.shape[1:3], np.uint8) if mask is None else mask[frame].astype(np.uint8)

    def arrays(self) -> dict[str, np.ndarray]:
        """What `held_out.npz` holds."""
        boxes = np.array(self.boxes).reshape(-1, 4)
        return {"frames": np.array(self.frames, int), "bodies": np.array(self.bodies), "box": boxes, **self.pictures}


def load(folder: Path) -> dict[str, np.ndarray] | None:
    """`held_out.npz` of a folder `3_fit/`; None when it has none."""
    path = folder / f"{NAME}.npz"
    return load_npz(path) if path.is_file() else None


def score(held: dict[str, np.ndarray], masks: np.ndarray) -> dict[str, float]:
    """Figures of `handhold.metrics.MEANING` for drawn pictures and the true visible masks (F,H,W) of the source video.

    psnr over all pixels of the bodies, psnr_object and psnr_hands over theirs, ssim the mean over those pixels, all
    others black, and mask_iou of the object's visible mask where nothing else may be in front of it. NaN without
    pixels. Raises IndexError, KeyError or ValueError when the pictures are of another clip.
    """
    error = {"psnr": [0.0, 0], "psnr_object": [0.0, 0], "psnr_hands": [0.0, 0]}
    similar, inter, union = [], 0, 0
    at = list(held["bodies"]).index("object")
    for k, (i, box) in enumerate(zip(held["frames"], held["box"], strict=True)):
        drawn, picture = (torch.from_numpy(held[f"{n}.{k}"]).float() / 255 for n in ("drawn", "picture"))
        true = _shares(masks[i], box, drawn.shape[:2], TRUE_LABELS)
        sure = {name: torch.from_numpy(share > SURE) for name, share in true.items()}
        hands = torch.stack([sure[s] for s in SIDES]).any(0)
        where = {"psnr": sure["object"] | hands, "psnr_object": sure["object"], "psnr_hands": hands}
        e = (drawn - picture).square().mean(-1)
        for name, m in where.items():
            error[name][0] += float(e[m].sum())
            error[name][1] += int(m.sum())
        if where["psnr"].any():
            similar.append(float(ssim_within(drawn, picture, where["psnr"])))
        open_ = held[f"other.{k}"] < 255 * (1 - SURE)
        seen, is_there = (held[f"share.{k}"][..., at] > 127) & open_, (true["object"] > 0.5) & open_
        inter += int((seen & is_there).sum())
        union += int((seen | is_there).sum())
    out = {n: float(-10 * np.log10(max(e / c, 1e-12))) if c else float("nan") for n, (e, c) in error.items()}
    out["ssim"] = float(np.mean(similar)) if similar else float("nan")
    return out | {"mask_iou": inter / union if union else float("nan")}


def _shares(mask: np.ndarray, box: np.ndarray, size: tuple[int, int], labels: dict[str, int]) -> dict[str, np.ndarray]:
    """How much of each pixel of a crop (h,w) a picture's mask gives to each label."""
    x0, y0, x1, y1 = np.round(box * np.tile(mask.shape[::-1], 2)).astype(int)
    part = mask[y0:y1, x0:x1]
    if not part.size:
        raise ValueError("the crop is outside of the mask")
    return {
        name: cv2.resize((part == label).astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)
        for name, label in labels.items()
    }
