"""The background behind what moves, and masks of a drawn hand that carries a disc."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import pytest
import torch

from handhold.geometry.cameras import default_K
from handhold.scene import Landmarks, Sequence
from handhold.tracking import masks
from handhold.tracking._mask_classifier import train
from handhold.tracking._mask_cleaning import _named_as_landmarks, _owned, _shared_out
from handhold.tracking.masks import estimate_background, segment

WIDTH, HEIGHT, COUNT = 160, 120, 20
SKIN, DISC = (214, 160, 132), (40, 90, 190)


def wall() -> np.ndarray:
    rng = np.random.default_rng(1)
    low = rng.uniform(90, 150, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.float32)
    return cv2.resize(low, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def noisy(picture: np.ndarray, rng) -> np.ndarray:
    return np.clip(picture + rng.normal(0, 2.0, picture.shape), 0, 255).astype(np.uint8)


def test_background_covered_most_of_the_time():
    """Something of ever other colours covers the middle in 60 % of the frames; the wall is still the densest mode."""
    rng, true = np.random.default_rng(0), wall()
    frames = []
    for i in range(40):
        picture = true.copy()
        if i % 5 < 3:
            picture[30:90, 40:120] = rng.uniform(0, 255, 3)
        frames.append(noisy(picture, rng))
    found = estimate_background(np.stack(frames))
    error = np.abs(found.color - true).max(-1)
    assert np.median(error[30:90, 40:120]) < 3 and np.quantile(error, 0.99) < 8
    assert np.median(found.support[30:90, 40:120]) < 0.6 < np.median(found.support[:25])
    assert 0.5 < found.sigma < 8


def hand_points(at: np.ndarray) -> np.ndarray:
    """(21,2): an open hand that points up, its wrist at `at`."""
    out = np.zeros((21, 2))
    out[1:5] = np.linspace([-7, -6], [-20, -22], 4)
    for f, (x, reach) in enumerate(zip((-9, -3, 3, 9), (40, 44, 42, 36), strict=True)):
        out[5 + 4 * f : 9 + 4 * f] = np.linspace([x, -22], [1.3 * x, -reach], 4)
    return out + at


def drawn() -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Frames, true masks and landmarks of a hand that carries a patterned disc about, with a dark sleeve behind it."""
    rng, back = np.random.default_rng(2), wall()
    frames, hands, discs, marks = [], [], [], []
    for i in range(COUNT):
        a = 2 * np.pi * i / COUNT
        at = np.array([80 + 45 * np.cos(a), 88 + 14 * np.sin(a)])
        p = hand_points(at)
        picture = back.copy()
        cv2.line(picture, *(tuple(int(v) for v in q) for q in (at + [0, 4], at + [0, 90])), (45, 45, 50), 22)
        hand = np.zeros((HEIGHT, WIDTH), np.uint8)
        for chain in ([0, 1, 2, 3, 4], *([0, *range(5 + 4 * f, 9 + 4 * f)] for f in range(4))):
            cv2.polylines(hand, [np.round(p[chain]).astype(np.int32)], False, 1, 6)
        cv2.fillConvexPoly(hand, np.round(p[[0, 5, 9, 13, 17]]).astype(np.int32), 1)
        disc = np.zeros_like(hand)
        cv2.circle(disc, tuple(int(v) for v in at + [0, -50]), 17, 1, -1)
        disc[hand > 0] = 0
        yy, xx = np.nonzero(disc)
        picture[hand > 0] = SKIN
        picture[yy, xx] = np.array(DISC) + 30 * ((xx - int(at[0])) // 5 % 2)[:, None]
        frames.append(noisy(picture, rng))
        hands.append(hand > 0)
        discs.append(disc > 0)
        marks.append(p)
    return np.stack(frames), {"right": np.stack(hands), "object": np.stack(discs)}, np.stack(marks).astype(np.float32)


def sequence(frames: np.ndarray, points: np.ndarray, confidence: np.ndarray) -> Sequence:
    unknown = np.full((*points.shape[:2], 3), np.nan, np.float32)
    marks = {"right": Landmarks(points, unknown, confidence)}
    return Sequence(frames, np.arange(len(frames)), 10.0, default_K(WIDTH, HEIGHT), "default", landmarks=marks)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.slow
def test_a_hand_and_its_disc_are_found_also_without_landmarks():
    frames, true, points = drawn()
    confidence = np.ones(COUNT, np.float32)
    confidence[[4, 11]] = 0
    points[[4, 11]] = np.nan
    told: list[float] = []
    s = segment(sequence(frames, points, confidence), lambda share, what: told.append(share))
    for name in ("right", "object"):
        assert s.masks[name].shape == (COUNT, HEIGHT, WIDTH) and s.masks[name].dtype == bool
        assert iou(s.masks[name], true[name]) > 0.8, name
        assert s.mask_confidence[name].shape == (COUNT,) and s.mask_confidence[name].min() >= 0
    assert not (s.masks["right"] & s.masks["object"]).any()
    for i in (4, 11):
        assert iou(s.masks["object"][i], true["object"][i]) > 0.7
    assert s.mask_confidence["right"][4] < s.mask_confidence["right"][5]
    assert not (s.masks["other"] & (s.masks["right"] | s.masks["object"])).any() and s.masks["other"][:, 112:].any()
    assert told == sorted(told) and told[-1] == 1.0 and not s.notes


def as_segmented(true: dict[str, np.ndarray], frames: np.ndarray, side: str = "right") -> np.ndarray:
    """(F,5,H,W): what a fair segmenter would say: soft edges, wrong blobs that come and go, the sleeve found."""
    rng = np.random.default_rng(5)
    sleeve = (np.abs(frames.astype(int) - (45, 45, 50)).max(-1) < 20) & ~true["right"] & ~true["object"]
    label = np.select([true["right"], true["object"], sleeve], [1 if side == "right" else 2, 3, 4], 0)
    out = np.empty((len(label), 5, HEIGHT, WIDTH), np.float16)
    for i in range(len(label)):
        x = np.stack([cv2.GaussianBlur((label[i] == c).astype(np.float32), (0, 0), 3.0) for c in range(5)], -1)
        noise = cv2.resize(rng.normal(0, 0.35, (8, 10, 5)).astype(np.float32), (WIDTH, HEIGHT))
        e = np.exp(5 * (x + noise))
        out[i] = (e / e.sum(-1, keepdims=True)).transpose(2, 0, 1)
    return out


@pytest.fixture
def quick(monkeypatch, one_thread):
    monkeypatch.setattr(masks, "train", functools.partial(masks.train, epochs=40))


@pytest.mark.parametrize(("camera", "side"), [("still", "left"), ("moves", "right")])
def test_a_segmenter_is_followed_and_its_edges_mended(quick, camera, side):
    """Also where its sides are not those of the landmarks, few of which are there, and where the background moves."""
    frames, true, points = drawn()
    frames, true, points = frames[::2], {k: m[::2] for k, m in true.items()}, points[::2]
    if camera == "moves":
        moving = np.stack([np.roll(wall(), 17 * i, axis=1) for i in range(len(frames))])
        still = np.abs(frames - wall()[None]).max(-1) < 12
        frames = np.where(still[..., None], np.clip(moving, 0, 255), frames).astype(np.uint8)
    said = as_segmented(true, frames, side)
    confidence = np.where(np.arange(len(frames)) % 3, 0, 1).astype(np.float32)
    points[confidence == 0] = np.nan
    s = segment(sequence(frames, points, confidence), probabilities=said[:, :, ::2, ::2] if side == "left" else said)
    channel = {"right": 1 if side == "right" else 2, "object": 3}
    for name in ("right", "object"):
        before, after = iou(said.argmax(1) == channel[name], true[name]), iou(s.masks[name], true[name])
        assert after > max(0.85, before) and before < 0.85, (name, before, after)
    assert set(s.masks) == {"right", "object", "other"} and not s.notes
    assert not (s.masks["right"] & s.masks["object"]).any() and s.masks["other"][:, 112:].any()
    assert all(0 <= c.min() and c.max() <= 1 for c in s.mask_confidence.values())


def test_a_segmenter_that_finds_nothing_is_left_out(quick):
    frames, _, points = drawn()
    given = sequence(frames[:4], points[:4], np.ones(4, np.float32))
    nothing = np.zeros((4, 5, HEIGHT, WIDTH), np.float16)
    nothing[:, 0] = 1
    told: list[float] = []
    s = segment(given, lambda share, what: told.append(share), probabilities=nothing)
    assert any("segmenter" in n for n in s.notes) and told == sorted(told)
    assert all(np.array_equal(s.masks[k], m) for k, m in segment(given).masks.items())


def test_a_hand_without_landmarks_is_not_part_of_the_other():
    """Two hands of skin, landmarks of one: the segmenter's sides keep them apart."""
    skin = np.zeros((60, 100), bool)
    skin[20:50, 10:40] = skin[20:50, 50:90] = True
    share = np.where(np.arange(100) < 45, 0.95, 0.05) * np.ones((60, 1))
    points = hand_points(np.array([25.0, 48])) * [1, 0.6] + [0, 20]
    kept = _owned(skin, {"right": points}, ["right"], {"right": 40.0}, {}, share)["right"]
    assert kept[20:50, 15:35].mean() > 0.6 and not kept[:, 50:].any()
    kept = _owned(skin, {"right": points}, ["right", "left"], {"right": 40.0, "left": 40.0}, {}, share)
    assert kept["left"][20:50, 52:90].all() and not (kept["left"] & kept["right"]).any()
    assert _owned(skin, {"right": points}, ["right"], {"right": 40.0}, {}, None)["right"][20:30, 60:90].all()


def test_sides_travel_both_ways_in_time():
    """Landmarks of the last frame name two hands in all frames before it."""
    skin = np.zeros((60, 100), bool)
    skin[20:50, 10:40] = skin[20:50, 60:90] = True
    last = {
        "right": hand_points(np.array([75.0, 48])) * [1, 0.6] + [0, 20],
        "left": hand_points(np.array([25.0, 48])) * [1, 0.6] + [0, 20],
    }
    size = {s: np.full(5, 40.0) for s in last}
    owned = _shared_out([skin] * 5, [{}, {}, {}, {}, last], ["right", "left"], size, None)
    for each in owned:
        assert each["right"][20:45, 62:88].all() and each["left"][20:45, 12:38].all()
        assert not (each["left"] & each["right"]).any()


def test_sides_that_landmarks_contradict_are_not_used():
    points = hand_points(np.array([50.0, 48])).astype(np.float32)[None]
    hands = {"right": (points, np.ones(1, np.float32))}
    share = np.full((1, 60, 100), 0.95, np.float16)
    assert np.array_equal(_named_as_landmarks(share, hands), share)
    assert np.array_equal(_named_as_landmarks(1 - share, hands), 1 - (1 - share))
    assert _named_as_landmarks(np.full_like(share, 0.6), hands) is None


def test_a_moving_camera_is_noticed(monkeypatch):
    monkeypatch.setattr(masks, "train", functools.partial(masks.train, epochs=20))  # labels do not matter here
    rng = np.random.default_rng(3)
    long = cv2.resize(rng.uniform(0, 255, (6, 40, 3)).astype(np.float32), (320, 48), interpolation=cv2.INTER_CUBIC)
    frames = np.stack([noisy(long[:, 30 * i : 30 * i + 64], rng) for i in range(8)])
    points = np.tile(hand_points(np.array([32.0, 46])).astype(np.float32), (8, 1, 1))
    s = segment(sequence(frames, points, np.ones(8, np.float32)))
    assert any("camera moves" in n for n in s.notes) and all((c <= 0.5).all() for c in s.mask_confidence.values())


def test_classifiers_trained_at_once_are_those_trained_one_by_one():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 400)
    x = (rng.normal(size=(400, 9)) + y[:, None]).astype(np.float32)
    choices = [np.s_[:], np.r_[0:2, 4:9]]

    def weights(*calls) -> list[torch.Tensor]:
        torch.manual_seed(0)
        chance = np.random.default_rng(1)
        nets = [n for columns in calls for n in train(x, y, chance, 3, columns, epochs=4)]
        return [w for n in nets for w in n.parameters()]

    at_once, apart = weights(choices), weights(choices[:1], choices[1:])
    assert all(torch.equal(a, b) for a, b in zip(at_once, apart, strict=True))
