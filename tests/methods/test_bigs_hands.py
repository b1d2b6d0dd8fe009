"""One canonical hand for both: laws of mirroring, sharing, skinning and smooth motion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from handhold.geometry.meshes import edges, is_watertight, subdivide
from handhold.geometry.rigid import so3_exp
from handhold.hand import HandModel
from handhold.hand.model import mirror_pose
from handhold.methods.bigs_decoders import Decoded, Explicit
from handhold.methods.bigs_hands import HandPoses, Template, rest_hand
from handhold.methods.bigs_losses import perceptual, swaying, turning
from handhold.render import splat

pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = np.zeros(10)
BOTH = {"right": BETAS, "left": BETAS}


@dataclass(frozen=True)
class Track:
    pose: np.ndarray
    betas: np.ndarray
    transl: np.ndarray
    confidence: np.ndarray


@pytest.fixture(scope="module")
def template():
    return Template.of(BOTH, levels=0)


def source(template, kind, bones=16):
    colors = torch.linspace(0.1, 0.9, len(template))[:, None].expand(-1, 3)
    if kind == "plain":
        return Explicit(colors, bones)
    x = template.canonical
    return Decoded(x, x.amin(0) - 0.01, x.amax(0) + 0.01, colors, bones, resolution=8, features=8)


def test_subdivision_keeps_vertices_and_quarters_faces():
    model = HandModel.open("right")
    v, f = len(model.v_template), model.faces.numpy()
    parents, finer = subdivide(f, v)
    assert len(finer) == 4 * len(f) and len(parents) == v + len(edges(f)[0])
    assert (parents[:v] == np.arange(v)[:, None]).all() and finer.max() == len(parents) - 1
    t = Template.of({"right": BETAS}, levels=1)
    assert torch.allclose(t.weights.sum(1), torch.ones(len(t)), atol=1e-5)
    assert torch.allclose(t.points["right"][:v], model.v_template, atol=1e-6)
    assert is_watertight(t.faces)


@pytest.mark.parametrize("kind", ["plain", "triplane"])
def test_values_start_where_the_mesh_is(template, kind):
    values = source(template, kind)()
    hand = rest_hand(template, values, "right", 1)
    assert torch.allclose(hand.gaussians.means, template.points["right"], atol=1e-6)
    assert torch.allclose(
        hand.gaussians.colors, torch.linspace(0.1, 0.9, len(template))[:, None].expand(-1, 3), atol=1e-5
    )
    assert torch.allclose(hand.weights, template.weights, atol=1e-4)


def test_the_left_hand_is_the_mirror_image_and_asking_twice_changes_nothing(template):
    values = source(template, "plain")()
    theta = 0.3 * torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    flip = torch.tensor([-1.0, 1.0, 1.0])
    posed = {}
    for side, pose in (("right", theta), ("left", mirror_pose(theta)), ("left", mirror_pose(theta))):
        bones = HandModel.open(side).with_shape().with_pose(pose).bone_transforms
        again = posed.get(side)
        posed[side] = rest_hand(template, values, side, 1).posed(bones)
        if again is not None:
            assert torch.equal(again[0].means, posed[side][0].means)
    (right, n_right), (left, n_left) = posed["right"], posed["left"]
    assert torch.allclose(right.means * flip, left.means, atol=1e-6)
    assert torch.allclose(n_right * flip, n_left, atol=1e-4)
    mirrored = torch.diag(flip) @ right.covariance() @ torch.diag(flip)
    assert torch.allclose(mirrored, left.covariance(), atol=1e-9)


def test_covariance_goes_through_the_whole_blended_matrix(template):
    hand = rest_hand(template, source(template, "plain")(), "right", 1)
    bones = HandModel.open("right").with_shape().with_pose(torch.full((16, 3), 0.3)).bone_transforms
    M = (hand.weights @ bones[:, :3, :3].reshape(16, 9)).reshape(-1, 3, 3)
    want = M @ hand.gaussians.covariance() @ M.mT
    assert torch.allclose(hand.posed(bones)[0].covariance(), want, atol=1e-9)


def test_normals_look_outward(template):
    hand = rest_hand(template, source(template, "plain")(), "left", 1)
    model = HandModel.open("left")
    g, normals = hand.posed(model.with_shape().with_pose(torch.zeros(16, 3)).bone_transforms)
    from handhold.geometry.meshes import vertex_normals

    want = vertex_normals(model.v_template, model.faces)
    assert ((normals[: len(want)] * want).sum(-1) > 0).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["plain", "triplane"])
def test_both_hands_teach_the_shared_tensors_in_one_step(template, kind):
    shared = source(template, kind)
    weight = {}
    for sides in (["right"], ["left"], ["right", "left"]):
        shared.zero_grad()
        values, parts = shared(), []
        for k, side in enumerate(sides):
            pose = HandModel.open(side).with_shape().with_pose(torch.zeros(16, 3), torch.tensor([0.1 * k, 0, 0.5]))
            parts.append(rest_hand(template, values, side, k).posed(pose.bone_transforms)[0])
        g = [torch.cat([getattr(p, n) for p in parts]) for n in ("means", "quats", "scales", "opacities", "colors")]
        out = splat(*g, torch.eye(4)[None], torch.tensor([[[60.0, 0, 24], [0, 60, 24], [0, 0, 1]]]), 48, 48)
        out.color.sum().backward()
        p = shared.color if kind == "plain" else shared.planes.planes
        weight[tuple(sides)] = 0.0 if p.grad is None else p.grad.norm().item()
    if kind == "triplane":  # the last layer starts at zero: the planes learn from the second step on
        weight = {k: 1.0 for k in weight} if shared.appearance[-1].weight.grad.norm() > 0 else weight
    assert min(weight.values()) > 0


def track(frames=5):
    pose = np.zeros((frames, 16, 3), np.float32)
    pose[:, 0, 1] = 0.1 * np.arange(frames)
    transl = np.stack([0.01 * np.arange(frames), np.zeros(frames), np.full(frames, 0.5)], -1).astype(np.float32)
    return Track(pose, BETAS, transl, np.ones(frames))


def test_poses_start_as_tracked_and_come_back_as_tracks():
    t = track()
    poses = HandPoses("right", t, [0, 1, 2, 3, 4])
    assert np.allclose(poses.result().pose, t.pose, atol=1e-6)
    with torch.no_grad():
        poses.turn[2][0] = torch.tensor([0.0, 0.05, 0.0])
        poses.shift[2][0] = 0.01
    after = poses.result()
    assert np.allclose(after.pose[2, 0], [0, 0.25, 0], atol=1e-5) and np.isclose(after.transl[2, 0], 0.03)
    assert np.allclose(after.pose[3], t.pose[3], atol=1e-6)


def test_a_constant_velocity_costs_nothing_and_only_motion_counts():
    poses = HandPoses("right", track(), [0, 1, 2, 3, 4])
    assert poses.unsteady(2).item() < 1e-6
    w = torch.tensor([0.3, -0.2, 0.9])
    r = [so3_exp(k * w) for k in range(3)]
    assert turning(*r) < 1e-9
    bent = [r[0], r[1] @ so3_exp(torch.tensor([0.1, 0, 0])), r[2]]
    turned = so3_exp(torch.tensor([1.0, 2.0, -0.5]))
    assert turning(*bent) > 1e-3
    assert torch.allclose(turning(*bent), turning(*(turned @ x for x in bent)), atol=1e-6)
    assert swaying(torch.zeros(3), torch.ones(3), 2 * torch.ones(3)) == 0


def test_perception_is_zero_for_the_same_picture():
    a, b, sure = torch.rand(8, 8, 3), torch.rand(8, 8, 3), torch.ones(8, 8, 1)
    network = lambda x: [x, torch.nn.functional.avg_pool2d(x, 2)]  # noqa: E731
    assert perceptual(network, a, a, sure) < 1e-9 < perceptual(network, a, b, sure)
