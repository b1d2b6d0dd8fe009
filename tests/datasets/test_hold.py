"""HOLD's build folder: what its own writer makes is read in our frames, what we write is what its reader expects, and
a file that would run something runs nothing."""

from __future__ import annotations

import os
import pickle

import cv2
import numpy as np
import pytest
import torch

from handhold.datasets.hold import BuildTracks, CameraHand, is_build, read_build, write_build
from handhold.errors import UnusableInput
from handhold.geometry.cameras import make_K, project
from handhold.geometry.rigid import so3_exp
from handhold.hand import HandModel
from handhold.scene import Sequence

N, W, H = 8, 48, 36
D = np.diag([1.0, -1.0, -1.0])
K = make_K(60.0, 58.0, W / 2, H / 2)


def rotations(rng, n=N) -> np.ndarray:
    return so3_exp(torch.as_tensor(rng.normal(size=(n, 3)))).numpy()


def rodrigues(turns) -> np.ndarray:
    return np.array([cv2.Rodrigues(r)[0][:, 0] for r in turns])


def clip(rng, sides=("right",)) -> Sequence:
    masks = {name: np.zeros((N, H, W), bool) for name in ("object", *sides)}
    for k, m in enumerate(masks.values()):
        m[:, 4 : 4 + 8, 4 + 12 * k : 14 + 12 * k] = True
    frames = rng.integers(0, 255, (N, H, W, 3), dtype=np.uint8)
    return Sequence(frames, np.arange(N) * 3, 30.0, K, "given", masks=masks)


def tracks(rng, sides=("right",)) -> BuildTracks:
    poses = np.tile(np.eye(4), (N, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations(rng), rng.normal(size=(N, 3)) * 0.02 + [0, 0, 1.0]
    hands = {}
    for s in sides:
        model, betas = HandModel.open(s, dtype=torch.float64), rng.normal(size=10)
        wrist = model.with_shape(torch.as_tensor(betas)).rest_joints[0].numpy()
        pose = rng.normal(size=(N, 16, 3)) * 0.4
        hands[s] = CameraHand(model.name, pose, betas, rng.normal(size=(N, 3)) * 0.1 + [0, 0, 1], wrist)
    return BuildTracks(poses, rng.normal(size=(200, 3)) * 0.04, hands)


def original(folder, rng, sides, tensor=True) -> dict:
    """A build made by the formulas of HOLD's own build step (generator, `build_dataset`), with MANO's wrist unknown to
    it but for the translation; returns what is true in the camera's frame."""
    sequence, truth = clip(rng, sides), tracks(rng, sides)
    shift = np.array([-0.0085238, -0.01372686, 0.42570806])
    norm = np.diag([5.0, 5.0, 5.0, 1.0]) @ np.array([[1, 0, 0, 0.1], [0, 1, 0, -0.2], [0, 0, 1, 0.3], [0, 0, 0, 1.0]])
    scale, cano = 0.37, rng.normal(size=(50, 3)) * 0.4
    turned, place = D @ truth.cam_from_object[:, :3, :3], truth.cam_from_object[:, :3, 3] @ D + shift
    entities = {}
    for s, h in truth.hands.items():
        pose = h.pose.copy()
        pose[:, 0] = rodrigues(D @ cv2.Rodrigues(p)[0] for p in pose[:, 0])
        moved = (h.rest_wrist + h.transl) @ D - h.rest_wrist + shift
        entities[s] = {"hand_poses": pose.reshape(N, 48), "hand_trans": moved, "mean_shape": h.betas.astype(np.float32)}
    entities["object"] = {
        "obj_scale": scale, "pts.cano": cano, "object_poses": np.concatenate([rodrigues(turned), place], 1),
        "norm_mat": torch.tensor(norm, dtype=torch.float32) if tensor else norm,
    }  # fmt: skip
    view, pixels = np.eye(4), np.eye(4)
    view[:3, :3], view[:3, 3] = D, -D @ shift
    pixels[:3, :3] = K
    pixels[:2, 2] -= 0.5  # OpenCV's pixel centres
    size = np.diag([*[np.float32(np.linalg.norm(shift) * 3 / 6)] * 3, 1]).astype(np.float32)
    cameras = {f"scale_mat_{i}": size for i in range(N)} | {f"world_mat_{i}": pixels @ view for i in range(N)}
    data = {"seq_name": "hold_mug", "cameras": cameras, "scene_bounding_sphere": 6.0, "max_radius_ratio": 3.0}
    data |= {"entities": entities, "normalize_shift": shift}
    label = np.zeros((H, W), np.uint8)
    for name, code in (("right", 150), ("left", 250), ("object", 50)):
        label[sequence.masks.get(name, np.zeros((1, H, W), bool))[0]] = code
    for sub in ("image", "mask"):
        (folder / sub).mkdir(parents=True)
    for i in range(N):
        cv2.imwrite(str(folder / "image" / f"{i:04d}.png"), sequence.frames[i][:, :, ::-1])
        cv2.imwrite(str(folder / "mask" / f"{i:04d}.png"), label)
    np.save(folder / "data.npy", data)
    points = (np.linalg.inv(norm) @ np.c_[cano, np.ones(50)].T).T[:, :3] * scale
    return {"sequence": sequence, "tracks": truth, "points": points, "data": data}


def same_hand(a: CameraHand, b: CameraHand) -> None:
    model = HandModel.open(a.model.rpartition("_")[2], dtype=torch.float64)
    joints = [
        model.with_shape(torch.as_tensor(h.betas)).joints(torch.as_tensor(h.pose), torch.as_tensor(h.transl))
        for h in (a, b)
    ]
    assert torch.allclose(*joints, atol=1e-6)


@pytest.mark.parametrize("sides", [("right",), ("left",), ("right", "left")])
def test_holds_own_build_in_our_frames(tmp_path, sides):
    true = original(tmp_path / "build", np.random.default_rng(1), sides)
    assert is_build(tmp_path / "build") and not is_build(tmp_path)
    build = read_build(tmp_path / "build")
    s = build.sequence
    assert build.name == "hold_mug" and build.full_size == s.size == (W, H) and s.K_source == "given"
    assert np.allclose(s.K, K, atol=1e-4) and (s.frames == true["sequence"].frames).all()
    assert set(s.masks) == {"object", *sides} == set(s.settled)
    assert all((m == true["sequence"].masks[k]).all() for k, m in s.masks.items())
    assert np.allclose(build.cam_from_object, true["tracks"].cam_from_object, atol=1e-6)
    assert np.allclose(build.points, true["points"], atol=1e-6)
    assert np.isclose(build.scene_scale, 2 / np.linalg.norm(true["data"]["normalize_shift"]))
    assert list(build.hands) == list(sides)
    back = build.tracks({k: true["tracks"].hands[k].rest_wrist for k in sides})
    for k in sides:
        h, given = build.hands[k], true["data"]["entities"][k]
        assert h.model == f"mano_{k}(flat_hand_mean=False)"
        assert (h.pose.reshape(N, 48) == given["hand_poses"]).all() and (h.transl == given["hand_trans"]).all()
        same_hand(true["tracks"].hands[k], back.hands[k])


def test_a_part_of_a_build_is_shrunk_with_its_masks_and_keeps_its_poses(tmp_path):
    true = original(tmp_path, np.random.default_rng(2), ("right",), tensor=False)
    build = read_build(tmp_path, start=1 / 30, stride=2, max_side=W // 2, min_frames=1)
    s = build.sequence
    assert s.indices.tolist() == [1, 3, 5, 7] and s.size == (W // 2, H // 2)
    assert np.allclose(s.K, np.diag([0.5, 0.5, 1]) @ K, atol=1e-4) and s.masks["right"].shape == (4, H // 2, W // 2)
    assert np.allclose(build.cam_from_object, true["tracks"].cam_from_object[1::2], atol=1e-6)
    assert len(build.hands["right"].pose) == 4


@pytest.mark.parametrize("sides", [("right",), ("left",), ("right", "left")])
def test_what_is_written_is_read_again(tmp_path, sides):
    rng = np.random.default_rng(3)
    sequence, given = clip(rng, sides), tracks(rng, sides)
    notes = write_build(tmp_path / "mug" / "build", sequence, given)
    assert len(notes) == len(sides) and all("open_hand" in n for n in notes)
    build = read_build(tmp_path / "mug" / "build")
    assert build.name == "mug" and np.allclose(build.sequence.K, K)
    assert (build.sequence.frames == sequence.frames).all()
    assert all((m == sequence.masks[k]).all() for k, m in build.sequence.masks.items())
    assert np.allclose(build.cam_from_object, given.cam_from_object, atol=1e-9)
    back = build.tracks({k: given.hands[k].rest_wrist for k in sides})
    for k in sides:
        assert build.hands[k].model == given.hands[k].model
        same_hand(given.hands[k], back.hands[k])
    names = (tmp_path / "mug" / "build" / "corres.txt").read_text().split()
    assert [int(n[:6]) for n in names] == sequence.indices.tolist()


def test_holds_reader_finds_everything_where_it_was(tmp_path):
    """The formulas of HOLD's ImageDataset, ObjectModel and MANO server, on the file as numpy loads it."""
    rng = np.random.default_rng(4)
    sequence, given = clip(rng), tracks(rng)
    write_build(tmp_path / "build", sequence, given)
    data = np.load(tmp_path / "build" / "data.npy", allow_pickle=True).item()
    assert all(type(v) in (str, float, dict, np.ndarray) for v in (data | data["entities"]["object"]).values())
    P = data["cameras"]["world_mat_2"] @ data["cameras"]["scale_mat_2"]
    k, r, c = cv2.decomposeProjectionMatrix(P[:3])[:3]
    camera = (c[:3] / c[3])[:, 0]
    scale = 1 / data["cameras"]["scale_mat_0"][0, 0]
    assert np.isclose(np.linalg.norm(camera) * 3, data["scene_bounding_sphere"])
    obj = data["entities"]["object"]
    m = np.eye(4)
    m[:3, :3], m[:3, 3] = cv2.Rodrigues(obj["object_poses"][2, :3])[0], obj["object_poses"][2, 3:]
    m = np.diag([scale, scale, scale, 1]) @ m @ np.diag([*[obj["obj_scale"]] * 3, 1]) @ np.linalg.inv(obj["norm_mat"])
    cano = obj["pts.cano"]
    assert np.isclose(np.linalg.norm(cano, axis=1).max(), 1) and np.abs(cano.max(0) + cano.min(0)).max() < 1e-9
    scene = cano @ m[:3, :3].T + m[:3, 3]
    assert np.linalg.norm(scene, axis=1).max() < 6  # inside HOLD's sphere
    seen = project((scene - camera) @ r.T, k / k[2, 2]) + 0.5
    object_points = given.points[np.linalg.norm(given.points - np.median(given.points, 0), axis=1).argsort()]
    x = object_points @ given.cam_from_object[2, :3, :3].T + given.cam_from_object[2, :3, 3]
    want = project(x, K)
    nearest = np.linalg.norm(seen[:, None] - want[None], axis=2).min(1)
    assert len(seen) >= 150 and nearest.max() < 1e-3
    hand, ours = data["entities"]["right"], given.hands["right"]
    model = HandModel.open("right", dtype=torch.float64)
    shaped = model.with_shape(torch.as_tensor(hand["mean_shape"]))
    j = shaped.joints(torch.as_tensor(hand["hand_poses"].reshape(N, 16, 3))).numpy() + hand["hand_trans"][:, None]
    seen = project((j[2] * scale - camera) @ r.T, k / k[2, 2]) + 0.5
    want = project(shaped.joints(torch.as_tensor(ours.pose), torch.as_tensor(ours.transl)).numpy()[2], K)
    assert np.abs(seen - want).max() < 1e-3


def test_frames_that_would_stop_holds_sampler_are_left_out(tmp_path):
    rng = np.random.default_rng(5)
    sequence, given = clip(rng, ("right", "left")), tracks(rng, ("right", "left"))
    for name in ("object", "left"):
        sequence.masks[name][3] = False  # the right hand alone is not enough for two hands
    sequence.masks["object"][4] = False
    notes = write_build(tmp_path / "build", sequence, given)
    assert any(n.startswith("1 frames") for n in notes)
    build = read_build(tmp_path / "build", min_frames=1)
    assert len(build.sequence) == N - 1
    assert np.allclose(build.cam_from_object, np.delete(given.cam_from_object, 3, 0), atol=1e-9)


class Hostile:
    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_file_runs_nothing(tmp_path):
    true = original(tmp_path / "build", np.random.default_rng(6), ("right",))
    data, file = true["data"], tmp_path / "build" / "data.npy"
    data["entities"]["object"]["obj_scale"] = Hostile(tmp_path / "ran")
    np.save(file, data)
    with pytest.raises(UnusableInput, match=r"data\.npy is not usable at 'obj_scale'"):
        read_build(tmp_path / "build")
    data["entities"]["object"]["obj_scale"], data["extra"] = 0.37, Hostile(tmp_path / "ran")
    np.save(file, data)
    assert len(read_build(tmp_path / "build").sequence) == N  # what nobody asks for is never looked at
    with file.open("wb") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|O", "fortran_order": False, "shape": ()})
        f.write(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(UnusableInput, match=r"data\.npy is not a pickled \.npy"):
        read_build(tmp_path / "build")
    assert not (tmp_path / "ran").exists()


def test_refusals_are_one_sentence(tmp_path):
    def refused(change, words, number=[0]):  # noqa: B006
        number[0] += 1
        folder = tmp_path / str(number[0])
        data = original(folder, np.random.default_rng(7), ("right",))["data"]
        change(folder, data)
        if (folder / "data.npy").is_file() and (folder / "data.npy").stat().st_size > 100:
            np.save(folder / "data.npy", data)
        with pytest.raises(UnusableInput, match=words) as e:
            read_build(folder)
        assert "\n" not in str(e.value)

    obj = lambda d: d["entities"]["object"]  # noqa: E731
    refused(lambda f, d: (f / "data.npy").unlink(), "not a HOLD build")
    refused(lambda f, d: (f / "data.npy").write_bytes(b"no pickle"), "not a pickled .npy")
    refused(lambda f, d: (f / "mask" / "0003.png").unlink(), "8 images but 7 masks")
    refused(lambda f, d: cv2.imwrite(str(f / "mask/0003.png"), np.full((H, W), 255, np.uint8)), "black and white")
    refused(lambda f, d: cv2.imwrite(str(f / "mask/0003.png"), np.zeros((H, W + 1), np.uint8)), "its image 48x36")
    refused(lambda f, d: d.pop("cameras"), "has no 'cameras'")
    refused(lambda f, d: d["cameras"].pop("world_mat_7"), "has no 'world_mat_7'")
    refused(lambda f, d: d["cameras"].update(world_mat_7=d["cameras"]["world_mat_7"] * 1.0 * np.diag([2, 1, 1, 1])),
            "not the projection|intrinsics change")  # fmt: skip
    refused(lambda f, d: d["cameras"].update(world_mat_0=np.diag([1.0, 1, -1, 1])), "not the projection of a camera")
    refused(lambda f, d: obj(d).update(object_poses=np.zeros((N - 1, 6))), "8x6 finite numbers, and is 7x6")
    refused(lambda f, d: obj(d).update(obj_scale=float("nan")), "'obj_scale' should be one finite")
    refused(lambda f, d: obj(d).update(obj_scale=0.0), "the scale in 'obj_scale' is 0")
    refused(lambda f, d: obj(d).update(norm_mat=np.zeros((4, 4))), "not a similarity")
    refused(lambda f, d: d["entities"]["right"].update(hand_poses="none"), "not usable at 'hand_poses'")


def test_a_clip_hold_could_not_use_is_refused(tmp_path):
    rng = np.random.default_rng(8)
    sequence, given = clip(rng), tracks(rng)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    lost = given.cam_from_object.copy()
    lost[3] = np.nan
    for folder, t, words in (
        ("full", given, "holds other files"),
        ("a", BuildTracks(given.cam_from_object, given.points, {}), "at least one hand"),
        ("b", BuildTracks(lost, given.points, given.hands), "frames without it"),
        ("c", BuildTracks(given.cam_from_object, given.points[:2], given.hands), "too few"),
    ):
        with pytest.raises(UnusableInput, match=words):
            write_build(tmp_path / folder, sequence, t)
        assert not is_build(tmp_path / folder)
