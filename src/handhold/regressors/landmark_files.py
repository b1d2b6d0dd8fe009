"""Landmark files: what `track_landmarks` found, or what a user made elsewhere.

`.npz`: `right_points` (F,21,2) pixels, and optionally `right_points3d` (F,21,3) and `right_confidence` (F,); the same
with `left_`. `.json`: {"right": {"points": [[[x, y] x 21] x F], "points3d": ..., "confidence": [...]}, "left":
{...}}, where a frame or a joint may be null. Pixels have their centres at +0.5, OpenPose order; NaN (or null) says
"not found". `source` may say whose landmarks they are: "mediapipe" points lie beside a hand model's joints, and the
fit allows for that.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from ..errors import UnusableInput
from ..scene import SIDES, Landmarks, load_npz, save_npz

_MAX_PIXELS, _MAX_METRES, _MAX_BYTES = 1e5, 1e3, 1 << 30
_SOURCES = ("", "mediapipe", "openpose", "mano")


def save_landmarks(path: str | os.PathLike, landmarks: dict[str, Landmarks]) -> None:
    """Write landmarks as `.npz`, atomically."""
    out = {}
    for side, lm in landmarks.items():
        out |= {f"{side}_points": lm.points, f"{side}_points3d": lm.points3d, f"{side}_confidence": lm.confidence}
    source = next((lm.source for lm in landmarks.values()), "")
    save_npz(path, {"source": np.asarray(source)} | {k: np.asarray(v, np.float32) for k, v in out.items()})


def load_landmarks(path: str | os.PathLike, n_frames: int) -> dict[str, Landmarks]:
    """Read a user's landmarks for a clip of n_frames; see the head of this file for the two layouts.

    Confidence defaults to 1 where a frame has any joint. Raises UnusableInput when the file is not one, has no hand,
    has another number of frames, or holds infinite or absurd values.
    """
    path = Path(path)
    raw = _read_json(path) if path.suffix.lower() == ".json" else load_npz(path, _MAX_BYTES)
    source = str(raw.get("source", ""))
    if source not in _SOURCES:
        raise UnusableInput(f"{path}: source must be one of {', '.join(filter(None, _SOURCES))}, or left out.")
    out = {}
    for side in SIDES:
        if f"{side}_points" not in raw:
            continue
        points = _checked(raw[f"{side}_points"], (n_frames, 21, 2), _MAX_PIXELS, f"{side} points", path)
        found = np.isfinite(points).all(-1)
        points[~found] = np.nan
        points3d = np.full((n_frames, 21, 3), np.nan, np.float32)
        if f"{side}_points3d" in raw:
            points3d = _checked(raw[f"{side}_points3d"], (n_frames, 21, 3), _MAX_METRES, f"{side} points3d", path)
            points3d[~np.isfinite(points3d).all(-1)] = np.nan
        confidence = np.ones(n_frames, np.float32)
        if f"{side}_confidence" in raw:
            confidence = _checked(raw[f"{side}_confidence"], (n_frames,), 1.0, f"{side} confidence", path)
            if (confidence < 0).any():
                raise UnusableInput(f"{path}: {side} confidence must lie between 0 and 1.")
            confidence = np.nan_to_num(confidence)
        confidence = np.where(found.any(1), confidence, 0).astype(np.float32)
        if confidence.any():
            out[side] = Landmarks(points, points3d, confidence, source)
    if not out:
        raise UnusableInput(
            f"{path} holds no hand: expected `right_points` or `left_points` of shape ({n_frames}, 21, 2)."
        )
    return out


def _checked(value: np.ndarray, shape: tuple[int, ...], limit: float, what: str, path: Path) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in "fiu":
        raise UnusableInput(f"{path}: {what} must be numbers.")
    if value.ndim == len(shape) and value.shape[1:] == shape[1:] and value.shape[0] != shape[0]:
        raise UnusableInput(f"{path}: {what} are for {value.shape[0]} frames, but the clip has {shape[0]}.")
    if value.shape != shape:
        raise UnusableInput(f"{path}: {what} have shape {value.shape}, expected {shape}.")
    if np.isinf(value).any():
        raise UnusableInput(f"{path}: {what} hold infinite values; write NaN where a joint was not found.")
    if (np.abs(np.nan_to_num(value)) > limit).any():
        raise UnusableInput(f"{path}: {what} hold values beyond {limit:g}, which cannot be right.")
    return value.astype(np.float32)


def _read_json(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UnusableInput(f"{path} does not exist.")
    if path.stat().st_size > _MAX_BYTES:
        raise UnusableInput(f"{path} is larger than {_MAX_BYTES >> 20} MiB, which no landmark file is.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UnusableInput(f"{path} is not readable JSON ({type(e).__name__}).") from e
    if not isinstance(data, dict):
        raise UnusableInput(f'{path} must hold an object such as {{"right": {{"points": ...}}}}.')
    out = {"source": np.asarray(str(data.get("source", "")))}
    for side in SIDES:
        hand = data.get(side)
        if hand is None:
            continue
        if not isinstance(hand, dict) or "points" not in hand:
            raise UnusableInput(f'{path}: "{side}" must be an object with "points".')
        for key, tail in (("points", (21, 2)), ("points3d", (21, 3)), ("confidence", ())):
            if hand.get(key) is not None:
                out[f"{side}_{key}"] = _filled(hand[key], tail, f"{side} {key}", path)
    return out


def _filled(value, tail: tuple[int, ...], what: str, path: Path) -> np.ndarray:
    """Nested lists to an array, null standing for NaN at any depth."""

    def fill(v, shape: tuple[int, ...]):
        if v is None:
            return np.full(shape, np.nan)
        if not shape:
            if isinstance(v, bool) or not isinstance(v, int | float):
                raise ValueError
            return float(v)
        if not isinstance(v, list) or len(v) != shape[0]:
            raise ValueError
        return np.array([fill(x, shape[1:]) for x in v], np.float64)

    try:
        if not isinstance(value, list):
            raise ValueError
        return np.array([fill(v, tail) for v in value], np.float64).reshape(-1, *tail)
    except (ValueError, OverflowError) as e:
        raise UnusableInput(f"{path}: {what} must be a list of one {tail or 'number'} entry (or null) a frame.") from e
