"""Laws of sampled grasps and free poses: they hold what they are given, and hands stay hands."""

import pytest
import torch

from handhold.datasets.synthetic.grasp_hand import grasp_hand, palm_axes
from handhold.datasets.synthetic.grasps import GRASPS, sample_grasps
from handhold.datasets.synthetic.objects import make_object_bank
from handhold.datasets.synthetic.poses import sample_betas, sample_free_poses
from handhold.geometry import rigid
from handhold.hand import joints as jt
from handhold.hand.model import HandModel

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return HandModel.open()


@pytest.fixture(scope="module")
def bank():
    return make_object_bank(40, seed=0)


@pytest.fixture(scope="module")
def held(hand, bank):
    index = torch.arange(80) % len(bank)
    return index, sample_grasps(hand, bank, index, torch.Generator().manual_seed(0))


def _within_limits(rotations: torch.Tensor, hand: HandModel) -> None:
    angle = jt.joint_angles(rigid.so3_log(rotations)[:, 1:], hand.joint_frames)
    limits = torch.tensor(jt.LIMITS)
    assert (angle > limits[..., 0] - 1e-3).all() and (angle < limits[..., 1] + 1e-3).all()
    assert torch.allclose(rotations[:, 0], torch.eye(3).expand(len(rotations), 3, 3))


def test_grasps_touch_and_hardly_sink_in(hand, bank, held):
    index, g = held
    assert (g.penetration < 3e-3).float().mean() > 0.88
    assert g.contact.any(1).float().mean() > 0.97
    v = hand.with_shape(g.betas).with_pose(g.rotations).vertices
    at = v @ g.object_from_hand[:, :3, :3].mT + g.object_from_hand[:, None, :3, 3]
    d = bank.signed_distance(index, at)
    assert torch.equal(d < 2e-3, g.contact) or ((d < 2e-3) != g.contact).float().mean() < 1e-3
    assert (g.penetration >= -d.amin(1) - 1e-5).all()


def test_gripping_fingers_end_on_the_surface(hand, bank, held):
    index, g = held
    known = grasp_hand(hand)
    owner = hand.weights.argmax(1)
    touching = torch.stack([(g.contact & torch.isin(owner, rows + 1)).any(1) for rows in known.rows], 1)
    assert touching[known.grips[g.kind]].float().mean() > 0.75
    assert touching[:, 0].float().mean() > 0.75


def test_rigid_within_limits_finite_and_varied(hand, held):
    _, g = held
    _within_limits(g.rotations, hand)
    r = g.object_from_hand[:, :3, :3]
    assert torch.allclose(r @ r.mT, torch.eye(3).expand_as(r), atol=1e-4) and (torch.linalg.det(r) > 0).all()
    assert torch.isfinite(g.object_from_hand).all()
    assert len(set(g.kind.tolist())) >= 6 and int(g.kind.max()) < len(GRASPS)


def test_same_generator_same_grasps(hand, bank):
    index = torch.arange(6)
    a, b = (sample_grasps(hand, bank, index, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a.rotations, b.rotations) and torch.equal(a.object_from_hand, b.object_from_hand)


def test_an_open_lid_is_out_of_the_hand(hand):
    bank = make_object_bank(6, seed=1, only=("hinged_box", "flip_phone"))
    index = torch.arange(6).repeat(5)
    angle = bank.hinge_range[index].sum(1) * 0.5
    g = sample_grasps(hand, bank, index, torch.Generator().manual_seed(0), angle)
    v = hand.with_shape(g.betas).with_pose(g.rotations).vertices
    at = v @ g.object_from_hand[:, :3, :3].mT + g.object_from_hand[:, None, :3, 3]
    deepest = -bank.signed_distance(index, at, angle).amin(1)
    assert (deepest <= g.penetration + 1e-5).all() and (g.penetration < 3e-3).float().mean() > 0.7


def test_left_hands_are_refused(hand, bank):
    with pytest.raises(ValueError, match="right"):
        sample_grasps(hand.mirrored(), bank, torch.arange(2))


def test_the_palm_looks_down_and_the_thumb_is_to_its_side(hand):
    joints = torch.cat([hand.joint_bases[0], hand.v_template[hand.tip_ids]])[None]
    _, facing, across = palm_axes(joints)
    assert facing[0, 1] < -0.9 and across[0, 2] > 0.9


def test_free_poses_are_within_limits_and_broad(hand):
    r = sample_free_poses(hand, 200, torch.Generator().manual_seed(0))
    _within_limits(r, hand)
    tips = hand.with_shape().with_pose(r).joints[:, list(jt.OPENPOSE_TIPS)]
    assert (tips.std(0).norm(dim=-1) > 0.02).all()
    again = sample_free_poses(hand, 200, torch.Generator().manual_seed(0))
    assert torch.equal(r, again)


def test_shapes_are_bounded():
    b = sample_betas(500, torch.Generator().manual_seed(0))
    assert b.shape == (500, 10) and b.abs().max() <= 3 and 0.9 < b.std() < 1.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_grasps_as_well(hand, bank):
    index = (torch.arange(80) % len(bank)).cuda()
    g = sample_grasps(hand.to(device="cuda"), bank.to("cuda"), index, torch.Generator("cuda").manual_seed(0))
    assert g.rotations.is_cuda and (g.penetration < 3e-3).float().mean() > 0.85
