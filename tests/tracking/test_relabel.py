"""What posed models say of pixels."""

import numpy as np
import pytest

from handhold.scene import Mesh, Sequence
from handhold.tracking.relabel import fused, model_prior, of_masks

SIZE, K = (128, 96), np.array([[120.0, 0, 64], [0, 120.0, 48], [0, 0, 1]])
RIGHT, LEFT, OBJECT, OTHER = 1, 2, 3, 4


def box(centre, half) -> Mesh:
    """An axis-aligned box, faces outward."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], float)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], np.int32)
    return Mesh((np.asarray(centre) + np.asarray(half) * corners).astype(np.float32), faces)


def hand_at(*centre, frames=1):
    b = box(centre, (0.06, 0.06, 0.01))
    return np.tile(b.vertices.astype(float), (frames, 1, 1)), b.faces


def label(p: np.ndarray, x: int, y: int) -> int:
    return int(p[:, y, x].argmax())


THING = box((0, 0, 0), (0.08, 0.08, 0.02))


def pose(z=0.5):
    out = np.eye(4)[None].copy()
    out[0, 2, 3] = z
    return out


@pytest.mark.parametrize(("depth", "expected"), [(0.4, RIGHT), (0.6, OBJECT)])
def test_the_nearer_of_hand_and_object_is_seen(depth, expected):
    p = model_prior(SIZE, K, {"right": hand_at(0, 0, depth)}, THING, pose())[0]
    np.testing.assert_allclose(p.astype(np.float32).sum(0), 1, atol=5e-3)
    assert label(p, 64, 48) == expected
    assert label(p, 4, 4) in (0, OTHER)
    assert p[LEFT].max() < 0.05  # there is no left hand


def test_each_hand_has_its_own_side():
    hands = {"right": hand_at(-0.15, 0, 0.5), "left": hand_at(0.15, 0, 0.5)}
    p = model_prior(SIZE, K, hands, None, np.full((1, 4, 4), np.nan))[0]
    assert label(p, 28, 48) == RIGHT
    assert label(p, 100, 48) == LEFT


def test_what_is_not_known_may_be_anywhere():
    lost = np.full((1, 8, 3), np.nan), THING.faces
    p = model_prior(SIZE, K, {"right": lost}, THING, np.full((1, 4, 4), np.nan))[0].astype(np.float32)
    assert np.ptp(p, axis=(1, 2)).max() < 1e-3
    assert p[RIGHT].min() > 0.1 and p[OBJECT].min() > 0.1
    p = model_prior(SIZE, K, {"right": hand_at(-0.15, 0, 0.5), "left": lost}, None, np.full((1, 4, 4), np.nan))[0]
    assert label(p, 28, 48) == RIGHT
    assert p[LEFT, 48, 100] > 2 * p[RIGHT, 48, 100]  # a hand seen there is the other one


def test_a_hand_far_from_what_the_segmenter_calls_hand_wins_over_it():
    prior = model_prior(SIZE, K, {"right": hand_at(-0.15, 0, 0.6)}, THING, pose())
    seen = np.full((1, 5, 48, 64), 0.1, np.float16)
    seen[0, LEFT, 18:30, 26:40] = 0.6  # print on the object, taken for a left hand
    p = fused(prior, seen)[0]
    assert label(p, 64, 48) == OBJECT
    assert label(p, 32, 48) == RIGHT


def test_without_a_segmenter_masks_stand_in():
    masks = {"object": np.zeros((1, 96, 128), bool)}
    masks["object"][0, 34:62, 50:78] = True
    clip = Sequence(np.zeros((1, 96, 128, 3), np.uint8), np.arange(1), 15.0, K, "given", masks=masks)
    seen = of_masks(clip)
    np.testing.assert_allclose(seen.astype(np.float32).sum(1), 1, atol=5e-3)
    p = fused(model_prior(SIZE, K, {}, THING, pose()), seen)[0]
    assert label(p, 64, 48) == OBJECT and p[OBJECT, 48, 64] > 0.85  # enough for a seed
    assert label(p, 4, 4) == 0
