"""Masks of the hands and the object: a trained segmenter where there is one, background, colour, landmarks.

A static camera sees each background pixel with the same colour whenever nothing covers it, so the densest temporal mode
of a pixel is its background. What differs is hand, object, or everything else that moves (sleeve, arm, body). Landmarks
give clean seeds of each in the frames where the hand was found; a small per-clip pixel classifier learns colour and
local texture from those seeds and labels every frame, also those without landmarks. Probabilities are smoothed along
image edges and cleaned by connectivity. Nothing here is specific to an object.

Given the segmenter's probabilities, what it is sure of are the seeds, in every frame, and its answer is the prior of
the clip's own classifier, which knows the edges better. The background model has its say where the camera is static.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from ..parallel import each
from ..scene import Sequence
from ._mask_classifier import Features, label_all, redecide_edges, sampled, sure_labels, train
from ._mask_cleaning import HAND, OBJECT, clean
from ._mask_seeds import apparent_size, find_places, guess, on_skin, skin_color, with_network

STRIP = 24  # rows of the background estimated at a time: they fit the cache
WORK_SIDE = 512  # masks are computed at most this large and resampled by coverage


@dataclass(frozen=True)
class Background:
    """What a static camera sees behind everything that moves."""

    color: np.ndarray  # (H,W,3) float32 sRGB 0..255
    support: np.ndarray  # (H,W) float32, share of frames that agree with `color`; low where nearly always covered
    sigma: float  # noise of one frame, sRGB units


def estimate_background(frames: np.ndarray, candidates: int = 24, samples: int = 64) -> Background:
    """Densest temporal mode of every pixel. frames (F,H,W,3) uint8."""
    pick = frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), samples)).astype(int))]
    x = np.stack([cv2.GaussianBlur(f, (3, 3), 0) for f in pick])
    strips = [np.s_[r : r + STRIP] for r in range(0, x.shape[1], STRIP)]

    def quiet(strip: slice) -> np.ndarray:
        step = np.abs(np.diff(x[:, strip].astype(np.float32), axis=0)).max(-1)
        return np.percentile(step, 30, axis=0)

    # capped, because with a moving camera every change would pass for noise, and everything for background
    sigma = min(float(np.median(np.concatenate(each(quiet, strips)))) * 1.2 + 1.0, 12.0)
    kernel = np.float32(-0.5 / (3 * (2.0 * sigma) ** 2))
    tried = np.unique(np.linspace(0, len(x) - 1, min(len(x), candidates)).astype(int))
    found = each(lambda strip: _densest(x[:, strip], tried, kernel), strips)
    color, support = (np.concatenate(k) for k in zip(*found, strict=True))
    return Background(color, support / len(x), sigma)


def _densest(x: np.ndarray, tried: np.ndarray, kernel: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Densest mode (h,w,3) of each pixel of x (N,h,w,3), sought at the samples `tried`, and its density (h,w)."""
    x = np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32)  # planes: what a channel at a time is quick with
    away, alike = np.empty_like(x[0]), np.empty_like(x[0, 0])

    def likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        np.subtract(a, b, out=away)
        np.multiply(away, away, out=away)
        np.add(away[0], away[1], out=alike)
        np.add(alike, away[2], out=alike)
        np.multiply(alike, kernel, out=alike)
        return np.exp(alike, out=alike)

    best, mode = np.full_like(alike, -1.0), np.zeros_like(away)
    for middle in x[tried]:
        density = np.zeros_like(alike)
        for other in x:
            density += likeness(other, middle)
        better = density > best
        np.copyto(best, density, where=better)
        np.copyto(mode, middle, where=better)
    total, weight = np.zeros_like(mode), np.full_like(best, 1e-6)
    for other in x:
        w = likeness(other, mode)
        total += w * other
        weight += w
    return (total / weight).transpose(1, 2, 0), best


@dataclass(frozen=True, eq=False)
class Look:
    """What frames and landmarks say of a clip, whatever a segmenter or tracking finds: the start of `segment`."""

    frames: np.ndarray  # (F,H,W,3) uint8, at most `WORK_SIDE` large
    hands: dict[str, tuple[np.ndarray, np.ndarray]]  # side -> points (F,21,2) in their pixels, confidence (F,)
    hand_size: dict[str, np.ndarray]  # side -> (F,) pixels
    features: Features
    moving: bool  # the background is rarely the same: the camera moves, or is covered
    guesses: np.ndarray  # (F,H,W) int8, see `guess`


def look_at(sequence: Sequence, needed: bool, say: Callable[[float, str], None] = lambda share, what: None) -> Look:
    """needed: a background is asked for even where it hardly holds, as there is no segmenter to do without."""
    width, height = sequence.size
    scale = min(1.0, WORK_SIDE / max(width, height))
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
    moving = bool(known.mean() < 0.5)
    if moving and not needed:
        known[:] = False
    say(0.1, "seeds")
    features = Features(frames, background, known)
    hand_size = {s: apparent_size(p, c) for s, (p, c) in hands.items()}
    every = range(len(frames))
    places = each(lambda i: find_places(i, frames.shape[1:3], hands, hand_size), every)
    skin = skin_color(frames, features, places)

    def seeds(i: int) -> np.ndarray:
        place = places[i]
        if place is not None and skin is not None and on_skin(place, features, skin, i) <= 0.4:
            place = None  # landmarks that do not lie on skin are wrong, and so is all that is learned around them
        return guess(i, features, place, skin)

    return Look(frames, hands, hand_size, features, moving, np.stack(each(seeds, every)))


def segment(
    sequence: Sequence,
    progress: Callable[[float, str], None] | None = None,
    seed: int = 0,
    probabilities: np.ndarray | None = None,
    sides_known: bool = False,
    look: Look | None = None,
) -> Sequence:
    """Add masks "right"/"left" (the sides with landmarks), "object" and "other" (what else moves: sleeve, arm, body),
    with a confidence per frame and mask.

    probabilities: (F,5,h,w) of background, right, left, object, forearm from `regressors.segment_clip`, of any size.
    sides_known: they tell right from left (`relabel`), which a network alone hardly does. look: `look_at` of the
    sequence, if that was done already.
    Without them, frames must come from a static camera for the background model to hold; where the background explains
    less than it should, confidences fall and a note says so. Deterministic for a given seed.
    """
    say = progress or (lambda share, what: None)
    look = look_at(sequence, probabilities is None, say) if look is None else look
    frames, features = look.frames, look.features
    size = frames.shape[2], frames.shape[1]
    network, share = (None, None) if probabilities is None else _of_four(probabilities, size)
    say(0.2, "what looks like what")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    every = range(len(frames))
    labels = list(look.guesses)
    if network is not None:
        labels = each(lambda i: with_network(labels[i], i, network, features), every)
    x, y = sampled(labels, features, rng, 500)
    notes = list(sequence.notes)
    if (y == HAND).sum() < 200 or (y == OBJECT).sum() < 200:
        if network is not None:
            notes.append("masks: the segmenter found no hand that holds something; landmarks and motion had to do")
            without = sequence.with_evidence(notes=tuple(notes))
            return segment(without, lambda part, what: say(0.2 + 0.8 * part, what), seed)
        notes.append("masks: too little of the hand or object was found to learn their colours")
    if network is None:
        (model,) = train(x, y, rng, features.n_background, [np.s_[:]])
        say(0.3, "labels")
        labelled = label_all(model, features, frames)
        # Second round: the classifier's own sure, spatially consistent labels cover all frames and join the seeds.
        more = sampled(each(lambda i: sure_labels(labelled[i]), every), features, rng, 300)
        x, y = (np.concatenate(k) for k in zip((x, y), more, strict=True))
    model, fine = train(x, y, rng, features.n_background, [np.s_[:], features.fine])
    say(0.6, "labels")
    labelled = label_all(model, features, frames, network)
    say(0.8, "edges")
    redecide_edges(labelled, fine, features, network)
    say(0.9, "clean")
    masks, confidence = clean(labelled, features, look.hands, look.hand_size, share, sides_known)
    width, height = sequence.size
    if size != (width, height):
        masks = {
            k: np.stack(
                [cv2.resize(f.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) > 0.5 for f in m]
            )
            for k, m in masks.items()
        }
    if look.moving and network is None:
        notes.append("masks: the background is rarely visible or the camera moves; masks are uncertain")
        confidence = {k: c * 0.5 for k, c in confidence.items()}
    say(1.0, "masks")
    return sequence.with_evidence(masks=masks, mask_confidence=confidence, notes=tuple(notes))


def _of_four(probabilities: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The segmenter's (F,5,h,w) as background, hand, object, other (F,H,W,4) float16 of size (W,H), and the share of
    the right hand in the hands (F,H,W) float16."""
    four = np.empty((len(probabilities), size[1], size[0], 4), np.float16)
    share = np.empty(four.shape[:3], np.float16)
    for i, p in enumerate(probabilities):
        p = np.ascontiguousarray(p.transpose(1, 2, 0), np.float32)
        if (p.shape[1], p.shape[0]) != size:
            p = cv2.resize(p, size, interpolation=cv2.INTER_LINEAR)
        right, left = p[..., 1], p[..., 2]
        four[i] = np.stack([p[..., 0], right + left, p[..., 3], p[..., 4]], -1)
        share[i] = (right + 1e-3) / (right + left + 2e-3)
    return four, share
