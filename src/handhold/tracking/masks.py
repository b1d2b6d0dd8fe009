"""Masks of the hands and the object without a trained segmenter: background, colour, landmarks.

A static camera sees each background pixel with the same colour whenever nothing covers it, so the densest temporal mode
of a pixel is its background. What differs is hand, object, or everything else that moves (sleeve, arm, body). Landmarks
give clean seeds of each in the frames where the hand was found; a small per-clip pixel classifier learns colour and
local texture from those seeds and labels every frame, also those without landmarks. Probabilities are smoothed along
image edges and cleaned by connectivity. Nothing here is specific to an object.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy import ndimage

from ..scene import Sequence
from ._mask_cleaning import BACKGROUND, BONES, HAND, OBJECT, OTHER, clean, px

_WORK_SIDE = 512  # masks are computed at most this large and resampled by coverage


@dataclass(frozen=True)
class Background:
    """What a static camera sees behind everything that moves."""

    color: np.ndarray  # (H,W,3) float32 sRGB 0..255
    support: np.ndarray  # (H,W) float32, share of frames that agree with `color`; low where nearly always covered
    sigma: float  # noise of one frame, sRGB units


def estimate_background(frames: np.ndarray, candidates: int = 24, samples: int = 64) -> Background:
    """Densest temporal mode of every pixel. frames (F,H,W,3) uint8."""
    pick = frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), samples)).astype(int))]
    x = np.stack([cv2.GaussianBlur(f, (3, 3), 0) for f in pick]).astype(np.float32)
    step = np.abs(np.diff(x, axis=0)).max(-1)
    # capped, because with a moving camera every change would pass for noise, and everything for background
    sigma = min(float(np.median(np.percentile(step, 30, axis=0))) * 1.2 + 1.0, 12.0)
    kernel = -0.5 / (3 * (2.0 * sigma) ** 2)
    best = np.full(x.shape[1:3], -1.0, np.float32)
    mode = np.zeros(x.shape[1:], np.float32)
    for i in np.unique(np.linspace(0, len(x) - 1, min(len(x), candidates)).astype(int)):
        density = np.zeros_like(best)
        for other in x:
            d = other - x[i]
            density += np.exp(kernel * np.einsum("hwc,hwc->hw", d, d))
        better = density > best
        best[better] = density[better]
        mode[better] = x[i][better]
    total, weight = np.zeros_like(mode), np.full(best.shape, 1e-6, np.float32)
    for other in x:
        d = other - mode
        w = np.exp(kernel * np.einsum("hwc,hwc->hw", d, d))
        total += w[..., None] * other
        weight += w
    return Background(total / weight[..., None], best / len(x), sigma)


def segment(sequence: Sequence, progress: Callable[[float, str], None] | None = None, seed: int = 0) -> Sequence:
    """Add masks "right"/"left" (the sides with landmarks), "object" and "other" (what else moves: sleeve, arm, body),
    with a confidence per frame and mask.

    Frames must come from a static camera for the background model to hold; where the background explains less than it
    should, confidences fall and a note says so. Deterministic for a given seed.
    """
    say = progress or (lambda share, what: None)
    width, height = sequence.size
    scale = min(1.0, _WORK_SIDE / max(width, height))
    size = (round(width * scale), round(height * scale))
    frames = (
        sequence.frames
        if scale == 1.0
        else np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in sequence.frames])
    )
    hands = {
        s: (lm.points * (np.array(size) / (width, height)).astype(np.float32), lm.confidence)
        for s, lm in sequence.landmarks.items()
    }

    say(0.0, "background")
    background = estimate_background(frames)
    # A pixel the background explains in too few frames may have been covered throughout: its "background" is the hand.
    known = cv2.GaussianBlur((background.support > 0.28).astype(np.float32), (0, 0), 2.0) > 0.6
    say(0.2, "seeds")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    features = _Features(frames, background, known)
    hand_size = {s: _hand_size(p, c) for s, (p, c) in hands.items()}
    places = [_places(i, frames.shape[1:3], hands, hand_size) for i in range(len(frames))]
    skin = _skin_color(frames, features, places)
    if skin is not None:  # landmarks that do not lie on skin are wrong, and so is all that would be learned around them
        places = [p if p is None or _on_skin(p, features, skin, i) > 0.4 else None for i, p in enumerate(places)]
    samples = [_seeds(i, features, places[i], skin, rng) for i in range(len(frames))]
    x = np.concatenate([s[0] for s in samples])
    y = np.concatenate([s[1] for s in samples])
    notes = list(sequence.notes)
    if (y == HAND).sum() < 200 or (y == OBJECT).sum() < 200:
        notes.append("masks: too little of the hand or object was found to learn their colours")
    with _one_thread():
        model = _train(x, y, rng, features.n_background)
    say(0.4, "labels")
    probabilities = _label_all(model, features, frames)
    # Second round: the classifier's own confident, spatially consistent labels cover all frames and replace the seeds.
    extra = [_confident(i, probabilities[i], features, rng) for i in range(len(frames))]
    x2, y2 = np.concatenate([e[0] for e in extra]), np.concatenate([e[1] for e in extra])
    with _one_thread():
        model = _train(np.concatenate([x, x2]), np.concatenate([y, y2]), rng, features.n_background)
    say(0.7, "labels, second round")
    probabilities = _label_all(model, features, frames)
    say(0.85, "edges")
    with _one_thread():
        fine = _train(np.concatenate([x, x2])[:, features.fine], np.concatenate([y, y2]), rng, features.n_background)
    _redecide_edges(probabilities, fine, features)
    say(0.9, "clean")
    masks, confidence = clean(probabilities, features, hands, hand_size)
    if scale != 1.0:
        masks = {
            k: np.stack(
                [cv2.resize(f.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5 for f in m]
            )
            for k, m in masks.items()
        }
    if known.mean() < 0.5:
        notes.append("masks: the background is rarely visible or the camera moves; masks are uncertain")
        confidence = {k: c * 0.5 for k, c in confidence.items()}
    say(1.0, "masks")
    return sequence.with_evidence(masks=masks, mask_confidence=confidence, notes=tuple(notes))


class _Features:
    """Per-pixel colour, local mean colour, local contrast, and difference from the background (0 where unknown)."""

    n_background = 5
    fine = np.r_[0:6, 14:19]  # the columns that look at one pixel (and its closest neighbours) alone

    def __init__(self, frames: np.ndarray, background: Background, known: np.ndarray) -> None:
        self.frames, self.background, self.known = frames, background, known
        self._foreground: dict[int, np.ndarray] = {}

    def foreground(self, i: int) -> np.ndarray:
        """(H,W) float32: difference from the background in noise units, 0 where the background is unknown."""
        if i not in self._foreground:
            d = cv2.absdiff(cv2.GaussianBlur(self.frames[i], (3, 3), 0).astype(np.float32), self.background.color)
            d = np.maximum(np.maximum(d[..., 0], d[..., 1]), d[..., 2]) / self.background.sigma
            self._foreground[i] = np.where(self.known, d, 0.0).astype(np.float32)
        return self._foreground[i]

    def __call__(self, i: int) -> np.ndarray:
        """(H,W,D) float32."""
        lab = cv2.cvtColor(self.frames[i].astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])
        b1, b2, b3 = (cv2.GaussianBlur(lab, (0, 0), s) for s in (1.0, 3.0, 7.0))
        contrast = [
            np.sqrt(np.maximum(cv2.GaussianBlur(lab * lab, (0, 0), s) - b * b, 0)).sum(-1, keepdims=True)
            for s, b in ((3.0, b2), (7.0, b3))
        ]
        d = self.foreground(i)
        k = self.known.astype(np.float32)
        diff = np.where(self.known[..., None], b1 - self._background_lab, 0)
        back = np.concatenate([k[..., None], np.minimum(d, 12.0)[..., None] / 6.0, diff], -1)
        return np.concatenate([lab, b1, b2, b3, *contrast, back], -1).astype(np.float32)

    @functools.cached_property
    def background_chromaticity(self) -> np.ndarray:
        """(H,W,2) log-chromaticity of the background."""
        return _chromaticity(np.clip(self.background.color, 0, 255).astype(np.uint8))

    @functools.cached_property
    def _background_lab(self) -> np.ndarray:
        return cv2.cvtColor(np.clip(self.background.color / 255.0, 0, 1), cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])


def _hand_size(points: np.ndarray, confidence: np.ndarray) -> np.ndarray:
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
class _Places:
    """Where things should be in one frame, in units of the hand's length; None where the hands were not found."""

    near: np.ndarray  # (H,W) distance to the closest finger bone or palm, 0 inside
    reach: np.ndarray  # (H,W) distance to the middle knuckle
    ahead: np.ndarray  # (H,W) coordinate along wrist -> middle knuckle, from the wrist
    behind: np.ndarray  # (H,W) bool, where the forearm should be
    fair: bool  # False when a hand points at the camera, so that ahead and behind mean nothing in the image
    complete: bool  # False when the clip has another hand that was not found here


def _places(i, shape, hands, hand_size) -> _Places | None:
    found = [(s, p[i]) for s, (p, c) in hands.items() if c[i] > 0.45 and np.isfinite(p[i]).all()]
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
    return _Places(near, reach, ahead, behind, fair, len(found) == len(hands))


@dataclass(frozen=True)
class _Skin:
    """Skin is one material: a Gaussian in log-chromaticity, which shading leaves alone."""

    mean: np.ndarray  # (2,)
    precision: np.ndarray  # (2,2)

    def distance(self, frame: np.ndarray) -> np.ndarray:
        """(H,W) Mahalanobis distance of each pixel from skin."""
        d = _chromaticity(frame) - self.mean
        return np.sqrt(np.einsum("...i,ij,...j->...", d, self.precision, d))


def _chromaticity(frame: np.ndarray) -> np.ndarray:
    linear = (cv2.GaussianBlur(frame, (0, 0), 1.0).astype(np.float32) / 255.0) ** 2.2 + 0.004
    log = np.log(linear)
    return np.stack([log[..., 0] - log[..., 1], log[..., 2] - log[..., 1]], -1)


def _skin_color(frames, features, places) -> _Skin | None:
    """The colour that is common on the hand and rare beside it. Landmarks alone do not tell: fingers behind an object
    are on the object's pixels.
    """
    inside, outside = [], []
    for i, place in enumerate(places):
        if place is None or not place.complete:
            continue
        moving = (features.foreground(i) > 4.0) | ~features.known
        c = _chromaticity(frames[i])
        inside.append(c[moving & (place.near <= 0)])
        outside.append(c[moving & (place.near > 0.08) & ~place.behind & (place.reach < 1.2)])
    if not inside or sum(map(len, inside)) < 500:
        return None
    inside = np.concatenate(inside)
    outside = np.concatenate(outside)
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
    return _Skin(mean, np.linalg.inv(cov))


def _on_skin(place, features, skin, i) -> float:
    """Share of the hand's bones in frame `i` that look like skin."""
    on = place.near <= 0
    return float((skin.distance(features.frames[i])[on] < 2.5).mean()) if on.any() else 0.0


def _seeds(i, features, place, skin, rng, per_class: int = 500):
    """Clean samples of one frame: features (N,D) and labels (N,)."""
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
    shadow = features.known & (d > 1.5) & (np.abs(_chromaticity(features.frames[i]) - back).max(-1) < 0.06)
    light = features.frames[i].mean(-1) / np.maximum(features.background.color.mean(-1), 1.0)
    label[shadow & (light > 0.72) & (light < 1.0) & (label != HAND)] = BACKGROUND
    f = features(i)
    xs, ys = [np.zeros((0, f.shape[-1]), np.float32)], [np.zeros(0, int)]
    for c in range(4):
        at = np.flatnonzero(label == c)
        if len(at):
            at = rng.choice(at, min(per_class, len(at)), replace=False)
            xs.append(f.reshape(-1, f.shape[-1])[at])
            ys.append(np.full(len(at), c))
    return np.concatenate(xs), np.concatenate(ys)


@contextlib.contextmanager
def _one_thread():
    """Tiny matrices: a second thread costs more than it brings, and its waiting costs more still."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(x, y, rng, n_background: int, epochs: int = 700, width: int = 40):
    """A three-layer perceptron on balanced classes; background features are dropped at random so that colour alone
    suffices.
    """
    x, y = torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
    d = x.shape[1]
    net = torch.nn.Sequential(
        torch.nn.Linear(d, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 4),
    )
    groups = [torch.nonzero(y == c)[:, 0] for c in range(4)]
    opt = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-3, fused=True)
    for step in range(epochs):
        at = torch.cat([g[torch.from_numpy(rng.integers(0, len(g), 512))] for g in groups if len(g)])
        xb = x[at].clone()
        drop = torch.from_numpy(rng.random(len(at)) < 0.3)
        xb[drop, -n_background:] = 0
        xb[:, :-n_background] += torch.from_numpy(rng.normal(0, 0.03, (len(at), d - n_background)).astype(np.float32))
        loss = torch.nn.functional.cross_entropy(net(xb), y[at], label_smoothing=0.05)
        opt.zero_grad()
        loss.backward()
        opt.step()
        opt.param_groups[0]["lr"] = 4e-3 * (1 - step / epochs)
    return net.eval()


@torch.no_grad()
def _label_all(model, features: _Features, frames: np.ndarray) -> np.ndarray:
    """(F,H,W,4) float16 class probabilities, smoothed along image edges."""
    out = np.empty((*frames.shape[:3], 4), np.float16)
    for i, frame in enumerate(frames):
        f = features(i)
        clear = (features.foreground(i) < 1.2) & features.known  # plainly background: not worth asking
        clear = ndimage.binary_erosion(clear, iterations=2)
        p = np.zeros((*clear.shape, 4), np.float32)
        p[clear, BACKGROUND] = 1
        p[~clear] = torch.softmax(model(torch.from_numpy(f[~clear])), -1).numpy()
        guide = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        p = np.stack([_guided(guide, p[..., c], 4, 2e-3) for c in range(4)], -1)
        p = np.maximum(p, 1e-4)
        out[i] = p / p.sum(-1, keepdims=True)
    return out


@torch.no_grad()
def _redecide_edges(probabilities: np.ndarray, model, features: _Features) -> None:
    """In place: within a few pixels of an edge of the object the pixel's own colour decides.

    Context blurs labels across edges, and what leaks over one, between fingers above all, stays with the object in its
    own frame as a fin that no other view can carve.
    """
    reach = max(3, round(0.02 * probabilities.shape[2]))
    for i in range(len(probabilities)):
        inside = probabilities[i].argmax(-1) == OBJECT
        if not inside.any():
            continue
        kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
        band = (cv2.dilate(inside.astype(np.uint8), kernel) > 0) & (cv2.erode(inside.astype(np.uint8), kernel) == 0)
        f = features(i)[..., features.fine]
        p = probabilities[i].astype(np.float32)
        p[band] = torch.softmax(model(torch.from_numpy(f[band])), -1).numpy()
        guide = cv2.cvtColor(features.frames[i], cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        smooth = np.stack([_guided(guide, p[..., c], 2, 1e-3) for c in range(4)], -1)
        p = np.maximum(np.where(band[..., None], smooth, p), 1e-4)
        probabilities[i] = p / p.sum(-1, keepdims=True)


def _guided(guide: np.ndarray, x: np.ndarray, r: int, eps: float) -> np.ndarray:
    """Guided filter (He et al., TPAMI 2013, eq. 5-6 and 8)."""
    box = lambda a: cv2.blur(a, (2 * r + 1, 2 * r + 1))  # noqa: E731
    mg, mx = box(guide), box(x)
    a = (box(guide * x) - mg * mx) / (box(guide * guide) - mg * mg + eps)
    return box(a) * guide + box(mx - a * mg)


def _confident(i, p, features, rng, per_class: int = 300):
    label = p.argmax(-1)
    top = p.max(-1)
    f = features(i).reshape(-1, len(features(i)[0, 0]))
    xs, ys = [np.zeros((0, f.shape[-1]), np.float32)], [np.zeros(0, int)]
    for c in range(4):
        at = np.flatnonzero(ndimage.binary_erosion(label == c, iterations=2) & (top > 0.85))
        if len(at):
            at = rng.choice(at, min(per_class, len(at)), replace=False)
            xs.append(f[at])
            ys.append(np.full(len(at), c))
    return np.concatenate(xs), np.concatenate(ys)
