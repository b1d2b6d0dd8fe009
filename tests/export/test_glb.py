import json
import struct
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp
from truth_scene import demo_truth, open_hand, shaped_hand, truth_scene, with_gap

from handhold.export import glb as glb_module
from handhold.export.glb import HandRig, hand_rig, held, write_glb
from handhold.hand import HandModel

COMPONENTS = {5120: "i1", 5121: "u1", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTH = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


class Glb:
    """A strict little reader: fails on what the glTF validator calls an error."""

    def __init__(self, path):
        data = path.read_bytes()
        magic, version, length = struct.unpack("<4sII", data[:12])
        assert (magic, version, length) == (b"glTF", 2, len(data))
        n, kind = struct.unpack("<I4s", data[12:20])
        assert kind == b"JSON" and n % 4 == 0
        self.json = json.loads(data[20 : 20 + n])
        m, kind = struct.unpack("<I4s", data[20 + n : 28 + n])
        assert kind == b"BIN\0" and m % 4 == 0 and len(data) == 28 + n + m
        self.blob = data[28 + n :]
        assert self.json["buffers"] == [{"byteLength": m}]
        end = 0
        for view in self.json["bufferViews"]:
            assert view["byteOffset"] % 4 == 0 and view["byteOffset"] >= end
            end = view["byteOffset"] + view["byteLength"]
        assert end <= m

    def read(self, index):
        a = self.json["accessors"][index]
        view, width = self.json["bufferViews"][a["bufferView"]], WIDTH[a["type"]]
        dtype = np.dtype(COMPONENTS[a["componentType"]])
        assert view["byteLength"] == a["count"] * width * dtype.itemsize
        if "target" in view and width > 1:
            assert width * dtype.itemsize % 4 == 0
        out = np.frombuffer(self.blob, dtype, a["count"] * width, view["byteOffset"]).reshape(a["count"], width)
        assert np.isfinite(out).all()
        if "min" in a:
            assert np.array_equal(out.min(0), np.array(a["min"], dtype))
            assert np.array_equal(out.max(0), np.array(a["max"], dtype))
        return out

    def node(self, name):
        return next(i for i, n in enumerate(self.json["nodes"]) if n["name"] == name)

    def local(self, node, time):
        """(4,4) transform of a node in its parent at a time in seconds."""
        n, out = self.json["nodes"][node], np.eye(4)
        shift, turn = np.array(n.get("translation", [0, 0, 0])), np.array(n.get("rotation", [0, 0, 0, 1]))
        for channel in self.json["animations"][0]["channels"]:
            if channel["target"]["node"] == node:
                sampler = self.json["animations"][0]["samplers"][channel["sampler"]]
                t, v = self.read(sampler["input"])[:, 0], self.read(sampler["output"])
                if channel["target"]["path"] == "translation":
                    shift = np.array([np.interp(time, t, v[:, k]) for k in range(3)])
                else:
                    turn = Slerp(t, Rotation.from_quat(v))(np.clip(time, t[0], t[-1])).as_quat()
        out[:3, :3], out[:3, 3] = Rotation.from_quat(turn).as_matrix(), shift
        return out

    def world(self, node, time):
        parents = {c: i for i, n in enumerate(self.json["nodes"]) for c in n.get("children", [])}
        out = self.local(node, time)
        while node in parents:
            node = parents[node]
            out = self.local(node, time) @ out
        return out

    def skinned(self, name, time):
        """(V,3) vertices of a skinned node, as a viewer would draw them."""
        node = self.json["nodes"][self.node(name)]
        skin, primitive = self.json["skins"][node["skin"]], self.json["meshes"][node["mesh"]]["primitives"][0]
        at = primitive["attributes"]
        bind = self.read(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
        bones = np.stack([self.world(j, time) for j in skin["joints"]]) @ bind
        joints, weights = self.read(at["JOINTS_0"]), self.read(at["WEIGHTS_0"])
        assert np.allclose(weights.sum(1), 1, atol=1e-6) and not joints[weights == 0].any()
        points = np.c_[self.read(at["POSITION"]), np.ones(len(joints))]
        return np.einsum("vk,vkab,vb->va", weights, bones[joints], points)[:, :3]


@pytest.fixture(scope="module")
def gt():
    return demo_truth()


def rig_of(scene, side):
    return hand_rig(HandModel.open(side), scene.bodies[side].motion)


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_frame_is_the_scene(tmp_path, gt, side):
    scene = truth_scene(gt, side)
    write_glb(tmp_path / "s.glb", scene, {side: rig_of(scene, side)})
    glb, y_up = Glb(tmp_path / "s.glb"), np.array([1, -1, -1])
    for f in (0, 17, 47):
        assert np.abs(glb.skinned(f"{side} hand", f / 15) - scene.bodies[side].posed(f) * y_up).max() < 1e-4
        primitive = glb.json["meshes"][glb.json["nodes"][glb.node("object")]["mesh"]]["primitives"][0]
        t = glb.world(glb.node("object"), f / 15)
        points = glb.read(primitive["attributes"]["POSITION"]) @ t[:3, :3].T + t[:3, 3]
        assert np.abs(points - scene.bodies["object"].posed(f) * y_up).max() < 1e-5
    assert glb.read(primitive["indices"]).max() < len(points)
    colors = glb.read(primitive["attributes"]["COLOR_0"])[:, :3] / 65535
    srgb = np.where(colors <= 0.0031308, colors * 12.92, 1.055 * colors ** (1 / 2.4) - 0.055)
    assert np.abs(srgb - scene.bodies["object"].shape.colors).max() < 0.003
    assert np.allclose(glb.world(glb.node("video camera"), 1.0), np.eye(4))  # a static camera looks along -z, y up


def test_plain_forward_kinematics_and_moving_camera(tmp_path, gt):
    scene, hand = truth_scene(gt), open_hand()
    rest, joints = shaped_hand(hand, gt["betas"])
    rig = HandRig(rest, joints, hand["weights"], hand["kintree_table"][0])
    cameras = np.tile(np.eye(4), (48, 1, 1))
    cameras[:, :3, :3] = Rotation.from_rotvec(np.linspace(0, 2, 48)[:, None] * [0, 1, 0]).as_matrix()
    cameras[:, 0, 3] = np.linspace(0, 0.3, 48)
    scene = replace(scene, world_from_cam=cameras)
    write_glb(tmp_path / "s.glb", scene, {"right": rig})
    glb = Glb(tmp_path / "s.glb")
    y_up = np.array([1, -1, -1])
    assert np.abs(glb.skinned("right hand", 2.0) - scene.bodies["right"].posed(30) * y_up).max() < 1e-4
    lens = glb.json["cameras"][0]["perspective"]
    cam = np.linalg.inv(glb.world(glb.node("video camera"), 2.0))
    point = scene.bodies["object"].motion.world_from_body[30, :3, 3]
    seen = cam[:3, :3] @ (point * y_up) + cam[:3, 3]
    v = -seen[1] / -seen[2] / np.tan(lens["yfov"] / 2)  # -1 at the top, 1 at the bottom
    world = np.linalg.inv(cameras[30]) @ [*point, 1]
    assert v == pytest.approx((scene.K[1, 1] * world[1] / world[2]) / 180, abs=1e-5)


def test_lost_frames_hold(tmp_path, gt):
    assert held([0, 0, 1, 1, 0, 1, 0]).tolist() == [2, 2, 2, 3, 3, 5, 5]
    scene = with_gap(with_gap(truth_scene(gt), "object", slice(10, 20)), "right", slice(0, 48))
    write_glb(tmp_path / "s.glb", scene, {})  # a hand that was never found needs no rig
    glb = Glb(tmp_path / "s.glb")
    node = glb.node("object")
    assert np.allclose(glb.world(node, 15 / 15), glb.world(node, 9 / 15), atol=1e-6)
    assert glb.json["nodes"][node]["extras"]["valid"][8:12] == [1, 1, 0, 0]
    assert "skins" not in glb.json


def test_a_wrong_rig_is_refused(tmp_path, gt):
    scene = truth_scene(gt)
    with pytest.raises(ValueError, match="rig of the right hand"):
        write_glb(tmp_path / "s.glb", scene, {})
    motion = scene.bodies["right"].motion
    bent = hand_rig(HandModel.open("right"), replace(motion, pose=np.zeros_like(motion.pose)))
    with pytest.raises(ValueError, match="differ by"):
        write_glb(tmp_path / "s.glb", scene, {"right": bent})
    assert not list(tmp_path.iterdir())


def test_trimesh_reads_it(tmp_path, gt):
    trimesh = pytest.importorskip("trimesh")
    scene = truth_scene(gt)
    write_glb(tmp_path / "s.glb", scene, {"right": rig_of(scene, "right")})
    loaded = trimesh.load(tmp_path / "s.glb")
    assert sorted(len(g.faces) for g in loaded.geometry.values()) == [192 * 16, 3196]


def test_more_than_four_influences_take_a_second_set():
    rng = np.random.default_rng(0)
    weights = np.zeros((50, 16))
    for row in weights:
        row[rng.permutation(16)[:6]] = rng.uniform(0.1, 1, 6)
    weights /= weights.sum(1, keepdims=True)
    gltf = glb_module._Gltf()
    at = gltf._weights(weights)
    blob, views = bytes(gltf.blob), gltf.json["bufferViews"]

    def read(name, dtype):
        accessor = gltf.json["accessors"][at[name]]
        return np.frombuffer(blob, dtype, 200, views[accessor["bufferView"]]["byteOffset"]).reshape(50, 4)

    joints = np.concatenate([read("JOINTS_0", "u1"), read("JOINTS_1", "u1")], 1)
    values = np.concatenate([read("WEIGHTS_0", "<f4"), read("WEIGHTS_1", "<f4")], 1)
    back = np.zeros_like(weights)
    for row, j, v in zip(back, joints, values, strict=True):
        np.add.at(row, j, v)
    assert np.abs(back - weights).max() < 1e-6
