"""Crops, their cameras and the way back: exact geometry, whatever the side, place, size and turn."""

from __future__ import annotations

import math

import pytest
import torch

from handhold.geometry import rigid
from handhold.hand.model import HandModel, mirror_points, mirror_pose
from handhold.regressors import crops as C
from synth_hands import hand_batch, hand_truth, make_K, project, random_rotations, spots

pytestmark = pytest.mark.usefixtures("one_thread")
HAND = HandModel.open("right")


def exact(crops: C.HandCrops, trust: float = 0.0) -> C.HandPrediction:
    """What a perfect network says of crops with truth."""
    t = crops.truth
    sigma = torch.ones(t.points.shape[:2])
    return C.to_camera(crops, t.joints, t.vertices, t.points, sigma, t.rotations, t.betas, HAND, trust)


def check(prediction: C.HandPrediction, truth, rows=slice(None), atol=2e-5) -> None:
    for name in ("rotations", "betas", "transl", "joints", "vertices"):
        torch.testing.assert_close(getattr(prediction, name)[rows], getattr(truth, name), atol=atol, rtol=0)
    torch.testing.assert_close(prediction.points[rows], truth.points, atol=5e-3, rtol=0)


def test_truth_in_crops_is_a_right_hand_seen_by_the_crop_camera():
    crops = C.hand_crops(hand_batch(3), torch.Generator().manual_seed(0))
    t = crops.truth
    assert crops.flipped.tolist() == [False] * 3 + [True] * 3
    posed = HAND.with_shape(t.betas).with_pose(t.rotations, t.transl)
    torch.testing.assert_close(posed.vertices, t.vertices, atol=1e-5, rtol=0)
    torch.testing.assert_close(posed.joints, t.joints, atol=1e-5, rtol=0)
    torch.testing.assert_close(C.project(t.joints, crops.K), t.points, atol=1e-2, rtol=0)
    assert torch.allclose(torch.linalg.det(t.rotations), torch.ones(6, 16), atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
def test_there_and_back(affine):
    batch = hand_batch(3, seed=1)
    crops = C.hand_crops(batch, torch.Generator().manual_seed(1), affine=affine, size=(256, 192))
    prediction = exact(crops)
    check(prediction, batch.right, slice(0, 3))
    check(prediction, batch.left, slice(3, 6))


def test_the_picture_shows_what_the_cameras_say():
    """A spot at every joint is found where the truth says, in crops with jitter, mirrored or not."""
    batch = hand_batch(2, seed=2)
    jitter = C.CropJitter(scale=0.1, shift=0.05, angle=40.0)
    for affine in (False, True):
        crops = C.hand_crops(batch, torch.Generator().manual_seed(2), jitter, affine=affine)
        here = crops.truth.points
        at = C.apply(torch.linalg.inv(crops.crop_from_image), here) - 0.5
        inside = ((at > 6) & (at < at.new_tensor([319 - 6, 239 - 6]))).all(-1) & ((here > 8) & (here < 216)).all(-1)
        assert inside.sum() > 40
        grid = (2 * here / 224 - 1)[:, :, None]
        got = torch.nn.functional.grid_sample(crops.image, grid, align_corners=False)[..., 0]
        grid = (2 * (at + 0.5) / at.new_tensor([320, 240]) - 1)[:, :, None]
        want = torch.nn.functional.grid_sample(batch.image[crops.picture], grid, align_corners=False)[..., 0]
        assert ((got - want).abs().amax(1) * inside).max() < 0.06


def one_hand(rotations, betas, wrist, side="right", focal=400.0, width=320, height=240, sigma=3.0):
    """Crop of one exactly boxed hand."""
    K = make_K(1, width, height, focal)
    truth = hand_truth(side, rotations, betas, wrist, K, width, height)
    image = spots(truth.points, width, height, sigma)
    cut = C.crop_hands(image, K, C.box_of_points(truth.points), [side == "left"])
    return cut.with_truth(truth), truth


def pose(seed):
    g = torch.Generator().manual_seed(seed)
    return random_rotations(1, g), torch.randn(1, 10, generator=g)


def test_equivariant_to_place_in_the_picture():
    """The camera turns: the hand moves across the picture, and its crop stays what it was, up to a small roll."""
    rotations, betas = pose(3)
    wrist = torch.tensor([[0.0, 0.0, 0.6]])
    turn = rigid.so3_exp(torch.tensor([0.12, -0.15, 0.0]))
    moved = rotations.clone()
    moved[:, 0] = turn @ rotations[:, 0]
    a, truth_a = one_hand(rotations, betas, wrist)
    b, truth_b = one_hand(moved, betas, wrist @ turn.T)
    assert (truth_a.points - truth_b.points).norm(dim=-1).min() > 50
    # a network that says the same of both crops
    roll = rigid.geodesic(a.truth.rotations[:, 0], b.truth.rotations[:, 0])
    assert torch.rad2deg(roll) < 6  # an affine crop leaves the whole turn: 11 degrees
    assert (a.truth.points - b.truth.points).norm(dim=-1).max() < 12
    check(exact(a), truth_a)
    check(exact(b), truth_b)
    assert (a.image - b.image).abs().mean() < 0.05


def test_equivariant_to_scale():
    """A picture of twice the resolution, or a camera of twice the focal length: the same crop, the same hand."""
    rotations, betas = pose(4)
    wrist = torch.tensor([[0.05, 0.02, 0.8]])
    a, truth = one_hand(rotations, betas, wrist, focal=400.0)
    b, _ = one_hand(rotations, betas, wrist, focal=800.0, width=640, height=480, sigma=6.0)
    torch.testing.assert_close(a.truth.points, b.truth.points, atol=1e-2, rtol=0)
    torch.testing.assert_close(a.K, b.K, atol=1e-2, rtol=1e-4)
    assert (a.image - b.image).abs().max() < 0.06
    torch.testing.assert_close(exact(b).vertices, truth.vertices, atol=2e-5, rtol=0)


def test_equivariant_to_in_plane_rotation():
    """The camera rolls by a quarter: the crop rolls, and the cameras say by how much."""
    rotations, betas = pose(5)
    wrist = torch.tensor([[0.06, -0.03, 0.6]])
    roll = C.turns(torch.tensor([math.pi / 2]))[0]
    turned = rotations.clone()
    turned[:, 0] = roll @ rotations[:, 0]
    a, _ = one_hand(rotations, betas, wrist, width=300, height=300)
    b, truth_b = one_hand(turned, betas, wrist @ roll.T, width=300, height=300)
    assert (torch.rot90(a.image, -1, (2, 3)) - b.image).abs().max() < 2e-3
    torch.testing.assert_close(b.truth.joints, a.truth.joints @ roll.T, atol=1e-5, rtol=0)
    check(exact(b), truth_b)


def test_equivariant_to_mirroring():
    """A mirrored picture of a right hand, called left: the very same crop; results are mirrored."""
    rotations, betas = pose(6)
    wrist = torch.tensor([[0.06, -0.03, 0.6]])
    a, truth = one_hand(rotations, betas, wrist)
    mirrored = rigid.so3_exp(mirror_pose(rigid.so3_log(rotations)))
    b, truth_left = one_hand(mirrored, betas, mirror_points(wrist), side="left")
    assert (a.image - b.image).abs().max() < 1e-3
    torch.testing.assert_close(a.truth.rotations, b.truth.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.truth.vertices, b.truth.vertices, atol=1e-5, rtol=0)
    check(exact(b), truth_left)
    torch.testing.assert_close(mirror_points(exact(b).vertices), truth.vertices, atol=2e-5, rtol=0)


def test_angles_turn_the_content_upright():
    batch = hand_batch(4, seed=7)
    jitter = C.CropJitter(scale=0.0, shift=0.0, angle=0.0, upright=1.0)
    points = C.hand_crops(batch, torch.Generator().manual_seed(0), jitter).truth.points
    d = points[:, 9] - points[:, 0]
    up = torch.atan2(d[:, 0], -d[:, 1]).abs()
    assert (up[d.norm(dim=-1) > 20] < 0.1).all()
    box = C.box_of_points(points)
    assert ((box[:, :2] > 0) & (box[:, 2:] < 224)).all()


def test_boxes_fill_the_crop():
    crops = C.hand_crops(hand_batch(6, seed=8), None, jitter=None, margin=1.25)
    box = C.box_of_points(crops.truth.points)
    side = (box[:, 2:] - box[:, :2]).amax(-1)
    assert (side > 0.7 * 224).all() and (side < 0.9 * 224).all()
    assert ((box[:, :2] + box[:, 2:]) / 2 - 112).abs().max() < 12


@pytest.mark.parametrize("focal", [300.0, 900.0, 2500.0, 20000.0])
def test_translation_is_exact_at_any_focal_length(focal):
    g = torch.Generator().manual_seed(9)
    K = make_K(5, 640, 480, focal).double()
    posed = HAND.with_shape(torch.randn(5, 10, generator=g)).with_pose(random_rotations(5, g))
    t = torch.randn(5, 3, generator=g) * torch.tensor([0.05, 0.05, 0.1]) + torch.tensor([0, 0, focal / 700])
    joints, t = posed.joints.double(), t.double()
    points = project(joints + t[:, None], K)
    found = C.camera_translation(joints, points, K, torch.rand(5, 21, generator=g).double())
    torch.testing.assert_close(found, t, atol=1e-7, rtol=1e-7)
    single = C.camera_translation(joints.float(), points.float(), K.float())
    assert ((single - t).norm(dim=-1) / t[:, 2]).max() < 1e-3


def test_translation_under_noise_and_outliers():
    """One pixel of noise on 21 joints at a metre: a few per cent of depth; a joint of no weight has no say."""
    g = torch.Generator().manual_seed(10)
    n = 100
    K = make_K(n, 1280, 720, 1000.0)
    joints = HAND.with_shape(torch.zeros(n, 10)).with_pose(random_rotations(n, g)).joints
    t = torch.tensor([0.1, -0.05, 1.0]) - joints.mean(1)
    points = project(joints + t[:, None], K)
    noisy = points + torch.randn(points.shape, generator=g)
    assert (C.camera_translation(joints, noisy, K) - t)[:, 2].abs().median() < 0.01
    noisy[:, 3] += 300
    weights = torch.ones(n, 21)
    weights[:, 3] = 0
    assert (C.camera_translation(joints, noisy, K, weights) - t)[:, 2].abs().quantile(0.9) < 0.03
    trusted = C.camera_translation(joints, noisy, K, weights, trust=1.0, depth=t[:, 2])
    torch.testing.assert_close(trusted[:, 2], t[:, 2])


def test_downsampling_does_not_alias():
    """A checkerboard of single pixels, seen at an eighth of its resolution, is grey."""
    y, x = torch.meshgrid(torch.arange(1200), torch.arange(1200), indexing="ij")
    image = ((x + y) % 2).float().expand(1, 3, -1, -1)
    K = make_K(1, 1200, 1200, 1000.0)
    for affine in (False, True):
        crops = C.crop_hands(
            image, K, [[200.0, 200.0, 1000.0, 1000.0]], [True], size=(96, 96), margin=1.0, affine=affine
        )
        assert (crops.image - 0.5).abs().max() < 0.05
    crops = C.crop_hands(image, K, [[500.0, 500.0, 510.0, 510.0]], [False], size=(96, 96))
    assert crops.image.amax() > 0.9 and crops.image.amin() < 0.1  # enlarged: sharp


def test_outside_the_picture_is_black_and_uint8_is_the_same():
    image = (torch.rand(600, 800, 3, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    K = make_K(1, 800, 600, 800.0)[0]
    boxes = [[-200.0, -200.0, 200.0, 200.0], [300, 100, 700, 500], [640, 480, 680, 500]]
    crops = C.crop_hands(image.numpy(), K.numpy(), boxes, [False, True, False])
    again = C.crop_hands(image.permute(2, 0, 1)[None].float() / 255, K[None], boxes, [False, True, False])
    torch.testing.assert_close(crops.image, again.image, atol=1e-3, rtol=0)
    assert crops.image[0, :, :40, :40].abs().max() == 0
    assert len(C.crop_hands(image, K, torch.zeros(0, 4), [])) == 0


def test_hand_crops_is_repeatable_and_can_be_of_fixed_size():
    batch = hand_batch(3, seed=11)
    a, b = (C.hand_crops(batch, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.image, b.image) and torch.equal(a.truth.points, b.truth.points)
    some = C.hand_crops(batch, torch.Generator().manual_seed(5), count=4)
    assert len(some) == 4 and len({(int(p), bool(f)) for p, f in zip(some.picture, some.flipped, strict=True)}) == 4
    batch.right.present[:] = False
    batch.left.hidden[1:] = 1.0
    assert C.hand_crops(batch, None, jitter=None).picture.tolist() == [0]
    few = C.hand_crops(batch, None, jitter=None, count=3)
    assert few.picture.tolist() == [0, 0, 0] and few.truth.weight.tolist() == [1, 1, 1]
    batch.left.present[:] = False
    assert C.hand_crops(batch, None, jitter=None, count=2).truth.weight.tolist() == [0, 0]
    assert len(C.hand_crops(batch, None, jitter=None)) == 0


def test_recrop_looks_where_the_hand_was_seen():
    batch = hand_batch(2, seed=12)
    first = C.hand_crops(batch, torch.Generator().manual_seed(0), C.CropJitter(scale=0.5, shift=0.2))
    again = C.recrop(exact(first), batch.image, batch.K, upright=True)
    seen = C.apply(again.crop_from_image, exact(first).points)
    box = C.box_of_points(seen)
    assert ((box[:, :2] + box[:, 2:]) / 2 - 112).abs().max() < 25
    assert (seen[:, 9, 1] < seen[:, 0, 1] + 5).all()
