"""Laws of generated scenes: truth agrees with itself, with the pictures, and with its arguments."""

import pytest
import torch

from handhold.datasets.synthetic import arms
from handhold.datasets.synthetic.objects import make_object_bank
from handhold.datasets.synthetic.sample import FOREARM, LEFT, OBJECT, RIGHT, SynthBatch
from handhold.datasets.synthetic.scenes import Synth, SynthConfig
from handhold.geometry import meshes
from handhold.hand.model import HandModel


@pytest.fixture(scope="module")
def synth():
    return Synth(SynthConfig(size=96, both=0.7, amodal=True), bank=make_object_bank(30, seed=0))


@pytest.fixture(scope="module")
def batch(synth):
    return synth.batch(3, 12)


def test_same_arguments_same_batch(synth, batch):
    again, other = synth.batch(3, 12), synth.batch(4, 12)
    assert torch.equal(again.image, batch.image) and torch.equal(again.right.joints, batch.right.joints)
    assert not torch.equal(other.right.joints, batch.right.joints)
    assert batch.image.min() >= 0 and batch.image.max() <= 1 and torch.isfinite(batch.image).all()


def test_splits_share_no_object(synth):
    rows = [set(range(*synth.objects_of(s))) for s in ("train", "val", "test")]
    assert sum(map(len, rows)) == len(set.union(*rows)) == len(synth.bank)


@pytest.mark.parametrize("side", ["right", "left"])
def test_parameters_give_the_surface_of_their_side(batch, side):
    hand, model = batch.hand(side), HandModel.open(side)
    assert hand.present.any()
    posed = model.with_shape(hand.betas).with_pose(hand.rotations, hand.transl)
    assert torch.allclose(posed.vertices[hand.present], hand.vertices[hand.present], atol=1e-5)
    assert torch.allclose(posed.joints[hand.present], hand.joints[hand.present], atol=1e-5)
    x = hand.joints[hand.present]
    pixel = torch.einsum("bij,bnj->bni", batch.K[hand.present], x / x[..., 2:])[..., :2]
    assert torch.allclose(pixel, hand.points[hand.present], atol=1e-2)


def test_labels_lie_within_amodal_masks_and_have_depth(batch):
    for label in (RIGHT, LEFT, OBJECT, FOREARM):
        seen = batch.labels == label
        assert not (seen & ~batch.amodal[:, label - 1]).any()
        assert (batch.depth[seen] > 0).all()
    assert not (batch.labels[~batch.object.present] == OBJECT).any()
    for side, label in (("right", RIGHT), ("left", LEFT)):
        assert not (batch.labels[~batch.hand(side).present] == label).any()


def test_hidden_share_agrees_with_the_masks(batch):
    for side, label in (("right", RIGHT), ("left", LEFT)):
        hand, amodal = batch.hand(side), batch.amodal[:, label - 1]
        area = amodal.sum((1, 2)).float()
        share = 1 - (batch.labels == label).sum((1, 2)) / area.clamp(min=1)
        large = hand.present & (area > 150)
        assert (hand.hidden - share)[large].abs().mean() < 0.12  # of vertices rather than pixels


def test_held_objects_touch_a_hand(synth):
    spec = synth.sample(12, synth.generator(8))
    mesh = synth.assemble(spec, synth._local(synth.generator(8)))
    held = spec.has_object & ~spec.bend & (spec.angle == 0)
    distance = torch.stack([torch.cdist(a, b).min() for a, b in zip(mesh.hands[:, 0], mesh.object, strict=True)])
    other = torch.stack([torch.cdist(a, b).min() for a, b in zip(mesh.hands[:, 1], mesh.object, strict=True)])
    assert (torch.minimum(distance, other)[held] < 0.015).all()  # to the nearest vertex


def test_rows_and_cat_are_inverse(batch):
    again = SynthBatch.cat([batch.rows(slice(0, 5)), batch.rows(slice(5, None))])
    assert torch.equal(again.labels, batch.labels) and torch.equal(again.left.contact, batch.left.contact)


def test_forearms_continue_the_wrist():
    hand = HandModel.open()
    ring = torch.as_tensor(meshes.boundary_loops(hand.faces)[0])
    spec = arms.sample_arms(5, torch.Generator().manual_seed(0))
    rest = hand.v_template[ring].expand(5, -1, 3)
    vertices, chart = arms.arm_vertices(spec, rest)
    faces, part = arms.arm_faces(len(ring))
    assert torch.allclose(vertices[:, : len(ring)], rest, atol=1e-3)
    assert vertices.shape == chart.shape and int(faces.max()) + 1 == vertices.shape[1]
    assert set(part.tolist()) == {0, 1, 2}
    along = vertices[:, : arms.RINGS * len(ring)].reshape(5, arms.RINGS, -1, 3).mean(2)
    assert (along[:, -1] - along[:, 0]).norm(dim=-1).sub(spec.length).abs().max() < 0.05
