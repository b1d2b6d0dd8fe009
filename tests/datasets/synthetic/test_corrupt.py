"""Damage is of the stated amount, repeatable, and leaves the rest alone."""

from __future__ import annotations

import numpy as np
import pytest

from handhold.datasets.synthetic.corrupt import (
    Corruption,
    FrameCorruption,
    LandmarkCorruption,
    MaskCorruption,
    corrupt_frames,
    corrupt_landmarks,
    corrupt_masks,
    corrupt_sequence,
    degrade_mask,
)
from handhold.scene import HandEstimates, Landmarks, Sequence

F, H, W = 40, 90, 120


def landmarks(found=None, offset=0.0):
    rng = np.random.default_rng(3)
    points = rng.uniform(20, 80, (F, 21, 2)).astype(np.float32) + np.float32(offset)
    points3d = rng.normal(0, 0.05, (F, 21, 3)).astype(np.float32)
    confidence = np.ones(F, np.float32)
    lost = np.setdiff1d(np.arange(F), np.arange(F) if found is None else found)
    points[lost], points3d[lost], confidence[lost] = np.nan, np.nan, 0
    return Landmarks(points, points3d, confidence)


def hand_mask(scale=1.0):
    y, x = np.mgrid[:H, :W]
    palm = (x - 50) ** 2 + (y - 45) ** 2 < (22 * scale) ** 2
    finger = (abs(y - 40) < 6 * scale) & (x > 50) & (x < 50 + 45 * scale)
    return palm | finger


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def found(lm):
    return np.isfinite(lm.points).all((1, 2))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.75, 0.9, 0.97])
def test_mask_meets_its_iou(target):
    for scale in (0.4, 1.0):
        for seed in range(5):
            mask = hand_mask(scale)
            got = degrade_mask(mask, target, np.random.default_rng(seed))
            assert abs(iou(mask, got) - target) < 0.03
            assert got.dtype == bool and got.shape == mask.shape


def test_mask_grows_as_well_as_shrinks():
    mask = hand_mask()
    got = degrade_mask(mask, 0.75, np.random.default_rng(0))
    assert (got & ~mask).sum() > 20 and (mask & ~got).sum() > 20


def test_odd_masks():
    rng = np.random.default_rng(0)
    assert not degrade_mask(np.zeros((H, W), bool), 0.5, rng).any()
    full = np.ones((H, W), bool)
    assert abs(iou(full, degrade_mask(full, 0.75, rng)) - 0.75) < 0.03
    dot = np.zeros((H, W), bool)
    dot[10:13, 10:14] = True
    assert abs(iou(dot, degrade_mask(dot, 0.75, rng)) - 0.75) < 0.05  # a pixel of 12 is 0.08
    assert (degrade_mask(dot, 1.0, rng) == dot).all()


def test_masks_of_a_clip():
    masks = np.stack([hand_mask(0.7 + 0.01 * f) for f in range(F)])
    masks[5] = False
    got, lost = corrupt_masks(masks, MaskCorruption(iou=0.75, spread=0.1, drop=0.25), 7, "object")
    assert lost.sum() == round(0.25 * (F - 1)) and not lost[5] and not got[5].any() and not got[lost].any()
    kept = [iou(masks[f], got[f]) for f in range(F) if f != 5 and not lost[f]]
    assert 0.62 < min(kept) and max(kept) < 0.88 and np.std(kept) > 0.02
    other, _ = corrupt_masks(masks, MaskCorruption(iou=0.75), 7, "right")
    assert (other != got).any()


def test_damage_is_coherent_in_time():
    masks = np.stack([hand_mask()] * F)
    rough, _ = corrupt_masks(masks, MaskCorruption(iou=0.8, coherence=0.0, leaks=0, holes=0), 1)
    calm, _ = corrupt_masks(masks, MaskCorruption(iou=0.8, coherence=0.95, leaks=0, holes=0), 1)
    change = lambda m: (m[1:] != m[:-1]).mean()  # noqa: E731
    assert change(calm) < 0.7 * change(rough)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.33, 1.0])
def test_shares_of_landmarks_are_exact(share):
    some = {"right": landmarks(np.arange(30)), "left": landmarks(offset=500)}
    got = corrupt_landmarks(some, LandmarkCorruption(drop=share), 1)
    for side, was in some.items():
        assert found(got[side]).sum() == found(was).sum() - round(share * found(was).sum())
        assert (np.isfinite(got[side].points3d).all((1, 2)) == found(got[side])).all()
        assert ((got[side].confidence > 0) == found(got[side])).all()
    got = corrupt_landmarks(some, LandmarkCorruption(outliers=share, outlier_px=50), 1)
    for side, was in some.items():
        far = np.linalg.norm(got[side].points - was.points, axis=-1)[found(was)]
        assert (far > 1).sum() == round(share * far.size)
        assert ((far < 1) | ((far > 49.9) & (far < 100.1))).all()
    got = corrupt_landmarks(some, LandmarkCorruption(swap=share), 1)
    taken = np.nan_to_num(got["left"].points[:, 0, 0], nan=-1.0) < 300  # the left hand is far to the right
    assert taken.sum() == round(share * F)


def test_swapping_a_lone_hand_moves_it_to_the_other_side():
    got = corrupt_landmarks({"right": landmarks()}, LandmarkCorruption(swap=0.25), 2)
    assert found(got["right"]).sum() == 30 and found(got["left"]).sum() == 10
    assert (found(got["right"]) ^ found(got["left"])).all()


def test_jitter_has_its_size():
    lm = landmarks()
    got = corrupt_landmarks({"right": lm}, LandmarkCorruption(jitter=3.0, jitter3d=0.01), 5)["right"]
    assert abs(np.std(got.points - lm.points) - 3) < 0.2
    assert abs(np.std(got.points3d - lm.points3d) - 0.01) < 0.001


def test_frames():
    rng = np.random.default_rng(0)
    frames = rng.integers(60, 190, (F, H, W, 3)).astype(np.uint8)
    same = corrupt_frames(frames, FrameCorruption(), 1)
    assert (same == frames).all() and same is not frames
    got = corrupt_frames(frames, FrameCorruption(duplicate=0.2), 1)
    assert sum((got[f] == got[f - 1]).all() for f in range(1, F)) == 8
    got = corrupt_frames(frames, FrameCorruption(exposure=0.3, stops=1), 1)
    assert sum((a != b).any() for a, b in zip(got, frames, strict=True)) == 12
    got = corrupt_frames(frames, FrameCorruption(blur=0.5, blur_px=9), 1)
    spread = got.reshape(F, -1).std(1)
    assert (spread < 0.7 * frames.std()).sum() == 20 and abs(got.mean() - frames.mean()) < 1
    got = corrupt_frames(frames, FrameCorruption(noise=5), 1)
    assert abs(np.std(got.astype(float) - frames) - 5) < 0.3


def sequence():
    masks = {"right": np.stack([hand_mask()] * F), "object": np.stack([hand_mask(0.6)] * F)}
    frames = np.random.default_rng(0).integers(0, 255, (F, H, W, 3)).astype(np.uint8)
    estimate = [np.full((F, *shape), 0.5, np.float32) for shape in ((16, 3), (10,), (21, 3), (21, 2), (21,))]
    evidence = {"landmarks": {"right": landmarks()}, "regressed": {"right": HandEstimates(*estimate)}, "masks": masks}
    return Sequence(frames, np.arange(0, 2 * F, 2), 30.0, np.eye(3), "given", **evidence)


def test_sequence_stays_together_and_is_repeatable():
    c = Corruption(
        LandmarkCorruption(jitter=2, drop=0.2),
        MaskCorruption(iou=0.75, drop=0.1),
        FrameCorruption(drop=0.25, noise=3),
    )
    before = sequence()
    a, b = corrupt_sequence(before, c, 11), corrupt_sequence(before, c, 11)
    assert len(a) == 30 and len(a.indices) == 30 and set(a.indices) <= set(before.indices)
    assert a.landmarks["right"].points.shape == (30, 21, 2) and a.masks["object"].shape == (30, H, W)
    assert a.regressed["right"].joints.shape == (30, 21, 3)
    assert (a.mask_confidence["object"] == 0).sum() <= 4
    assert (a.frames == b.frames).all() and (a.masks["right"] == b.masks["right"]).all()
    np.testing.assert_array_equal(a.landmarks["right"].points, b.landmarks["right"].points)
    assert (corrupt_sequence(before, c, 12).frames[0] != a.frames[0]).any()
    assert "masks.iou 0.75" in a.notes[-1] and before.notes == ()


def test_one_damage_does_not_change_another():
    a = corrupt_sequence(sequence(), Corruption(masks=MaskCorruption(iou=0.8)), 4)
    c = Corruption(LandmarkCorruption(drop=0.5), MaskCorruption(iou=0.8), FrameCorruption(noise=2))
    assert (a.masks["object"] == corrupt_sequence(sequence(), c, 4).masks["object"]).all()


@pytest.mark.parametrize("bad", [-0.1, 1.5])
def test_shares_are_checked(bad):
    with pytest.raises(ValueError, match=r"\[0,1\]"):
        corrupt_sequence(sequence(), Corruption(LandmarkCorruption(drop=bad)), 0)
    with pytest.raises(ValueError, match=r"\[0,1\]"):
        degrade_mask(hand_mask(), bad, np.random.default_rng(0))
