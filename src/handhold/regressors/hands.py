"""The hand regressor over a clip: a box per frame, several looks at each, one answer with a confidence per joint.

Where to look is told by landmarks where they are sure, else by the segmenter's hand, else by the frames before and
after. A first look corrects the box, and turns it where the network was trained on upright hands; the others are
shifted, scaled and turned versions of it. Their mean is the
answer, and their disagreement is added to what the network itself thinks of its error: a network that is sure of
different things in almost the same picture is not to be believed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from ..errors import UnusableInput
from ..geometry import rigid
from ..hand import HandModel
from ..scene import HandEstimates, Landmarks
from .checkpoints import load_model
from .crops import HandCrops, HandPrediction, box_of_points, crop_hands, upright_angles

REGRESSOR, SEGMENTER = "hand_regressor.safetensors", "segmenter.safetensors"  # as shipped

# (shift x, shift y, scale, turn) of the looks, shares of the box's side and radians. Never mirrored: the network knows
# right hands only, and left ones are mirrored to be that.
_LOOKS = ((0.0, 0.0, 1.0, 0.0), (0.04, 0.02, 0.92, 0.25), (-0.04, -0.02, 1.1, -0.25))
# First looks where the network wants hands upright and nothing is known yet.
_TURNS = tuple((0.0, 0.0, 1.0, turn) for turn in (0.0, math.pi / 2, math.pi, -math.pi / 2))
_SURE = 0.5  # landmarks above this confidence say where the hand is
_BRIDGE = 6  # frames without a box that are filled in between two that have one
_OUTLIER = 0.1  # what is left of the confidence of a frame that no neighbour resembles


def open_network(choice: str | Path, name: str, device: str | torch.device = "cpu") -> nn.Module | None:
    """The network that a setting means: "off", "auto" (the shipped file `name`, None where there is none) or a path.

    Raises MissingAsset or UnusableInput for a path that is not a network, or one that speaks of another hand model.
    """
    if choice == "off":
        return None
    if choice == "auto":
        with resources.as_file(resources.files("handhold").joinpath("data", name)) as path:
            return load_model(path, device) if path.is_file() else None
    model = load_model(choice, device)
    if (name == SEGMENTER) != hasattr(model, "folded"):
        raise UnusableInput(f"{choice} holds another kind of network; `prepare` needs {Path(name).stem} there.")
    if getattr(model, "extra", {}).get("kind") in ("hamer", "wilor"):
        raise UnusableInput(f"{choice} speaks of MANO's hand, which `prepare` does not know; train or use our own.")
    return model


def hand_boxes(landmarks: Landmarks | None, hand: np.ndarray | None, count: int) -> np.ndarray:
    """(F,4) x0 y0 x1 y1 in pixels, where one side's hand is; NaN where nobody knows.

    landmarks: of that side. hand: (F,H,W) bool, pixels of that side's hand, of the frames' size; its largest component
    counts. Gaps of up to `_BRIDGE` frames are filled in between.
    """
    boxes = np.full((count, 4), np.nan)
    if hand is not None:
        found = [_largest(m) for m in hand]
        area = np.array([0 if f is None else f[1] for f in found])
        enough = max(60.0, 0.25 * float(np.median(area[area > 0]))) if area.any() else np.inf
        for i in np.flatnonzero(area >= enough):
            boxes[i] = found[i][0]
    if landmarks is not None:
        there = np.isfinite(landmarks.points).all((1, 2))
        sure = there & (np.nan_to_num(landmarks.confidence) >= _SURE)
        perhaps = there & (np.nan_to_num(landmarks.confidence) > 0.05) & ~np.isfinite(boxes).all(1)
        for i in np.flatnonzero(sure | perhaps):
            p = landmarks.points[i]
            boxes[i] = *p.min(0), *p.max(0)
    known = np.flatnonzero(np.isfinite(boxes).all(1))
    for a, b in zip(known[:-1], known[1:], strict=True):
        if 1 < b - a <= _BRIDGE + 1:
            share = (np.arange(a + 1, b) - a)[:, None] / (b - a)
            boxes[a + 1 : b] = (1 - share) * boxes[a] + share * boxes[b]
    return boxes


def _largest(mask: np.ndarray) -> tuple[tuple[float, float, float, float], int] | None:
    """Box and area of the largest component of (H,W) bool."""
    parts, n = ndimage.label(mask)
    if not n:
        return None
    area = np.bincount(parts.ravel())[1:]
    y, x = ndimage.find_objects(parts)[int(area.argmax())]
    return (x.start, y.start, x.stop, y.stop), int(area.max())


def regress_clip(
    model: nn.Module,
    frames: np.ndarray,
    K: np.ndarray,
    boxes: dict[str, np.ndarray],
    report: Callable[[float, str], None] | None = None,
    batch: int = 16,
) -> dict[str, HandEstimates]:
    """Estimates of the hands in a clip, by side; sides without any are left out.

    model: a hand regressor (`predict(HandCrops) -> HandPrediction`). frames (F,H,W,3) uint8 sRGB; K (3,3); boxes by
    side (F,4) as from `hand_boxes`. Runs on the model's device.
    """
    device = next(model.parameters()).device
    say = report or (lambda share, what: None)
    out, total = {}, sum(int(np.isfinite(b).all(1).sum()) for b in boxes.values())
    done = 0
    for side, where in boxes.items():
        rows = np.flatnonzero(np.isfinite(where).all(1))
        parts = []
        for start in range(0, len(rows), batch):
            at = rows[start : start + batch]
            pictures = torch.as_tensor(np.ascontiguousarray(frames[at]), device=device).permute(0, 3, 1, 2) / 255
            parts.append(_look_closely(model, pictures, K, torch.as_tensor(where[at], dtype=torch.float32), side))
            done += len(at)
            say(done / total, f"{side} hand")
        if parts:
            out[side] = _estimates([torch.cat(x) for x in zip(*parts, strict=True)], rows, len(frames), side)
    return {s: e for s, e in out.items() if (e.confidence > 0).any()}


@torch.no_grad()
def _look_closely(model: nn.Module, pictures: Tensor, K: np.ndarray, boxes: Tensor, side: str) -> tuple[Tensor, ...]:
    """Pictures (N,3,H,W) -> rotations (N,16,3,3), betas (N,10), joints (N,21,3), points (N,21,2), confidence
    (N,21)."""
    boxes = boxes.to(pictures.device)
    upright = getattr(model, "extra", {}).get("looks", 1) > 1  # trained on crops turned upright by a first look
    turns = _TURNS if upright else _LOOKS[:1]
    first = _best([model.predict(_crops(model, pictures, K, boxes, side, turn)) for turn in turns])
    seen = box_of_points(first.points)
    sure = first.confidence.mean(1, keepdim=True) > 0.3
    span = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True)
    sane = (seen[:, 2:] - seen[:, :2]).amax(1, keepdim=True).div(span).log().abs() < 0.9
    boxes = torch.where(sure & sane, seen, boxes)
    angles = upright_angles(first.points) if upright else boxes.new_zeros(len(boxes))
    looks = [model.predict(_crops(model, pictures, K, boxes, side, look, angles)) for look in _LOOKS]
    return merge(looks)


def _best(looks: list[HandPrediction]) -> HandPrediction:
    """Of each hand, the look that is surest of it."""
    if len(looks) == 1:
        return looks[0]
    best = torch.stack([x.confidence.mean(1) for x in looks]).argmax(0)  # (N,)
    row = torch.arange(len(best), device=best.device)
    values = {k.name: [getattr(x, k.name) for x in looks] for k in fields(HandPrediction)}
    return HandPrediction(**{k: None if v[0] is None else torch.stack(v)[best, row] for k, v in values.items()})


def _crops(
    model: nn.Module, pictures: Tensor, K, boxes: Tensor, side: str, look, angles: Tensor | None = None
) -> HandCrops:
    sx, sy, scale, turn = look
    middle, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    middle = middle + extent.amax(1, keepdim=True) * boxes.new_tensor([sx, sy])
    n = len(boxes)
    angles = turn + (boxes.new_zeros(n) if angles is None else angles)
    return crop_hands(
        pictures, K, torch.cat([middle - scale * extent / 2, middle + scale * extent / 2], 1),
        [side == "left"] * n, angles, torch.arange(n, device=boxes.device), model.image_size,
    )  # fmt: skip


def merge(looks: list[HandPrediction]) -> tuple[Tensor, ...]:
    """Several predictions of the same N hands -> rotations (N,16,3,3) (NaN where the network has none), betas (N,10),
    joints (N,21,3), points (N,21,2) and confidence (N,21).

    Means over the looks, rotations by the chordal L2 mean (Hartley et al., IJCV 2013). Confidence is
    1 / (1 + r²), where r² is the sum of the mean of the looks' own (their error over 4 % of the crop, squared), and of
    their scatter: of points over 4 % of the hand's box, of joints about their mean over 2 cm.
    """
    points, joints = torch.stack([x.points for x in looks]), torch.stack([x.joints for x in looks])
    own = torch.stack([1 / x.confidence.clamp_min(1e-3) - 1 for x in looks]).mean(0)
    mid = points.mean(0)
    size = (mid.amax(1) - mid.amin(1)).amax(-1, keepdim=True).clamp_min(1.0)
    scatter = (points - mid).square().sum(-1).mean(0) / (0.04 * size) ** 2
    local = joints - joints.mean(2, keepdim=True)
    scatter = scatter + (local - local.mean(0)).square().sum(-1).mean(0) / 0.02**2
    first = looks[0]
    if first.rotations is None or first.betas is None:
        rotations, betas = (x.new_full((len(mid), *s), torch.nan) for x, s in ((mid, (16, 3, 3)), (mid, (10,))))
    else:
        rotations = rigid.nearest_rotation(torch.stack([x.rotations for x in looks]).mean(0))
        betas = torch.stack([x.betas for x in looks]).mean(0)
    return rotations, betas, joints.mean(0), mid, 1 / (1 + own + scatter)


def _estimates(parts: list[Tensor], rows: np.ndarray, count: int, side: str) -> HandEstimates:
    """What was found in the frames `rows` as one record of the clip."""
    rotations, betas, joints, points, confidence = (x.double().cpu() for x in parts)
    hand = HandModel.open(side, dtype=torch.float64)
    good = torch.isfinite(joints).all(-1).all(-1) & torch.isfinite(points).all(-1).all(-1)
    confidence = torch.where(good[:, None], torch.nan_to_num(confidence), torch.zeros_like(confidence))

    def spread(x: Tensor) -> np.ndarray:
        out = np.full((count, *x.shape[1:]), np.nan, np.float32)
        out[rows[good.numpy()]] = x[good].numpy()
        return out

    made = HandEstimates(
        spread(hand.theta(rotations)), spread(betas), spread(joints), spread(points),
        np.nan_to_num(spread(confidence)),
    )  # fmt: skip
    kept = np.where(outliers(made), np.float32(_OUTLIER), np.float32(1))
    return replace(made, confidence=made.confidence * kept[:, None])


def outliers(e: HandEstimates, reach: int = 2) -> np.ndarray:
    """(F,) bool: frames whose hand looks like none of its neighbours', or lies elsewhere.

    A frame is compared with the found ones at most `reach` frames away: the nearest in pose (mean distance of joints
    about their mean) and in place. What is usual in the clip sets the limits, and a frame without neighbours passes.
    """
    n = len(e.joints)
    there = e.confidence.any(1)
    local = e.joints - e.joints.mean(1, keepdims=True)
    size = np.ptp(e.points, axis=1).max(-1)
    pose, place = np.full(n, np.nan), np.full(n, np.nan)
    for i in np.flatnonzero(there):
        near = [j for j in range(max(0, i - reach), min(n, i + reach + 1)) if j != i and there[j]]
        if near:
            pose[i] = np.linalg.norm(local[near] - local[i], axis=-1).mean(1).min()
            middle = e.points[near].mean(1) - e.points[i].mean(0)
            place[i] = (np.linalg.norm(middle, axis=-1) / np.maximum(np.maximum(size[near], size[i]), 1.0)).min()
    if not np.isfinite(pose).any():
        return np.zeros(n, bool)
    limits = max(0.03, 3 * float(np.nanmedian(pose))), max(0.4, 4 * float(np.nanmedian(place)))
    return (np.nan_to_num(pose) > limits[0]) | (np.nan_to_num(place) > limits[1])
