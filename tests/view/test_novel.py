"""New pictures of a tiny scene, a hand before a box: what hides what, where it is, and how the hand is posed anew."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from handhold.errors import UnusableInput
from handhold.geometry.meshes import interpolate, sample_surface
from handhold.hand import HandModel
from handhold.hand.presets import PRESETS, preset
from handhold.scene import Scene
from handhold.view.novel import OUTPUTS, Camera, HandPose, actors, draw, has_splats, input_cameras, orbit_cameras
from tiny_scene import FRAMES, HAND_SPLATS, SIZE, K, made

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scene() -> tuple[Scene, dict]:
    return made()


@pytest.fixture(params=["splats", "meshes"])
def bodies(scene, request):
    """How to get the actors, drawn by either engine."""
    return lambda **kw: actors(scene[0], scene[1] if request.param == "splats" else None, **kw)


def test_what_hides_what(scene, bodies):
    camera = input_cameras(scene[0])[0]
    both = bodies()
    p = draw(both, 0, camera, OUTPUTS)
    hand, board = p.masks["right"], p.masks["object"]
    assert hand.sum() > 1000 and board.sum() > 1000 and not (hand & board).any()
    hidden = p.masks_alone["object"] & hand
    assert hidden.sum() > 1000 and (p.masks_alone["right"] == hand).mean() > 0.99
    # the board's front is at 0.55 m, the hand a decimetre nearer
    assert np.abs(p.depth[board] - 0.55).max() < 0.025 and np.median(np.abs(p.depth[board] - 0.55)) < 2e-3
    assert p.depth[hand].max() < 0.52 and (p.depth[~hand & ~board] == 0).all()
    assert np.median(np.abs(p.depth_alone["object"][hidden] - 0.55)) < 2e-3
    assert np.median(p.normals[board], axis=0) == pytest.approx([0, 0, -1], abs=0.05)
    assert np.median(p.color[board], axis=0).argmax() == 1 and np.median(p.color[hand], axis=0).argmax() == 0
    # without the hand, what it hid is seen
    q = draw(bodies(without=["right"]), 0, camera, OUTPUTS)
    assert set(q.masks) == {"object"} and (q.masks["object"] == p.masks_alone["object"]).mean() > 0.995
    assert np.median(q.color[hidden], axis=0).argmax() == 1
    # a frame without a hand has none
    r = draw(both, 2, camera, OUTPUTS)
    assert not r.masks["right"].any() and not r.depth_alone["right"].any()
    assert (r.masks["object"] == q.masks["object"]).mean() > 0.995


def test_both_engines_see_the_same(scene):
    for camera in (input_cameras(scene[0])[1], orbit_cameras(scene[0], 8)[3]):
        a, b = (draw(actors(*scene), 1, camera, OUTPUTS, splats=s) for s in (True, False))
        for name in a.masks:
            assert (a.masks[name] == b.masks[name]).mean() > 0.97
        both = (a.depth > 0) & (b.depth > 0)
        assert np.median(np.abs(a.depth - b.depth)[both]) < 2e-3
        assert np.median((a.normals * b.normals).sum(-1)[both]) > 0.9


def test_a_smaller_picture_shows_the_same(scene, bodies):
    small = draw(bodies(), 0, input_cameras(scene[0], (96, 72))[0], ("masks",))
    large = draw(bodies(), 0, input_cameras(scene[0])[0], ("masks",))
    for name, mask in small.masks.items():
        half = large.masks[name].reshape(72, 2, 96, 2).mean((1, 3)) > 0.5
        assert mask.shape == (72, 96) and (mask == half).mean() > 0.96


def test_splats_follow_the_mesh_through_a_new_pose(scene):
    model, before = HandModel.open("right"), actors(*scene)[0]
    f, generator = model.faces, torch.Generator().manual_seed(0)
    _, face, bary = sample_surface(model.with_shape().vertices, f, HAND_SPLATS, generator)  # as `discs` placed them
    for pose in ("open", "fist"):
        after = actors(*scene, poses=pose)[0]
        assert float(np.abs(after.vertices(0) - before.vertices(0)).max()) > 0.01
        off = after.gaussians(0).means - interpolate(torch.from_numpy(after.vertices(0)), f, face, bary)
        # blending matrices at a foot point and posing its triangle's corners differ where weights turn within it
        assert float(off.norm(dim=1).quantile(0.99)) < 0.001 and float(off.norm(dim=1).max()) < 0.004
    whole = HandPose(np.asarray(scene[0].bodies["right"].motion.pose), scene[0].bodies["right"].motion.transl)
    same = actors(*scene, poses={"right": whole})[0]
    assert np.allclose(same.vertices(1), before.vertices(1), atol=1e-6)
    assert torch.equal(same.gaussians(1).means, before.gaussians(1).means)


def test_fingers_alone_leave_the_wrist(scene):
    fingers = 0.3 * np.ones((15, 3), np.float32)
    a, b = actors(*scene)[0], actors(*scene, poses={"right": HandPose(fingers)})[0]
    assert torch.allclose(a.bones(1)[0], b.bones(1)[0]) and not torch.allclose(a.bones(1)[3], b.bones(1)[3])
    assert not b.valid[2]  # where the wrist is not known, no pose helps
    placed = HandPose(np.zeros((FRAMES, 16, 3)), np.float32([0, 0, 0.4]))
    assert actors(*scene, poses={"right": placed})[0].valid.all()


def test_presets_are_possible_and_alike_on_both_sides():
    right, left = HandModel.open("right"), HandModel.open("left")
    for name in PRESETS:
        assert float(right.limit_loss(preset(right, name))) == 0
        mirrored = left.with_shape().joints(preset(left, name)) * torch.tensor([-1.0, 1, 1])
        assert torch.allclose(right.with_shape().joints(preset(right, name)), mirrored, atol=1e-6)
    span = {n: right.with_shape().joints(preset(right, n))[[4, 8, 12, 16, 20]].std(0).norm() for n in PRESETS}
    assert span["fist"] < span["rest"] < span["open"]


def test_what_cannot_be_is_told(scene):
    whole, splats = scene
    with pytest.raises(UnusableInput, match="no 'left'; it has right and object"):
        actors(whole, splats, without=["left"])
    with pytest.raises(UnusableInput, match="A pose is"):
        actors(whole, splats, poses={"right": HandPose(np.zeros((FRAMES + 1, 16, 3)))})
    hand = whole.bodies["right"]
    foreign = replace(hand, motion=replace(hand.motion, model="mano_right"))
    other = replace(whole, bodies={"right": foreign})
    with pytest.raises(UnusableInput, match="only the built-in"):
        actors(other, splats, poses="open")
    cast = actors(other, splats)
    assert not has_splats(cast) and draw(cast, 0, input_cameras(other)[0], ("masks",)).masks["right"].any()


def test_an_empty_picture(scene, bodies):
    behind = Camera(K, np.diag([-1.0, 1, -1, 1]), SIZE)
    for cast, camera in ((bodies(), behind), (bodies(without=["right", "object"]), input_cameras(scene[0])[0])):
        p = draw(cast, 0, camera, OUTPUTS, background=(10, 20, 30))
        assert (p.color == [10, 20, 30]).all() and not p.alpha.any() and not p.depth.any() and not p.normals.any()
