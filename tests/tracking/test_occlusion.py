"""What hands hide: solids in the object's frame and depths in the picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import trimesh

from handhold.scene import Mesh, Sequence
from handhold.tracking.occlusion import HandSolid, hand_depth, object_depth, raw_depth, widened
from solids import HEIGHT, WIDTH, K, around, sphere_depth

COUNT, CENTRE = 5, np.array([0.03, 0.0, 0.01])


def ball() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=3, radius=0.03)


def held() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A ball that rests at CENTRE in the object's frame: vertices (F,V,3) in the camera's frame, faces, poses."""
    poses, b = around(COUNT, 0.3), ball()
    x = b.vertices + CENTRE
    return np.einsum("fab,vb->fva", poses[:, :3, :3], x) + poses[:, None, :3, 3], np.asarray(b.faces), poses


def clip(mask: np.ndarray) -> Sequence:
    frames = np.zeros((COUNT, HEIGHT, WIDTH, 3), np.uint8)
    return Sequence(frames, np.arange(COUNT), 10.0, K, "given", masks={"right": mask})


def test_a_held_solid_has_its_signed_distance_in_the_objects_frame():
    vertices, faces, poses = held()
    poses[2] = np.nan
    vertices[3] = np.nan
    x = CENTRE + np.random.default_rng(0).normal(0, 0.02, (500, 3))
    found = HandSolid.of(vertices, faces, poses).distance(x)
    assert np.abs(found - (np.linalg.norm(x - CENTRE, axis=1) - 0.03)).max() < 0.003


def test_slip_in_few_frames_does_not_widen_a_solid():
    vertices, faces, poses = held()
    vertices[0] += [0.02, 0, 0]
    found = HandSolid.of(vertices, faces, poses).distance(CENTRE[None] + [[0.0, 0, 0], [0.045, 0, 0], [0, 0.045, 0]])
    assert np.allclose(found, [-0.03, 0.015, 0.015], atol=0.003)


def test_hand_depth_fills_the_mask_near_the_tracked_hand():
    vertices, faces, poses = held()
    true = np.stack([sphere_depth(p, 0.03, CENTRE) for p in poses])
    mask = widened(np.isfinite(true))
    assert mask.sum() > np.isfinite(true).sum() and mask[np.isfinite(true)].all()
    mask[:, 2:6, 2:6] = True  # skin far away from the tracked hand: nothing is known of its depth
    raw = raw_depth(clip(mask), {"right": (vertices, faces)})
    depth = hand_depth(clip(mask), raw)
    both = np.isfinite(true) & np.isfinite(raw)
    assert np.abs(raw[both] - true[both]).max() < 0.012
    far = np.zeros_like(mask)
    far[:, 2:6, 2:6] = True
    assert np.isinf(depth[~mask]).all() and np.isinf(depth[far]).all() and np.isfinite(depth[mask & ~far]).all()
    vertices[1] = np.nan
    assert np.isinf(raw_depth(clip(mask), {"right": (vertices, faces)})[1]).all()
    assert np.isinf(hand_depth(SimpleNamespace(masks={}, size=(WIDTH, HEIGHT)), raw)).all()


def test_object_depth_is_minus_infinity_where_the_pose_is_unknown():
    b, (_, _, poses) = ball(), held()
    poses[1] = np.nan
    mesh = Mesh(np.asarray(b.vertices + CENTRE, np.float32), np.asarray(b.faces, np.int32))
    depth = object_depth(mesh, clip(np.zeros((COUNT, HEIGHT, WIDTH), bool)), poses)
    assert np.isneginf(depth[1]).all()
    true = sphere_depth(poses[0], 0.03, CENTRE)
    both = np.isfinite(depth[0]) & np.isfinite(true)
    assert both.sum() > 200 and np.abs(depth[0][both] - true[both]).max() < 0.012
    nothing = Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32))
    assert np.isposinf(object_depth(nothing, clip(np.zeros((COUNT, HEIGHT, WIDTH), bool)), poses)[0]).all()
