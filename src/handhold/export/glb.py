"""`scene.glb`: the scene as one animated glTF 2.0 file that any viewer opens.

glTF is y-up with cameras that look along -z; ours are OpenCV (y down, z forward). The two differ by a half turn about
x, which is baked into the node transforms, so a static camera sits at the origin unrotated. Hands are skins with their
real joints and weights, the object is a moving node with vertex colours, time is seconds from the first frame. A body
that is not valid in a frame holds its last valid pose; `extras.valid` of its node says where.
Specification: Khronos, "glTF 2.0", https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from ..files import write_atomically
from ..hand import HandModel
from ..scene import SIDES, Mesh, Scene, Skinned
from .meshes import check_mesh, colors_u8, vertex_normals

HAND_COLORS = {"right": (232, 156, 122), "left": (118, 172, 228)}  # sRGB; the report and the preview use them too
HALF_TURN = np.diag([1.0, -1.0, -1.0, 1.0])  # gltf_from_opencv, and its own inverse
_TYPES = {"i1": 5120, "u1": 5121, "u2": 5123, "u4": 5125, "f4": 5126}


@dataclass(frozen=True)
class HandRig:
    """What a skinned hand needs besides its pose: the shaped hand at rest."""

    vertices: np.ndarray  # (V,3) rest vertices with the shape applied, metres
    joints: np.ndarray  # (16,3) rest joints, model order
    weights: np.ndarray  # (V,16) skinning weights, rows sum to 1
    parents: np.ndarray  # (16,) parent of each joint, -1 for the root, parents before children
    world_from_joint: np.ndarray | None = None  # (F,16,4,4) posed joint frames; from the scene's pose when not given


def hand_rig(model: HandModel, motion: Skinned) -> HandRig:
    """The rig of a hand in the scene, from the model its pose and betas belong to."""

    def tensor(x: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(x), dtype=model.dtype, device=model.device)

    with torch.no_grad():
        posed = model.with_shape(tensor(motion.betas)).with_pose(tensor(motion.pose), tensor(motion.transl))
        arrays = (posed.shaped.vertices, posed.shaped.rest_joints, model.weights, posed.bone_transforms)
        vertices, joints, weights, world_from_rest = (x.double().cpu().numpy() for x in arrays)
    rest_from_joint = np.tile(np.eye(4), (len(joints), 1, 1))
    rest_from_joint[:, :3, 3] = joints
    return HandRig(vertices, joints, weights, np.asarray(model.parents), world_from_rest @ rest_from_joint)


def joint_frames(rig: HandRig, pose: np.ndarray, transl: np.ndarray) -> np.ndarray:
    """Forward kinematics: (F,16,4,4) world_from_joint from pose (F,16,3) axis-angle and transl (F,3).

    Joint frames at rest have no rotation (MANO: Romero et al., SIGGRAPH Asia 2017, eq. 2-4).
    """
    count, parents = len(pose), np.asarray(rig.parents)
    frames = np.tile(np.eye(4), (count, len(parents), 1, 1))
    local = Rotation.from_rotvec(np.asarray(pose, float).reshape(-1, 3)).as_matrix().reshape(count, -1, 3, 3)
    joints = np.asarray(rig.joints, float)
    for j, p in enumerate(parents):
        if p < 0:
            frames[:, j, :3, :3], frames[:, j, :3, 3] = local[:, j], joints[j] + transl
        else:
            frames[:, j, :3, :3] = frames[:, p, :3, :3] @ local[:, j]
            frames[:, j, :3, 3] = frames[:, p, :3, :3] @ (joints[j] - joints[p]) + frames[:, p, :3, 3]
    return frames


def skin_vertices(rig: HandRig, world_from_joint: np.ndarray) -> np.ndarray:
    """Linear blend skinning: (F,V,3) world vertices."""
    rotation, joints = world_from_joint[..., :3, :3], np.asarray(rig.joints, float)
    shift = world_from_joint[..., :3, 3] - np.einsum("fjab,jb->fja", rotation, joints)
    blend = np.einsum("vj,fjab->fvab", np.asarray(rig.weights, float), rotation)
    return np.einsum("fvab,vb->fva", blend, np.asarray(rig.vertices, float)) + np.einsum(
        "vj,fja->fva", rig.weights, shift
    )


def write_glb(path: str | os.PathLike, scene: Scene, hands: dict[str, HandRig]) -> None:
    """Write the animated scene. Atomic.

    hands: the rig of every hand in the scene, by side. Raises ValueError when a rig is missing or does not give the
    scene's hand (more than 20 mm off: another pose convention or another shape; smaller differences are a model's pose
    correctives, which glTF skins do not have).
    """
    gltf = _Gltf()
    times = gltf.accessor(np.arange(len(scene.frames), dtype=np.float32) / float(scene.fps), bounds=True)
    for side in SIDES:
        if side in scene.bodies and np.any(scene.bodies[side].valid):
            if side not in hands:
                raise ValueError(f"write_glb needs the rig of the {side} hand, to skin it")
            _add_hand(gltf, scene, side, hands[side], times)
    if "object" in scene.bodies and np.any(scene.bodies["object"].valid):
        _add_object(gltf, scene, times)
    _add_camera(gltf, scene, times)
    write_atomically(path, gltf.encode(scene))


def held(valid: np.ndarray) -> np.ndarray:
    """(F,) the frame whose pose each frame shows: itself, or the last valid one before it, or the first valid one."""
    valid = np.asarray(valid, bool)
    index = np.where(valid, np.arange(len(valid)), -1)
    index = np.maximum.accumulate(index)
    return np.where(index < 0, int(np.argmax(valid)), index)


def _add_hand(gltf: _Gltf, scene: Scene, side: str, rig: HandRig, times: int) -> None:
    body = scene.bodies[side]
    motion = body.motion
    assert isinstance(motion, Skinned)
    frames = joint_frames(rig, motion.pose, motion.transl) if rig.world_from_joint is None else rig.world_from_joint
    frames = np.asarray(frames, float)[held(body.valid)]
    if len(rig.vertices) != motion.vertices.shape[1]:
        raise ValueError(
            f"the {side} hand's rig has {len(rig.vertices)} vertices, the scene's {motion.vertices.shape[1]}"
        )
    check = np.flatnonzero(body.valid)[:: max(1, int(np.sum(body.valid)) // 8)]
    off = np.linalg.norm(skin_vertices(rig, frames[check]) - motion.vertices[check], axis=-1).max()
    if not off < 0.02:
        raise ValueError(f"the {side} hand's rig does not give the scene's vertices: they differ by {1e3 * off:.0f} mm")

    shape = replace(body.shape, vertices=rig.vertices)
    color = HAND_COLORS[side] if shape.colors is None else (255, 255, 255)
    mesh = gltf.mesh(f"{side} hand", shape, rig.weights, color)
    parents = np.asarray(rig.parents)
    local = np.where((parents < 0)[:, None, None], HALF_TURN @ frames, np.linalg.inv(frames[:, parents]) @ frames)
    bind = np.tile(np.eye(4), (len(parents), 1, 1))
    bind[:, :3, 3] = -np.asarray(rig.joints, float)
    nodes = [gltf.moving_node(f"{side}.joint{j:02d}", local[:, j], times) for j in range(len(parents))]
    for j, p in enumerate(parents):
        if p >= 0:
            gltf.json["nodes"][nodes[p]].setdefault("children", []).append(nodes[j])
    root = nodes[int(np.flatnonzero(parents < 0)[0])]
    matrices = gltf.accessor(bind.transpose(0, 2, 1).reshape(-1, 16).astype(np.float32), kind="MAT4")  # column-major
    skin = gltf.add(
        "skins", {"name": f"{side} hand", "joints": nodes, "skeleton": root, "inverseBindMatrices": matrices}
    )
    extras = {"valid": [int(v) for v in body.valid], "model": motion.model}
    node = gltf.add("nodes", {"name": f"{side} hand", "mesh": mesh, "skin": skin, "extras": extras})
    gltf.roots += [node, root]


def _add_object(gltf: _Gltf, scene: Scene, times: int) -> None:
    body = scene.bodies["object"]
    mesh = gltf.mesh("object", body.shape)
    poses = HALF_TURN @ np.asarray(body.motion.world_from_body, float)[held(body.valid)]
    node = gltf.moving_node("object", poses, times)
    gltf.json["nodes"][node] |= {"mesh": mesh, "extras": {"valid": [int(v) for v in body.valid]}}
    gltf.roots.append(node)


def _add_camera(gltf: _Gltf, scene: Scene, times: int) -> None:
    width, height = scene.size
    fov = 2 * np.arctan(height / 2 / float(scene.K[1, 1]))
    lens = {"yfov": float(fov), "aspectRatio": width / height, "znear": 0.01, "zfar": 100.0}
    camera = gltf.add("cameras", {"name": "video camera", "type": "perspective", "perspective": lens})
    node = gltf.moving_node("video camera", HALF_TURN @ np.asarray(scene.world_from_cam, float) @ HALF_TURN, times)
    gltf.json["nodes"][node]["camera"] = camera
    gltf.roots.append(node)


class _Gltf:
    """The JSON and the binary of one file, grown together."""

    def __init__(self) -> None:
        self.json: dict[str, list] = {
            k: [] for k in ("nodes", "meshes", "materials", "skins", "cameras", "accessors", "bufferViews")
        }
        self.blob = bytearray()
        self.roots: list[int] = []
        self.channels: list[dict] = []
        self.samplers: list[dict] = []

    def add(self, table: str, item: dict) -> int:
        self.json[table].append(item)
        return len(self.json[table]) - 1

    def accessor(self, data: np.ndarray, kind: str | None = None, bounds=False, target=None, normalized=False) -> int:
        """Append an array: 1-D is SCALAR, (N,k) is VECk. Rows of vertex data must be a multiple of 4 bytes."""
        data = np.ascontiguousarray(data)
        assert data.ndim == 1 or kind or data.strides[0] % 4 == 0
        self.blob += bytes(-len(self.blob) % 4)
        view: dict = {"buffer": 0, "byteOffset": len(self.blob), "byteLength": data.nbytes}
        self.blob += data.astype(data.dtype.newbyteorder("<"), copy=False).tobytes()
        item = {
            "bufferView": self.add("bufferViews", view | ({"target": target} if target else {})),
            "componentType": _TYPES[data.dtype.str[1:]],
            "count": len(data),
            "type": kind or ("SCALAR" if data.ndim == 1 else f"VEC{data.shape[1]}"),
        }
        if normalized:
            item["normalized"] = True
        if bounds:
            rows = data.reshape(len(data), -1)
            item |= {"min": rows.min(0).tolist(), "max": rows.max(0).tolist()}
        return self.add("accessors", item)

    def mesh(self, name: str, mesh: Mesh, weights: np.ndarray | None = None, color=(255, 255, 255)) -> int:
        """A mesh with normals and what it has: vertex colours, or skinning weights and one colour."""
        vertices, faces = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces)
        check_mesh(vertices, faces)
        attributes = {
            "POSITION": self.accessor(vertices, bounds=True, target=34962),
            "NORMAL": self.accessor(vertex_normals(vertices, faces), target=34962),
        }
        if mesh.colors is not None:  # 16 bits, because glTF vertex colours are linear and 8 would band in the darks
            rgba = np.full((len(vertices), 4), 65535, np.uint16)
            rgba[:, :3] = np.round(_linear(colors_u8(mesh) / 255) * 65535)
            attributes["COLOR_0"] = self.accessor(rgba, target=34962, normalized=True)
        if weights is not None:
            attributes |= self._weights(np.asarray(weights, np.float64))
        surface = {
            "baseColorFactor": [*_linear(np.array(color) / 255).tolist(), 1.0],
            "metallicFactor": 0.0,
            "roughnessFactor": 0.75,
        }
        material = self.add("materials", {"name": name, "pbrMetallicRoughness": surface, "doubleSided": True})
        indices = self.accessor(faces.astype(np.uint32).reshape(-1), target=34963)
        return self.add(
            "meshes",
            {"name": name, "primitives": [{"attributes": attributes, "indices": indices, "material": material}]},
        )

    def _weights(self, weights: np.ndarray) -> dict[str, int]:
        """The strongest four influences of each vertex, or eight where four would lose more than a thousandth."""
        order = np.argsort(-weights, axis=1, kind="stable")
        sets = 1 if np.take_along_axis(weights, order[:, 4:], 1).sum(1).max() < 1e-3 else 2
        order = order[:, : 4 * sets]
        top = np.take_along_axis(weights, order, 1)
        top = (top / top.sum(1, keepdims=True)).astype(np.float32)
        order = np.where(top > 0, order, 0).astype(np.uint8)  # an unused slot must name joint 0
        out = {}
        for k in range(sets):
            out[f"JOINTS_{k}"] = self.accessor(order[:, 4 * k : 4 * k + 4], target=34962)
            out[f"WEIGHTS_{k}"] = self.accessor(top[:, 4 * k : 4 * k + 4], target=34962)
        return out

    def moving_node(self, name: str, transforms: np.ndarray, times: int) -> int:
        """A node with rigid transforms (F,4,4) of its parent; only what changes is animated."""
        shift = transforms[:, :3, 3].astype(np.float32)
        turn = Rotation.from_matrix(transforms[:, :3, :3]).as_quat()
        for i in range(1, len(turn)):  # the same side of the sphere, or viewers turn the long way round
            if turn[i] @ turn[i - 1] < 0:
                turn[i] = -turn[i]
        turn = turn.astype(np.float32)
        node = self.add("nodes", {"name": name, "translation": shift[0].tolist(), "rotation": turn[0].tolist()})
        for path, values in (("translation", shift), ("rotation", turn)):
            if np.abs(values - values[0]).max() > 1e-6:
                sampler = {"input": times, "output": self.accessor(values), "interpolation": "LINEAR"}
                self.samplers.append(sampler)
                self.channels.append({"sampler": len(self.samplers) - 1, "target": {"node": node, "path": path}})
        return node

    def encode(self, scene: Scene) -> bytes:
        """The .glb: a 12-byte header, the JSON chunk padded with spaces, the binary chunk padded with zeros."""
        extras = {"fps": float(scene.fps), "frames": [int(f) for f in scene.frames], "units": "metres"}
        out = {"asset": {"version": "2.0", "generator": "handhold"}, "scene": 0}
        out["scenes"] = [{"name": "handhold", "nodes": self.roots, "extras": extras}]
        out |= {k: v for k, v in self.json.items() if v}
        if self.channels:
            out["animations"] = [{"name": "clip", "channels": self.channels, "samplers": self.samplers}]
        self.blob += bytes(-len(self.blob) % 4)
        out["buffers"] = [{"byteLength": len(self.blob)}]
        text = json.dumps(out, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        head = struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(self.blob))
        return (
            head
            + struct.pack("<I4s", len(text), b"JSON")
            + text
            + struct.pack("<I4s", len(self.blob), b"BIN\0")
            + bytes(self.blob)
        )


def _linear(srgb: np.ndarray) -> np.ndarray:
    """Linear light from sRGB, both in [0,1] (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
