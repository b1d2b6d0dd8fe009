"""First guesses for the masks of a clip: where the landmarks put things, and what colour skin has there."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import ndimage

from ..parallel import each
from ._mask_classifier import Features, chromaticity, sure_labels
from ._mask_cleaning import BACKGROUND, BONES, HAND, OBJECT, OTHER, SURE_HAND, px


def apparent_size(points: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """(F,) apparent size of the hand in pixels, from the largest wrist-to-knuckle lengths of the clip, so that
    foreshortening does not shrink it.
    """
    length = np.linalg.norm(points[:, [5, 9, 13, 17]] - points[:, :1], axis=-1).max(1)
    length = np.where(confidence > 0.3, length, np.nan)
    if not np.isfinite(length).any():
        return np.full(len(points), 60.0)
    overall = np.nanpercentile(length, 85)
    return np.full(len(points), 1.9 * overall)  # a hand is about 1.9 times as long as its palm


@dataclass(frozen=True)
class Places:
    """Where things should be in one frame, in units of the hand's length; None where the hands were not found."""

    near: np.ndarray  # (H,W) distance to the closest finger bone or palm, 0 inside
    reach: np.ndarray  # (H,W) distance to the middle knuckle
    ahead: np.ndarray  # (H,W) coordinate along wrist -> middle knuckle, from the wrist
    behind: np.ndarray  # (H,W) bool, where the forearm should be
    fair: bool  # False when a hand points at the camera, so that ahead and behind mean nothing in the image
    complete: bool  # False when the clip has another hand that was not found here


def find_places(i, shape, hands, hand_size) -> Places | None:
    found = [(s, p[i]) for s, (p, c) in hands.items() if c[i] > SURE_HAND and np.isfinite(p[i]).all()]
    if not found:
        return None
    h, w = shape
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32) + 0.5
    near, reach = np.full((h, w), np.inf, np.float32), np.full((h, w), np.inf, np.float32)
    ahead, behind, fair = np.full((h, w), -np.inf, np.float32), np.zeros((h, w), bool), True
    for s, p in found:
        size = hand_size[s][i]
        bones = np.ones((h, w), np.uint8)
        for a, b in BONES:
            cv2.line(bones, px(p[a]), px(p[b]), 0, max(1, round(0.045 * size)))
        cv2.fillConvexPoly(bones, np.array([px(q) for q in (p[0] * 0.8 + 0.2 * p[9], p[5], p[9], p[13], p[17])]), 0)
        near = np.minimum(near, cv2.distanceTransform(bones, cv2.DIST_L2, 3) / size)
        axis = p[9] - p[0]
        length = np.linalg.norm(axis)
        fair &= bool(length > 0.33 * size)
        axis = axis / max(length, 1e-6)
        along = ((xx - p[0, 0]) * axis[0] + (yy - p[0, 1]) * axis[1]) / size
        across = np.abs((xx - p[0, 0]) * axis[1] - (yy - p[0, 1]) * axis[0]) / size
        behind |= (along < -0.12) & (across < 0.35 - 0.5 * along)
        ahead = np.maximum(ahead, np.where(across < 1.2, along, -np.inf))
        reach = np.minimum(reach, np.hypot(xx - p[9, 0], yy - p[9, 1]) / size)
    return Places(near, reach, ahead, behind, fair, len(found) == len(hands))


@dataclass(frozen=True)
class Skin:
    """Skin is one material: a Gaussian in log-chromaticity, which shading leaves alone."""

    mean: np.ndarray  # (2,)
    precision: np.ndarray  # (2,2)

    def distance(self, frame: np.ndarray) -> np.ndarray:
        """(H,W) Mahalanobis distance of each pixel from skin."""
        x, y = (chromaticity(frame) - self.mean).transpose(2, 0, 1)
        (a, b), (c, e) = self.precision
        return np.sqrt(x * a * x + x * b * y + y * c * x + y * e * y)


def skin_color(frames, features, places) -> Skin | None:
    """The colour that is common on the hand and rare beside it. Landmarks alone do not tell: fingers behind an object
    are on the object's pixels.
    """

    def look(i: int) -> tuple[np.ndarray, np.ndarray]:
        place, c = places[i], chromaticity(frames[i])
        moving = (features.foreground(i) > 4.0) | ~features.known
        beside = moving & (place.near > 0.08) & ~place.behind & (place.reach < 1.2)
        return c[moving & (place.near <= 0)], c[beside]

    seen = each(look, [i for i, place in enumerate(places) if place is not None and place.complete])
    if sum(len(on) for on, _ in seen) < 500:
        return None
    inside, outside = (np.concatenate(c) for c in zip(*seen, strict=True))
    edges = np.linspace(-2.5, 2.5, 101)
    count = lambda x: ndimage.gaussian_filter(np.histogram2d(x[:, 0], x[:, 1], [edges, edges])[0], 1.2)  # noqa: E731
    a, b = count(inside), count(outside)
    score = a * (a / (a + b + 0.02 * a.max()))
    peak = np.unravel_index(score.argmax(), score.shape)
    mean = np.array([0.5 * (edges[k] + edges[k + 1]) for k in peak])
    cov = np.eye(2) * 0.08**2
    for _ in range(12):
        d = inside - mean
        m = np.einsum("ni,ij,nj->n", d, np.linalg.inv(cov), d) < 2.5**2
        if m.sum() < 100:
            break
        mean = inside[m].mean(0)
        # a Gaussian cut at 2.5 sigma keeps 0.92 of its variance; bounds keep the fit from swallowing another colour
        value, vector = np.linalg.eigh(np.cov(inside[m].T) / 0.92)
        cov = vector @ np.diag(np.clip(value, 0.04**2, 0.16**2)) @ vector.T
    return Skin(mean, np.linalg.inv(cov))


def on_skin(place, features, skin, i) -> float:
    """Share of the hand's bones in frame `i` that look like skin."""
    on = place.near <= 0
    return float((skin.distance(features.frames[i])[on] < 2.5).mean()) if on.any() else 0.0


def guess(i: int, features: Features, place: Places | None, skin: Skin | None) -> np.ndarray:
    """(H,W) int8: the label of what is plain from motion, landmarks and skin in frame i, -1 elsewhere."""
    d = features.foreground(i)
    h, w = d.shape
    label = np.full((h, w), -1, np.int8)
    label[(d < 1.5) & features.known] = BACKGROUND
    moving = ndimage.binary_opening((d > 5.0) & features.known, iterations=1)
    tone = np.zeros((h, w), np.float32) if skin is None else skin.distance(features.frames[i])
    if place is not None:
        if place.complete:
            label[moving & (place.reach > 2.0)] = OTHER
        if place.fair:
            label[moving & place.behind & (place.near > 0.15)] = OTHER
        if place.fair and place.complete:
            label[
                moving
                & ~place.behind
                & (place.ahead > 0.1)
                & (place.near > 0.10)
                & (place.reach < 0.9)
                & ((tone > 3.5) | (skin is None))
            ] = OBJECT
        covered = (d > 3.0) | ~features.known
        label[(place.near <= 0) & covered & (tone < 2.0)] = HAND
        label[(place.near <= 0) & covered & (tone > 5.0) & (place.ahead > 0.2)] = OBJECT  # in front of the hand
    # A shadow on the background keeps its chromaticity and loses some light.
    back = features.background_chromaticity
    shadow = features.known & (d > 1.5) & (np.abs(chromaticity(features.frames[i]) - back).max(-1) < 0.06)
    light = features.frames[i].mean(-1) / np.maximum(features.background.color.mean(-1), 1.0)
    label[shadow & (light > 0.72) & (light < 1.0) & (label != HAND)] = BACKGROUND
    return label


def with_network(label: np.ndarray, i: int, network: np.ndarray, features: Features) -> np.ndarray:
    """Guesses (H,W) of `guess` put right by the segmenter's probabilities network (F,H,W,4): where it is sure it says
    what is there, unless the background says that nothing is, or that something else moves; what it finds unlikely is
    not guessed.
    """
    p = network[i].astype(np.float32)
    given = np.take_along_axis(p, np.maximum(label, 0)[..., None].astype(np.int64), -1)[..., 0]
    out = np.where((label >= 0) & (given > 0.25), label, -1).astype(np.int8)
    # what moves and is no hand, object or arm is other; landmarks tell where, and the segmenter does not object
    out = np.where((label == OTHER) & (p[..., BACKGROUND] > 0.5), OTHER, out)
    sure = sure_labels(p)
    d = features.foreground(i)
    empty, full = features.known & (d < 1.5), features.known & (d > 6.0)
    accepted = (sure >= 0) & np.where(sure == BACKGROUND, ~full, ~empty)
    return np.where(accepted & (out != OTHER), sure, out).astype(np.int8)
