"""Invariants of the hand: kinematics, skinning, mirroring, sealing, inverse skinning."""

import numpy as np
import pytest
import torch

from handhold.geometry import meshes, rigid
from handhold.hand import HandModel, mirror_points, mirror_pose
from handhold.hand import joints as jt

F64 = torch.float64


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return HandModel.open(dtype=F64)


def correctives(hand: HandModel) -> HandModel:
    from dataclasses import replace

    gen = torch.Generator().manual_seed(0)
    return replace(hand, posedirs=1e-3 * torch.randn(len(hand.v_template), 3, 135, generator=gen, dtype=F64))


def random_pose(*batch: int, seed: int = 0, size: float = 0.4):
    gen = torch.Generator().manual_seed(seed)
    return size * torch.randn(*batch, 16, 3, generator=gen, dtype=F64), torch.randn(*batch, 3, generator=gen, dtype=F64)


def test_rest_pose_is_the_template(hand):
    posed = hand.with_shape().with_pose(torch.zeros(16, 3, dtype=F64))
    assert (posed.vertices - hand.v_template).abs().max() < 1e-12
    assert (posed.mano_joints - hand.J_regressor @ hand.v_template).abs().max() < 1e-12
    assert (hand.weights.sum(1) - 1).abs().max() < 1e-12


def test_global_motion_acts_from_outside(hand):
    theta, transl = random_pose()
    shaped = hand.with_shape(torch.randn(10, dtype=F64))
    G, T = rigid.so3_exp(torch.tensor([0.3, -1.0, 0.5], dtype=F64)), torch.tensor([0.1, 0.2, 0.3], dtype=F64)
    v = shaped.with_pose(theta, transl).vertices @ G.mT + T
    rot, j0 = hand.rotations(theta).clone(), shaped.rest_joints[0]
    rot[0] = G @ rot[0]
    assert (shaped.with_pose(rot, G @ (j0 + transl) + T - j0).vertices - v).abs().max() < 1e-12


def test_axis_angle_and_rotations_agree_and_batches_broadcast(hand):
    theta, transl = random_pose(4)
    betas = torch.randn(10, dtype=F64)
    posed = hand.with_shape(betas).with_pose(theta, transl)
    assert posed.vertices.shape == (4, 1609, 3) and posed.joints.shape == (4, 21, 3)
    assert posed.bone_transforms.shape == (4, 16, 4, 4)
    one = hand.with_shape(betas).with_pose(hand.rotations(theta[2]), transl[2])
    assert (one.vertices - posed.vertices[2]).abs().max() < 1e-12
    shapes = hand.with_shape(torch.randn(5, 1, 10, dtype=F64)).with_pose(theta, transl)
    assert shapes.vertices.shape == (5, 4, 1609, 3)
    assert (hand.rotations(hand.theta(hand.rotations(theta))) - hand.rotations(theta)).abs().max() < 1e-9


def test_joints_fast_path_equals_the_skinned_mesh(hand):
    for model in (hand, correctives(hand)):
        theta, transl = random_pose(3)
        shaped = model.with_shape(torch.randn(3, 10, dtype=F64))
        posed = shaped.with_pose(theta, transl)
        assert (
            shaped.joints(theta, transl)[:, list(jt.OPENPOSE_TIPS)] - posed.vertices[:, model.tip_ids]
        ).abs().max() < 1e-12
        ids = torch.tensor([5, 700, 1500])
        assert (shaped.skin(theta, transl, ids) - posed.vertices[:, ids]).abs().max() < 1e-12


def test_bones_keep_their_length_and_names_land_where_they_should(hand):
    theta, transl = random_pose(6)
    rest, posed = hand.with_shape().joints(torch.zeros(16, 3, dtype=F64)), hand.with_shape().joints(theta, transl)
    inner = [i for i in range(1, 21) if i not in jt.OPENPOSE_TIPS]

    def bone(j):
        return (j - j[..., list(jt.OPENPOSE_PARENTS), :])[..., inner, :].norm(dim=-1)

    assert (bone(posed) - bone(rest)).abs().max() < 1e-12
    assert rest[4, 2] == rest[:, 2].max() and rest[20, 2] == rest[:, 2].min()  # thumb side +z, little finger -z
    assert int(rest[:, 0].argmin()) == 12  # the middle fingertip reaches farthest along -x
    assert [jt.OPENPOSE_NAMES[i] for i in (0, 1, 5, 20)] == ["wrist", "thumb1", "index1", "pinky_tip"]
    assert [jt.MANO_FROM_OPENPOSE[i] for i in jt.OPENPOSE_FROM_MANO] == list(range(21))


def test_positive_flexion_bends_towards_the_palm(hand):
    for side, model in (("right", hand), ("left", hand.mirrored())):
        for k in range(1, 16):
            theta = torch.zeros(16, 3, dtype=F64)
            theta[k] = 0.5 * model.joint_frames[k - 1, :, 0]
            finger = jt.FINGERS.index(jt.MANO_NAMES[k][:-1])
            tip = 4 + 4 * finger
            move = model.with_shape().joints(theta)[tip] - model.with_shape().joints(torch.zeros_like(theta))[tip]
            palm = torch.tensor([0.0, -1, 0] if finger else [0.0, 0, -1], dtype=F64)
            assert move @ palm > 0, (side, jt.MANO_NAMES[k])


def test_left_is_the_mirror_exactly_and_stays_closed(hand):
    for model in (hand, correctives(hand)):
        theta, transl = random_pose()
        betas = torch.randn(10, dtype=F64)
        before = model.v_template.clone()
        left = model.mirrored()
        a = model.with_shape(betas).with_pose(theta, transl)
        b = left.with_shape(betas).with_pose(mirror_pose(theta), mirror_points(transl))
        assert (mirror_points(a.vertices) - b.vertices).abs().max() < 1e-14
        assert (mirror_points(a.joints) - b.joints).abs().max() < 1e-14
        assert torch.equal(model.v_template, before) and left.side == "left" and left.name == "open_hand_left"
        assert meshes.volume(b.model.sealed().v_template, b.model.sealed().faces) > 0
        again = left.mirrored()
        assert torch.equal(again.v_template, model.v_template) and torch.equal(again.faces, model.faces)


def test_sealed_hand_is_watertight_with_the_same_surface(hand):
    sealed = hand.sealed()
    assert meshes.is_watertight(sealed.faces) and not meshes.is_watertight(hand.faces)
    assert meshes.euler_characteristic(sealed.faces) == 2
    assert 1e-4 < float(meshes.volume(sealed.v_template, sealed.faces)) < 6e-4
    theta, transl = random_pose()
    betas = torch.randn(10, dtype=F64)
    a, b = hand.with_shape(betas).with_pose(theta, transl), sealed.with_shape(betas).with_pose(theta, transl)
    assert (a.vertices - b.vertices[: len(a.vertices)]).abs().max() < 1e-12
    assert (a.joints - b.joints).abs().max() < 1e-12


def test_gradients_match_finite_differences(hand):
    theta, transl = random_pose()
    betas = torch.randn(10, dtype=F64)
    ids, model = torch.tensor([3]), correctives(hand)

    def f(b, th, t):
        posed = model.with_shape(b).with_pose(th, t)
        return torch.cat([posed.skin(ids), posed.joints[8:9]])

    args = tuple(x.requires_grad_() for x in (betas, theta, transl))
    assert torch.autograd.gradcheck(f, args, eps=1e-6, atol=1e-6)


def test_gradients_are_finite_at_the_rest_pose_in_float32():
    model = HandModel.open()
    theta = torch.zeros(2, 16, 3, requires_grad=True)
    model.with_shape().with_pose(theta).vertices.square().sum().backward()
    assert torch.isfinite(theta.grad).all() and theta.grad.abs().max() > 0


def test_surface_points_unpose_to_their_rest_place(hand):
    theta, transl = random_pose(size=0.25)
    posed = hand.with_shape(torch.randn(10, dtype=F64)).with_pose(theta, transl)
    points, face, bary = meshes.sample_surface(posed.vertices, hand.faces, 300, torch.Generator().manual_seed(0))
    u = posed.unpose(points)
    want = meshes.interpolate(posed.rest_vertices, hand.faces, face, bary)
    assert (
        (u.points - want).norm(dim=-1) < 1e-9
    ).double().mean() > 0.97  # the rest lie where fingers pass through each other
    assert (posed.repose(u) - points).abs().max() < 1e-12
    assert u.distance.max() < 1e-9 and (u.weights.sum(-1) - 1).abs().max() < 1e-9


def test_unpose_and_repose_are_inverse_off_the_surface_too(hand):
    theta, transl = random_pose(2, size=0.25)
    posed = hand.with_shape().with_pose(theta, transl)
    points = posed.vertices[:, ::40] + 0.01 * torch.randn(2, 41, 3, dtype=F64)
    u = posed.unpose(points)
    assert u.points.shape == points.shape and (posed.repose(u) - points).abs().max() < 1e-12
    rest = hand.with_shape().with_pose(torch.zeros(16, 3, dtype=F64))
    assert (rest.repose(rest.unpose(points[0] - transl[0])) - (points[0] - transl[0])).abs().max() < 1e-12


def test_unpose_gradient_is_the_inverse_of_the_blended_bones(hand):
    theta, transl = random_pose(size=0.2)
    posed = hand.with_shape().with_pose(theta, transl)
    point = posed.vertices[[800]] + 0.004
    u = posed.unpose(point)
    blended = torch.einsum("nj,jab->nab", u.weights, posed.bone_transforms[:, :3, :3])[0]
    J = torch.autograd.functional.jacobian(lambda p: posed.unpose(p).points, point)[0, :, 0]
    assert (J @ blended - torch.eye(3)).abs().max() < 1e-12
    theta.requires_grad_()
    hand.with_shape().with_pose(theta, transl).unpose(point).points.sum().backward()
    assert torch.isfinite(theta.grad).all() and theta.grad.abs().max() > 0


def test_fingertips_do_not_mix_fingers(hand):
    posed = hand.with_shape().with_pose(torch.zeros(16, 3, dtype=F64))
    tips = posed.joints[list(jt.OPENPOSE_TIPS)]
    u = posed.unpose(tips)
    for w, finger in zip(u.weights, jt.FINGERS, strict=True):
        own = [k for k, n in enumerate(jt.MANO_NAMES) if n.startswith(finger)]
        assert w[own].sum() > 0.99


def test_limits_are_zero_inside_and_push_back_outside(hand):
    theta = torch.zeros(16, 3, dtype=F64)
    assert hand.limit_loss(theta) == 0
    theta[1] = -1.2 * hand.joint_frames[0, :, 0]  # index bent backwards
    theta.requires_grad_()
    loss = hand.limit_loss(theta)
    loss.backward()
    assert loss > 0.1 and theta.grad[1] @ hand.joint_frames[0, :, 0] < 0
    spun = torch.zeros(2, 16, 3, dtype=F64)
    spun[:, 0] = 2.0  # turning the whole hand costs nothing
    assert (hand.limit_loss(spun) == 0).all()
    left = hand.mirrored()
    random, _ = random_pose(5, size=0.8)
    assert (left.limit_loss(mirror_pose(random)) - hand.limit_loss(random)).abs().max() < 1e-9


def test_mean_pose_conventions(hand):
    from dataclasses import replace

    mean = 0.2 * torch.randn(16, 3, dtype=F64, generator=torch.Generator().manual_seed(2))
    mean[0] = 0
    model = replace(hand, pose_mean=mean)
    assert (model.with_shape().with_pose(-mean).vertices - hand.v_template).abs().max() < 1e-12
    absolute = rigid.so3_exp(torch.zeros(16, 3, dtype=F64))
    assert (model.with_shape().with_pose(absolute).vertices - hand.v_template).abs().max() < 1e-12


def test_float32_and_misuse():
    model = HandModel.open("left")
    assert model.with_shape().with_pose(torch.zeros(16, 3)).vertices.dtype == torch.float32
    assert model.to(dtype=F64).v_template.dtype == F64
    with pytest.raises(ValueError, match="theta has shape"):
        model.with_shape().with_pose(torch.zeros(48))
    with pytest.raises(ValueError, match="betas"):
        model.with_shape(torch.zeros(11))
    with pytest.raises(ValueError, match="side"):
        HandModel.open("both")


def test_demo_truth_is_reproduced(hand):
    """The demo clip was rendered from this hand: its stored pose and betas must give its stored joints."""
    from importlib import resources

    with resources.files("handhold").joinpath("data/demo/gt.npz").open("rb") as f, np.load(f) as z:
        theta, betas, truth = (torch.as_tensor(z[k]).double() for k in ("right_pose", "betas", "right_joints"))
    joints = hand.with_shape(betas).joints(theta)
    _, r, t = rigid.umeyama(joints, truth[0], scale=False)
    assert (joints @ r.mT + t - truth[0]).abs().max() < 1e-6
