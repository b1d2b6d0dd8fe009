"""Spoil good evidence on purpose, by a stated amount: landmarks, masks and frames, for ablations and tests.

Everything is numpy, seeded and pure: inputs are never changed, and the same seed gives the same result. Shares are
exact: a share s of n things spoils round(s n) of them. Each kind of damage draws from a random stream of its own, so
that adding one does not change another.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import cv2
import numpy as np

from ...scene import SIDES, Landmarks, Sequence

GAMMA = 2.2


@dataclass(frozen=True)
class LandmarkCorruption:
    """Damage to landmarks, in the order in which it is done."""

    jitter: float = 0.0  # pixels, standard deviation of every coordinate
    jitter3d: float = 0.0  # metres, the same for points3d
    outliers: float = 0.0  # share of the found points that go far astray
    outlier_px: float = 60.0  # they move by one to two times this, in any direction
    drop: float = 0.0  # share of each side's found frames that are lost
    swap: float = 0.0  # share of the frames with a hand in which right and left trade places


@dataclass(frozen=True)
class MaskCorruption:
    """Damage to masks."""

    iou: float = 1.0  # intersection over union of each spoilt mask and the given one, met to a pixel
    spread: float = 0.0  # the frames' targets differ: uniform in iou +- spread
    leaks: int = 2  # bulges that grow out of the outline, per frame
    holes: int = 1  # gaps that open inside, per frame
    roughness: float = 0.15  # wavelength of the deformation over the square root of the mask's area
    coherence: float = 0.7  # correlation of the damage in neighbouring frames, in [0,1)
    drop: float = 0.0  # share of the frames that lose their mask


@dataclass(frozen=True)
class FrameCorruption:
    """Damage to frames, in the order in which it is done."""

    exposure: float = 0.0  # share of frames whose exposure jumps
    stops: float = 1.0  # by this much, up or down
    blur: float = 0.0  # share of frames that are blurred along a line
    blur_px: float = 8.0  # length of that line
    noise: float = 0.0  # standard deviation of the grain of every frame, in 8-bit levels
    duplicate: float = 0.0  # share of frames that repeat the one before
    drop: float = 0.0  # share of frames that are missing


@dataclass(frozen=True)
class Corruption:
    """What `corrupt_sequence` does; the default does nothing."""

    landmarks: LandmarkCorruption = LandmarkCorruption()
    masks: MaskCorruption = MaskCorruption()
    frames: FrameCorruption = FrameCorruption()


def corrupt_sequence(sequence: Sequence, corruption: Corruption, seed: int) -> Sequence:
    """A spoilt copy of a sequence; its notes say so.

    Dropped frames leave everything together. A regressor's estimates (`regressed`) are not spoilt: make them from the
    spoilt frames, or leave them out. Raises ValueError when a share or an IoU is not in [0,1].
    """
    frames = corrupt_frames(sequence.frames, corruption.frames, seed)
    landmarks = corrupt_landmarks(sequence.landmarks, corruption.landmarks, seed)
    masks, confidence = {}, dict(sequence.mask_confidence)
    for name, stack in sequence.masks.items():
        masks[name], lost = corrupt_masks(stack, corruption.masks, seed, name)
        if lost.any():
            given = confidence.get(name, np.ones(len(stack), np.float32))
            confidence[name] = np.where(lost, np.float32(0), given).astype(np.float32)
    keep = kept_frames(len(sequence), corruption.frames, seed)
    return replace(
        sequence,
        frames=frames[keep],
        indices=sequence.indices[keep],
        landmarks={k: _frames_of(v, keep) for k, v in landmarks.items()},
        regressed={k: _frames_of(v, keep) for k, v in sequence.regressed.items()},
        masks={k: v[keep] for k, v in masks.items()},
        mask_confidence={k: v[keep] for k, v in confidence.items()},
        notes=(*sequence.notes, f"Spoilt on purpose with seed {seed}: {_describe(corruption)}."),
    )


def _frames_of(evidence, keep: np.ndarray):
    """The same kind of evidence of some frames."""
    per_frame = {
        k: v for k, v in ((f.name, getattr(evidence, f.name)) for f in fields(evidence)) if not isinstance(v, str)
    }
    return replace(evidence, **{k: v[keep] for k, v in per_frame.items()})


# ---------------------------------------------------------------- landmarks


def corrupt_landmarks(landmarks: dict[str, Landmarks], c: LandmarkCorruption, seed: int) -> dict[str, Landmarks]:
    """All damage of `c` to the landmarks of a clip, by side. Confidences tell of what is lost, not of what is wrong."""
    out = {}
    for side, lm in landmarks.items():
        lm = jitter_landmarks(lm, c.jitter, c.jitter3d, _rng(seed, "jitter", side))
        lm = mislead_landmarks(lm, c.outliers, c.outlier_px, _rng(seed, "outliers", side))
        out[side] = drop_landmarks(lm, c.drop, _rng(seed, "drop", side))
    return swap_landmarks(out, c.swap, _rng(seed, "swap"))


def jitter_landmarks(lm: Landmarks, pixels: float, metres: float, rng: np.random.Generator) -> Landmarks:
    """Independent Gaussian noise on every coordinate."""
    points = lm.points + np.float32(pixels) * rng.standard_normal(lm.points.shape).astype(np.float32)
    points3d = lm.points3d + np.float32(metres) * rng.standard_normal(lm.points3d.shape).astype(np.float32)
    return replace(lm, points=points.astype(np.float32), points3d=points3d.astype(np.float32))


def mislead_landmarks(lm: Landmarks, share: float, pixels: float, rng: np.random.Generator) -> Landmarks:
    """Move a share of the found points by one to two times `pixels` in random directions."""
    found = np.flatnonzero(np.isfinite(lm.points).all(-1))
    hit = found[_choose(len(found), share, rng)]
    angle, length = rng.uniform(0, 2 * np.pi, len(hit)), pixels * rng.uniform(1, 2, len(hit))
    points = lm.points.reshape(-1, 2).copy()
    points[hit] += (length[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)).astype(points.dtype)
    return replace(lm, points=points.reshape(lm.points.shape))


def drop_landmarks(lm: Landmarks, share: float, rng: np.random.Generator) -> Landmarks:
    """Lose the hand in a share of the frames in which it was found: NaN, confidence 0."""
    found = np.flatnonzero(_found(lm))
    return _without(lm, found[_choose(len(found), share, rng)])


def swap_landmarks(landmarks: dict[str, Landmarks], share: float, rng: np.random.Generator) -> dict[str, Landmarks]:
    """Call right left and left right, in a share of the frames in which a hand is found.

    A hand without a partner is found on the other side, and lost on its own.
    """
    if not landmarks:
        return {}
    frames = np.flatnonzero(np.any([_found(v) for v in landmarks.values()], axis=0))
    hit = frames[_choose(len(frames), share, rng)]
    if not len(hit):
        return dict(landmarks)
    some = next(iter(landmarks.values()))
    empty = _without(some, np.arange(len(some.confidence)))
    right, left = (landmarks.get(side, empty) for side in SIDES)
    return {"right": _paste(right, left, hit), "left": _paste(left, right, hit)}


def _found(lm: Landmarks) -> np.ndarray:
    return np.isfinite(lm.points).any((-1, -2))


def _without(lm: Landmarks, frames: np.ndarray) -> Landmarks:
    points, points3d, confidence = lm.points.copy(), lm.points3d.copy(), lm.confidence.copy()
    points[frames], points3d[frames], confidence[frames] = np.nan, np.nan, 0
    return replace(lm, points=points, points3d=points3d, confidence=confidence)


def _paste(into: Landmarks, other: Landmarks, frames: np.ndarray) -> Landmarks:
    points, points3d, confidence = into.points.copy(), into.points3d.copy(), into.confidence.copy()
    points[frames], points3d[frames], confidence[frames] = (
        other.points[frames],
        other.points3d[frames],
        other.confidence[frames],
    )
    return replace(into, points=points, points3d=points3d, confidence=confidence)


# ---------------------------------------------------------------- masks


def corrupt_masks(masks: np.ndarray, c: MaskCorruption, seed: int, name: str = "") -> tuple[np.ndarray, np.ndarray]:
    """All damage of `c` to the masks (F,H,W) bool of one body.

    name: of the body; others get other damage from the same seed. Returns the spoilt masks and lost (F,) bool, the
    frames that have none any more. Frames without a mask stay without one, and do not count in shares.
    """
    masks = np.asarray(masks, bool)
    out, lost = masks.copy(), np.zeros(len(masks), bool)
    _check_share(c.iou, "iou")
    seen = np.flatnonzero(masks.any((1, 2)))
    if len(seen) and (c.iou < 1 or c.spread > 0):
        rng = _rng(seed, "mask", name)
        targets = np.clip(c.iou + c.spread * rng.uniform(-1, 1, len(masks)), 0, 1)
        cell = max(2.0, c.roughness * float(np.sqrt(np.median(masks[seen].sum((1, 2))))))
        grain = None
        for f in seen:
            grain = _next_grain(grain, masks.shape[1:], cell, c.coherence, rng)
            out[f] = degrade_mask(masks[f], float(targets[f]), rng, c.leaks, c.holes, c.roughness, grain)
    hit = seen[_choose(len(seen), c.drop, _rng(seed, "mask drop", name))]
    out[hit], lost[hit] = False, True
    return out, lost


def degrade_mask(
    mask: np.ndarray,
    iou: float,
    rng: np.random.Generator,
    leaks: int = 2,
    holes: int = 1,
    roughness: float = 0.15,
    grain: np.ndarray | None = None,
) -> np.ndarray:
    """A mask (H,W) bool whose intersection over union with the given one is `iou`, to a pixel.

    The outline is the zero level of s + a n, where s is the signed distance to the given outline and n a smooth random
    field (`grain`, or a new one of wavelength `roughness` sqrt(area)) with peaks at `leaks` places of the outline and
    pits at `holes` places inside. With growing a every pixel changes at most once, at a = -s / n, so the a of a wanted
    IoU is found by sorting. Where even the last change leaves more than `iou` (a mask that fills the picture, say),
    more of the mask is cut off, from one end.
    """
    _check_share(iou, "iou")
    area = int(mask.sum())
    if area == 0 or iou >= 1:
        return mask.copy()
    size = float(np.sqrt(area))
    field = _signed_distance(mask)
    if grain is None:
        grain = _next_grain(None, mask.shape, max(2.0, roughness * size), 0.0, rng)
    noise = 0.35 * size * _smooth(grain, mask.shape)
    noise += _bumps(mask, leaks, 0.12 * size, 2.0 * size, rng, edge=True)
    noise -= _bumps(mask, holes, 0.10 * size, 2.5 * size, rng, edge=False)
    with np.errstate(divide="ignore", invalid="ignore"):
        when = np.where(field * noise < 0, -field / noise, np.inf).ravel()
    order = np.argsort(when, kind="stable")
    order = order[: int(np.isfinite(when).sum())]
    inside = mask.ravel()[order]
    got = (area - np.cumsum(inside)) / (area + np.cumsum(~inside))
    n = int(np.searchsorted(-got, -iou))  # flips it takes until the IoU is at most `iou`
    before = got[n - 1] if n else 1.0
    if n < len(got) and abs(got[n] - iou) <= abs(before - iou):
        n += 1
    out = mask.ravel().copy()
    out[order[:n]] ^= True
    reached = got[n - 1] if n else 1.0
    if n == len(got) and reached > iou:  # nothing left to change smoothly
        both = np.flatnonzero(out & mask.ravel())
        spare = len(both) - round(iou * (area + int((out & ~mask.ravel()).sum())))
        out[both[: max(spare, 0)]] = False
    return out.reshape(mask.shape)


def _signed_distance(mask: np.ndarray) -> np.ndarray:
    """(H,W) pixels to the outline, positive inside."""
    full = mask.all()
    inside = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1, constant_values=0), cv2.DIST_L2, 5)[1:-1, 1:-1]
    if full:
        return inside - 0.5
    outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    return np.where(mask, inside - 0.5, 0.5 - outside)


def _next_grain(
    last: np.ndarray | None, shape: tuple[int, int], cell: float, coherence: float, rng: np.random.Generator
) -> np.ndarray:
    """Coarse standard-normal grid, correlated with the last one: an autoregressive process over the frames."""
    if not 0 <= coherence < 1:
        raise ValueError(f"coherence is {coherence}; it must be in [0,1)")
    new = rng.standard_normal((int(shape[0] / cell) + 2, int(shape[1] / cell) + 2)).astype(np.float32)
    return new if last is None else coherence * last + np.float32(np.sqrt(1 - coherence**2)) * new


def _smooth(grain: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    return cv2.resize(grain, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC).astype(np.float64)


def _bumps(
    mask: np.ndarray, count: int, radius: float, height: float, rng: np.random.Generator, edge: bool
) -> np.ndarray:
    """(H,W) sum of Gaussians centred on the outline, or inside."""
    out = np.zeros(mask.shape)
    where = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) if edge else mask
    ys, xs = np.nonzero(where if where.any() else mask)
    for _ in range(count):
        k = rng.integers(len(ys))
        r = max(radius * rng.uniform(0.5, 1.5), 1.0)
        y0, y1 = max(0, int(ys[k] - 4 * r)), min(mask.shape[0], int(ys[k] + 4 * r) + 1)
        x0, x1 = max(0, int(xs[k] - 4 * r)), min(mask.shape[1], int(xs[k] + 4 * r) + 1)
        y, x = np.ogrid[y0:y1, x0:x1]
        out[y0:y1, x0:x1] += height * np.exp(-((y - ys[k]) ** 2 + (x - xs[k]) ** 2) / (2 * r * r))
    return out


# ---------------------------------------------------------------- frames


def corrupt_frames(frames: np.ndarray, c: FrameCorruption, seed: int) -> np.ndarray:
    """All damage of `c` to frames (F,H,W,3) uint8 but the dropping, for which see `kept_frames`."""
    out = frames.copy()
    rng = _rng(seed, "exposure")
    for f in _choose(len(out), c.exposure, rng):
        gain = 2.0 ** (c.stops * rng.choice((-1.0, 1.0)))
        table = 255 * np.clip(gain * (np.arange(256) / 255) ** GAMMA, 0, 1) ** (1 / GAMMA)
        out[f] = np.rint(table).astype(np.uint8)[out[f]]
    rng = _rng(seed, "blur")
    for f in _choose(len(out), c.blur, rng):
        out[f] = cv2.filter2D(out[f], -1, _streak(c.blur_px, rng.uniform(0, np.pi)), borderType=cv2.BORDER_REPLICATE)
    if c.noise > 0:
        rng = _rng(seed, "noise")
        for f in range(len(out)):
            grain = np.float32(c.noise) * rng.standard_normal(out[f].shape, np.float32)
            out[f] = np.clip(np.rint(out[f] + grain), 0, 255).astype(np.uint8)
    rng = _rng(seed, "duplicate")
    if len(out) > 1:
        n = min(round(_check_share(c.duplicate, "duplicate") * len(out)), len(out) - 1)
        for f in np.sort(1 + rng.permutation(len(out) - 1)[:n]):
            out[f] = out[f - 1]
    return out


def kept_frames(count: int, c: FrameCorruption, seed: int) -> np.ndarray:
    """Rows of the frames that are not dropped, in order."""
    return np.setdiff1d(np.arange(count), _choose(count, c.drop, _rng(seed, "frame drop")))


def _streak(length: float, angle: float) -> np.ndarray:
    """Blur kernel: a line of this length through the centre, sums to 1."""
    half = max(1, int(np.ceil(length / 2)))
    kernel = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    for t in np.linspace(-length / 2, length / 2, 8 * half + 1):
        x, y = half + t * np.cos(angle), half + t * np.sin(angle)
        x0, y0 = int(np.floor(x)), int(np.floor(y))
        for dy, wy in ((0, 1 - (y - y0)), (1, y - y0)):
            for dx, wx in ((0, 1 - (x - x0)), (1, x - x0)):
                if wx * wy > 0 and 0 <= y0 + dy < len(kernel) and 0 <= x0 + dx < len(kernel):
                    kernel[y0 + dy, x0 + dx] += wx * wy
    return kernel / kernel.sum()


# ---------------------------------------------------------------- choosing


def _choose(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """round(share * count) different rows of `count`, sorted."""
    return np.sort(rng.permutation(count)[: round(_check_share(share, "a share") * count)])


def _check_share(share: float, name: str) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}; it must be in [0,1]")
    return share


def _rng(seed: int, *purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, *"/".join(purpose).encode()])


def _describe(c: Corruption) -> str:
    changed = [
        f"{part}.{name} {value:g}"
        for part, settings, plain in (
            ("landmarks", c.landmarks, LandmarkCorruption()),
            ("masks", c.masks, MaskCorruption()),
            ("frames", c.frames, FrameCorruption()),
        )
        for name, value in vars(settings).items()
        if value != getattr(plain, name)
    ]
    return ", ".join(changed) or "nothing"
