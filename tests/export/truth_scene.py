"""A Scene made from the shipped demo's truth, so that what reads a Scene can be tested without the pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

import handhold.scene
from handhold.metrics import umeyama
from handhold.scene import Body, Mesh, Rigid, Scene, Sequence, Skinned

DATA = Path(handhold.scene.__file__).parent / "data"
SKINNED_JOINTS = np.array(
    [0, 13, 14, 15, 1, 2, 3, 4, 5, 6, 10, 11, 12, 7, 8, 9]
)  # of the 21, those that are model joints


def demo_truth() -> dict[str, np.ndarray]:
    with np.load(DATA / "demo" / "gt.npz", allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


def open_hand() -> dict[str, np.ndarray]:
    with np.load(DATA / "open_hand_right.npz", allow_pickle=False) as z:
        return {k: z[k] for k in z.files}


def shaped_hand(hand: dict[str, np.ndarray], betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rest vertices (V,3) and joints (16,3)."""
    rest = hand["v_template"].astype(float) + hand["shapedirs"].astype(float) @ betas
    return rest, hand["J_regressor"].astype(float) @ rest


def skin(rest, joints, weights, parents, pose, transl):
    """Linear blend skinning of one frame in plain loops: the specification the exporters are checked against."""
    frames = np.zeros((16, 4, 4))
    for j, p in enumerate(parents):
        local = np.eye(4)
        local[:3, :3] = Rotation.from_rotvec(pose[j]).as_matrix()
        local[:3, 3] = joints[j] if p < 0 else joints[j] - joints[p]
        frames[j] = local if p < 0 else frames[p] @ local
    moved = np.einsum("jab,jvb->jva", frames[:, :3, :3], rest[None] - joints[:, None]) + frames[:, None, :3, 3]
    return np.einsum("vj,jva->va", weights, moved) + transl


def truth_scene(gt: dict[str, np.ndarray], side: str = "right") -> Scene:
    """The demo's truth as a Scene: hand pose recovered from the truth's vertices, box coloured by position."""
    hand, count = open_hand(), len(gt["object_poses"])
    rest, joints = shaped_hand(hand, gt["betas"])
    parents = hand["kintree_table"][0]
    pose, transl = np.zeros((count, 16, 3)), np.zeros((count, 3))
    for f in range(count):
        pose[f] = gt["right_pose"]
        posed = skin(rest, joints, hand["weights"], parents, pose[f], transl[f])
        _, r, _ = umeyama(posed - joints[0], gt["right_vertices"][f].astype(float), scale=False)
        pose[f, 0] = (Rotation.from_matrix(r) * Rotation.from_rotvec(pose[f, 0])).as_rotvec()
        posed = skin(rest, joints, hand["weights"], parents, pose[f], transl[f])
        transl[f] = (gt["right_vertices"][f] - posed).mean(0)
    vertices, keypoints, faces = (
        gt["right_vertices"].copy(),
        gt["right_joints"].copy(),
        gt["right_faces"].astype(np.int32),
    )
    poses = gt["object_poses"].astype(np.float32)
    v, t = subdivided(gt["object_vertices"].astype(np.float32), gt["object_faces"].astype(np.int32), 2)
    unit = (v - v.min(0)) / np.ptp(v, axis=0)
    seen = np.ones(count, bool)
    reason = np.array(["landmarks"] * count)
    motion = Skinned(
        "open", pose.astype(np.float32), gt["betas"].astype(np.float32), transl.astype(np.float32), vertices, keypoints
    )
    bodies = {
        "right": Body(Mesh(vertices[0], faces), motion, seen, np.full(count, 0.9, np.float32), reason),
        "object": Body(
            Mesh(v, t, unit.astype(np.float32), v[:, 2] > -0.05),
            Rigid(poses),
            seen.copy(),
            np.linspace(1, 0.4, count).astype(np.float32),
            np.array(["sfm"] * count),
        ),
    }
    eye = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    scene = Scene(gt["K"], (480, 360), 15.0, np.arange(count), eye, bodies)
    return scene if side == "right" else mirrored(scene)


def mirrored(scene: Scene) -> Scene:
    """The scene in a mirror (x -> -x): the right hand becomes a left one."""
    flip = np.diag([-1.0, 1, 1, 1]).astype(np.float32)
    right, box = scene.bodies["right"], scene.bodies["object"]
    m = right.motion
    motion = Skinned(
        "open", m.pose * [1, -1, -1], m.betas, m.transl * [-1, 1, 1], m.vertices * [-1, 1, 1], m.joints * [-1, 1, 1]
    )
    left = replace(right, shape=Mesh(right.shape.vertices * [-1, 1, 1], right.shape.faces[:, ::-1]), motion=motion)
    shape = replace(box.shape, vertices=box.shape.vertices * [-1, 1, 1], faces=box.shape.faces[:, ::-1])
    box = replace(box, shape=shape, motion=Rigid(flip @ box.motion.world_from_body @ flip))
    return replace(scene, bodies={"left": left, "object": box})


def subdivided(vertices: np.ndarray, faces: np.ndarray, times: int) -> tuple[np.ndarray, np.ndarray]:
    """Each triangle cut in four, `times` times (vertices are not shared)."""
    for _ in range(times):
        a, b, c = (vertices[faces[:, k]] for k in range(3))
        ab, bc, ca = (a + b) / 2, (b + c) / 2, (c + a) / 2
        vertices = np.stack([a, ab, ca, ab, b, bc, ca, bc, c, ab, bc, ca], 1).reshape(-1, 3)
        faces = np.arange(len(vertices), dtype=np.int32).reshape(-1, 3)
    return vertices, faces


def with_gap(scene: Scene, name: str, frames: slice, reason: str = "not found") -> Scene:
    """The scene with one body lost over some frames."""
    body = scene.bodies[name]
    valid, confidence, why = body.valid.copy(), body.confidence.copy(), body.reason.astype("<U99")
    valid[frames], confidence[frames], why[frames] = False, 0, reason
    body = replace(body, valid=valid, confidence=confidence, reason=why)
    return replace(scene, bodies={**scene.bodies, name: body})


def demo_sequence(scene: Scene, gt: dict[str, np.ndarray], count: int | None = None) -> Sequence:
    """The demo clip decoded, with the truth's masks."""
    import av

    with av.open(str(DATA / "demo" / "video.mp4")) as clip:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in clip.decode(video=0)])[: count or len(scene.frames)]
    names = {"right": 1, "left": 2, "object": 3}
    masks = {n: gt["masks"][: len(frames)] == k for n, k in names.items() if n in scene.bodies}
    sure = {n: np.ones(len(frames), np.float32) for n in masks}
    return Sequence(
        frames, np.arange(len(frames)), scene.fps, scene.K, "given", "demo/video.mp4", masks=masks, mask_confidence=sure
    )


def few(scene: Scene, sequence: Sequence, count: int) -> tuple[Scene, Sequence]:
    """The first frames of a clip."""
    bodies = {}
    for name, b in scene.bodies.items():
        m = b.motion
        if isinstance(m, Skinned):
            motion = replace(m, **{k: getattr(m, k)[:count] for k in ("pose", "transl", "vertices", "joints")})
        else:
            motion = Rigid(m.world_from_body[:count])
        bodies[name] = Body(b.shape, motion, b.valid[:count], b.confidence[:count], b.reason[:count])
    scene = replace(scene, frames=scene.frames[:count], world_from_cam=scene.world_from_cam[:count], bodies=bodies)
    masks = {k: m[:count] for k, m in sequence.masks.items()}
    sure = {k: m[:count] for k, m in sequence.mask_confidence.items()}
    cut = {"frames": sequence.frames[:count], "indices": sequence.indices[:count]}
    return scene, replace(sequence, masks=masks, mask_confidence=sure, **cut)
