"""Files of OpenPose, MediaPipe, HaMeR and WiLoR: what is read, how pixels and sides are counted, and what is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from drawn_hands import hand, posed
from handhold.errors import UnusableInput
from handhold.regressors.hand_files import LAYOUTS, read_hands
from handhold.regressors.landmark_files import save_landmarks
from handhold.scene import Landmarks

F, SIZE = 6, (640, 480)
EVERY = np.arange(F)
PIXELS = np.stack([hand(200 + 4 * i, 200) for i in range(F)])  # (F,21,2) our pixels
OTHER = PIXELS + [250, 40]


def read(path, indices=EVERY, **kw):
    return read_hands(path, indices, SIZE, **kw)


def write(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    return path


# ---------------------------------------------------------------- OpenPose


def openpose(folder, first=0, key="{}_keypoints_2d", scale=1.0, count=F):
    for i in range(count):
        score = np.full((21, 1), 0.8)
        joints = [np.hstack([(p[i] - 0.5) * scale, score]).ravel().tolist() for p in (PIXELS, OTHER)]
        joints[0][3 * 7 : 3 * 7 + 3] = [0, 0, 0]
        person = {key.format("hand_right"): joints[0], key.format("hand_left"): joints[1], "pose_keypoints_2d": []}
        people = [person] if i != 2 else []
        write(folder / f"clip_{i + first:012d}_keypoints.json", {"version": 1.3, "people": people})
    return folder


@pytest.mark.parametrize("key", ["{}_keypoints_2d", "{}_keypoints"])
def test_openpose_folder(tmp_path, key):
    got = read(openpose(tmp_path / "op", key=key))
    assert got.layout.startswith("OpenPose") and set(got.landmarks) == {"right", "left"}
    right, left = got.landmarks["right"], got.landmarks["left"]
    assert right.source == "openpose" and right.confidence[2] == 0 and right.confidence[0] == pytest.approx(0.8)
    assert np.isnan(right.points[:, 7]).all() and np.isnan(right.points3d).all()
    assert np.allclose(left.points[[0, 1, 3, 4, 5]], OTHER[[0, 1, 3, 4, 5]], atol=1e-3)


def test_frames_are_named_by_their_number_in_the_video(tmp_path):
    openpose(tmp_path / "op")
    got = read(tmp_path / "op", np.array([1, 3, 5])).landmarks["left"]
    assert np.allclose(got.points, OTHER[[1, 3, 5]], atol=1e-3)
    from_one = read(openpose(tmp_path / "one", first=1)).landmarks["left"]
    assert np.allclose(from_one.points[0], OTHER[0], atol=1e-3)
    with pytest.raises(UnusableInput, match="none of which is in the clip"):
        read(tmp_path / "op", np.array([100, 101]))


def test_openpose_scaled_to_one_is_refused(tmp_path):
    with pytest.raises(UnusableInput, match="keypoint_scale 0"):
        read(openpose(tmp_path / "op", scale=1 / 1000))


# ---------------------------------------------------------------- MediaPipe


def marks(points, form="dict", **more):
    xy = points / SIZE
    if form == "list":
        return [[x, y, 0.01] for x, y in xy.tolist()]
    out = [{"x": x, "y": y, "z": 0.01, **more} for x, y in xy.tolist()]
    return {"landmark": out} if form == "proto" else out


def world(side):
    return [dict(zip("xyz", p, strict=True)) for p in posed(side, 0.6).tolist()]


def tasks(i, sides=("Right", "Left"), **names):
    names = {"marks": "hand_landmarks", "world": "hand_world_landmarks", "side": "category_name"} | names
    hands = list(zip((PIXELS[i], OTHER[i]), sides, strict=True))
    return {
        "handedness": [[{"index": 0, "score": 0.97, names["side"]: s}] for _, s in hands],
        names["marks"]: [marks(p, visibility=0.0, presence=0.0) for p, _ in hands],
        names["world"]: [world(s.lower()) for _, s in hands],
    }


JS = {"marks": "landmarks", "world": "worldLandmarks", "side": "categoryName"}


@pytest.mark.parametrize("names", [{}, JS])
def test_mediapipe_tasks(tmp_path, names):
    frames = [tasks(i, **names) for i in range(F)]
    frames[3] = {k: [] for k in frames[3]}
    frames[4] = tasks(4, ("Left", "Right"), **names)  # names swapped in one frame
    got = read(write(tmp_path / "a.json", frames))
    assert got.layout == "MediaPipe tasks 0.10"
    right = got.landmarks["right"]
    assert right.source == "mediapipe" and right.confidence.tolist() == [1, 1, 1, 0, 0.5, 1]
    assert np.allclose(right.points[[0, 1, 2, 4, 5]], PIXELS[[0, 1, 2, 4, 5]], atol=1e-3)
    assert np.allclose(right.points3d[0], posed("right", 0.6), atol=1e-6) and np.isnan(right.points3d[4]).all()
    assert np.allclose(got.landmarks["left"].points[0], OTHER[0], atol=1e-3)
    swapped = read(tmp_path / "a.json", handedness="swapped")
    assert np.allclose(swapped.landmarks["left"].points[0], PIXELS[0], atol=1e-3)
    assert "--joints-handedness" in swapped.notes[-1] and not any("shape" in n for n in got.notes)


def solutions(i, form="proto"):
    return {
        "multi_hand_landmarks": [marks(PIXELS[i], form)],
        "multi_handedness": [{"classification": [{"index": 0, "score": 0.9, "label": "Left"}]}],
    }


@pytest.mark.parametrize("form", ["proto", "dict", "list"])
def test_mediapipe_solutions_names_sides_of_the_mirrored_picture(tmp_path, form):
    write(tmp_path / "a.json", {"fps": 30, "frames": [solutions(i, form) for i in range(F)]})
    got = read(tmp_path / "a.json")
    assert got.layout == "MediaPipe solutions 0.8-0.10" and list(got.landmarks) == ["right"]
    assert np.allclose(got.landmarks["right"].points, PIXELS, atol=1e-3)
    assert list(read(tmp_path / "a.json", handedness="as-written").landmarks) == ["left"]


def test_mediapipe_without_a_hand_and_with_named_frames(tmp_path):
    frames = [{"frame": i, **solutions(i)} for i in (5, 1, 3)]
    frames.append({"frame": 2, "multi_hand_landmarks": None, "multi_handedness": None})
    got = read(write(tmp_path / "a.json", frames)).landmarks["right"]
    assert got.confidence.tolist() == [0, 1, 0, 1, 0, 1]
    folder = tmp_path / "b"
    for i in range(F):
        write(folder / f"{i:06d}.json", solutions(i))
    assert np.allclose(read(folder).landmarks["right"].points, PIXELS, atol=1e-3)


def test_mediapipe_arrays_and_holistic(tmp_path):
    both = np.stack([PIXELS, OTHER], 1) / SIZE
    both[2, 1] = 0
    np.savez(tmp_path / "a.npz", landmarks=both, handedness=np.array([["Right", "Left"]] * F))
    got = read(tmp_path / "a.npz")
    assert got.landmarks["left"].confidence.tolist() == [1, 1, 0, 1, 1, 1]
    assert np.allclose(got.landmarks["right"].points, PIXELS, atol=1e-3)
    np.savez(tmp_path / "n.npz", landmarks=both, handedness=np.array([[1, 0]] * F))
    assert np.allclose(read(tmp_path / "n.npz").landmarks["right"].points, PIXELS, atol=1e-3)
    np.savez(tmp_path / "h.npz", left_hand_landmarks=both[:, 1], right_hand_landmarks=both[:, 0])
    holistic = read(tmp_path / "h.npz")
    assert holistic.layout == "MediaPipe holistic 0.8-0.10" and holistic.landmarks["left"].confidence[2] == 0
    frames = [{"left_hand_landmarks": None, "right_hand_landmarks": marks(p, "proto")} for p in PIXELS]
    assert list(read(write(tmp_path / "h.json", frames)).landmarks) == ["right"]


# ---------------------------------------------------------------- HaMeR and WiLoR

FOCAL = 5000 / 256 * 640


def mano(i, side="right", raw=False, with_2d=False):
    """What the demos hold of a hand whose wrist is seen at a known pixel; `raw` is not mirrored back."""
    joints = posed(side, 0.6, seed=1)
    cam_t = np.array([0.02 * i, 0.01, 5.0]) + [0.1 if side == "left" else -0.1, 0, 0]
    pixels = FOCAL * (joints + cam_t)[:, :2] / (joints + cam_t)[:, 2:] + np.array(SIZE) / 2 + 0.5
    saved = joints * (-1, 1, 1) if raw and side == "left" else joints
    out = {"pred_keypoints_3d": saved, "pred_cam_t_full": cam_t, "is_right": float(side == "right")}
    return out | {"scaled_focal_length": FOCAL, "pred_mano_params": {"betas": np.zeros(10)}}, joints, pixels


def listed(x):
    if isinstance(x, dict):
        return {k: listed(v) for k, v in x.items()}
    return x.tolist() if isinstance(x, np.ndarray) else [listed(v) for v in x] if isinstance(x, list) else x


def expect(got, side, rows=EVERY):
    for i in rows:
        _, joints, pixels = mano(i, side)
        assert np.allclose(got.landmarks[side].points[i], pixels, atol=2e-3)
        assert np.allclose(got.landmarks[side].points3d[i], joints, atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_mano_detections_and_left_hands_mirrored_or_not(tmp_path, raw):
    frames = [[mano(i, s, raw)[0] for s in ("right", "left")] for i in range(F)]
    frames[2] = []
    got = read(write(tmp_path / "a.json", listed(frames)))
    assert got.layout == LAYOUTS[-1] and got.landmarks["right"].source == "mano" and got.notes == ()
    for side in ("right", "left"):
        expect(got, side, [0, 1, 3, 4, 5])
        assert got.landmarks[side].confidence[2] == 0


def test_wilor_mini_list_and_its_flips(tmp_path):
    frames = []
    for i in range(F):
        inner = mano(i)[0]
        inner = {
            k: np.asarray(v)[None] if k.startswith("pred_k") or k.startswith("pred_c") else v for k, v in inner.items()
        }
        right = float(inner.pop("is_right"))
        frames.append([{"hand_bbox": [0, 0, 9, 9], "is_right": 0.0 if i == 4 else right, "wilor_preds": inner}])
    got = read(write(tmp_path / "a.json", listed({"frames": frames})))
    expect(got, "right", [0, 1, 2, 3, 5])
    assert got.landmarks["right"].confidence[4] == 0.5 and np.isnan(got.landmarks["right"].points3d[4]).all()


def stacked(rows):
    keys = ("pred_keypoints_3d", "pred_cam_t_full", "is_right")
    return {k: np.stack([mano(i, s)[0][k] for i, s in rows]) for k in keys}


def test_mano_npz_of_a_clip_and_a_folder_per_frame(tmp_path):
    rows = [(i, s) for i in range(F) for s in ("right", "left")]
    np.savez(tmp_path / "a.npz", frame=np.array([i for i, _ in rows]), **stacked(rows))
    np.savez(tmp_path / "b.npz", **stacked([(i, "left") for i in range(F)]))
    np.savez(tmp_path / "c.npz", **stacked(rows))
    with pytest.raises(UnusableInput, match="12 hands that do not say their frame"):
        read(tmp_path / "c.npz")
    (tmp_path / "batch").mkdir()
    (tmp_path / "single").mkdir()
    for i in range(F):
        np.savez(tmp_path / "batch" / f"frame_{i:05d}.jpg_out.npz", **stacked([(i, "right"), (i, "left")]))
        for k, side in enumerate(("right", "left")):
            one = {n: v for n, v in mano(i, side)[0].items() if n != "pred_mano_params"}
            np.savez(tmp_path / "single" / f"clip_{i:06d}_{k}.npz", **one)
    for name in ("a.npz", "batch", "single"):
        for side in ("right", "left"):
            expect(read(tmp_path / name), side)
    expect(read(tmp_path / "b.npz"), "left")


def test_mano_tensors_only(tmp_path):
    frames = [[{k: torch.as_tensor(v) for k, v in mano(i)[0].items() if k != "pred_mano_params"}] for i in range(F)]
    torch.save({f"{i:06d}.jpg": hands for i, hands in enumerate(frames)}, tmp_path / "a.pt")
    expect(read(tmp_path / "a.pt"), "right")

    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"hands": [Evil()]}, tmp_path / "evil.pt")
    with pytest.raises(UnusableInput, match="plain tensors"):
        read(tmp_path / "evil.pt")


def test_mano_points_of_the_crop_and_of_another_size(tmp_path):
    crop = (PIXELS[0] - 0.5 - [230, 180]) / 300
    hands = [
        [{"is_right": 0, "pred_keypoints_2d": (crop * (-1, 1)).tolist(), "box_center": [230, 180], "box_size": 300}]
    ] * F
    got = read(write(tmp_path / "a.json", hands)).landmarks["left"]
    assert np.allclose(got.points[3], PIXELS[0], atol=1e-3)
    half = [[{"is_right": 1, "pred_keypoints_2d": (PIXELS[0] / 2 - 0.5).tolist(), "img_size": [320, 240]}]] * F
    assert np.allclose(read(write(tmp_path / "b.json", half)).landmarks["right"].points[3], PIXELS[0], atol=1e-3)


# ---------------------------------------------------------------- ours, and none


def test_our_own_file_goes_the_same_way(tmp_path):
    none = np.full((F, 21, 3), np.nan, np.float32)
    save_landmarks(tmp_path / "a.npz", {"right": Landmarks(PIXELS, none, np.ones(F), "mediapipe")})
    got = read(tmp_path / "a.npz")
    assert got.layout == LAYOUTS[0] and got.landmarks["right"].source == "mediapipe"
    assert list(read(tmp_path / "a.npz", handedness="swapped").landmarks) == ["left"]
    write(tmp_path / "b.json", {"right": {"points": PIXELS.tolist()}})
    assert read(tmp_path / "b.json").landmarks["right"].source == ""


ODD = [
    ([], "none of the files"),
    ({"a": 1}, "none of the files"),
    ([solutions(0)] * 3, "holds 3 frames"),
    ([tasks(0) | {"handedness": [[{"category_name": "Both"}]] * 2}] * F, "Left or Right"),
    ([tasks(0) | {"handedness": []}] * F, "2 hands, but 0 sides"),
    ([{"hand_landmarks": [[[1, 2, 3]] * 20], "handedness": ["Left"]}] * F, "20, 3"),
    ([{"hand_landmarks": [[[100, 200, 3]] * 21], "handedness": ["Left"]}] * F, "shares of the picture"),
    ([[{"is_right": 2, "pred_keypoints_3d": [[0, 0, 0]] * 21, "cam_t": [0, 0, 1]}]] * F, "is_right"),
    ([[{"is_right": 1, "pred_keypoints_3d": [[0, 0, 0]] * 21, "cam_t": [0, 0, -1]}]] * F, "behind the camera"),
    ([[{"is_right": 1, "pred_keypoints_3d": [[0, 0, 0]] * 21}]] * F, "no place in the picture"),
    ([[{"is_right": 1, "joints": [["a", 0, 0]] * 21, "cam_t": [0, 0, 1]}]] * F, "must be numbers"),
    ([[{"is_right": 1, "pred_keypoints_2d": [[0.1, 0]] * 21}]] * F, "shares of a crop"),
    ([[{"is_right": 1, "pred_keypoints_2d": [[9, 9]] * 21, "img_size": [100, 100]}]] * F, "another shape"),
    ([[{"is_right": 1, "pred_keypoints_2d": [[1e30, 9]] * 21}]] * F, "beyond"),
    ([{"hand_landmarks": 3, "handedness": ["Left"]}] * F, "must be a list"),
    ([{"hand_landmarks": [[[1, 2]] * 20 + ["x"]], "handedness": ["Left"]}] * F, "must be numbers"),
    ({"version": 1.3, "people": [3]}, "holds 1 frames"),
    ([{"people": [{"hand_left_keypoints_2d": [1, 2, 3]}]}] * F, "expected"),
]  # fmt: skip


@pytest.mark.parametrize("tree, says", ODD)
def test_what_cannot_be_read_is_one_sentence(tmp_path, tree, says):
    with pytest.raises(UnusableInput, match=says) as e:
        read(write(tmp_path / "a.json", tree))
    assert "\n" not in str(e.value) and "a.json" in str(e.value)


def test_folders_without_hands_and_files_that_lie(tmp_path):
    with pytest.raises(UnusableInput, match="does not exist"):
        read(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnusableInput, match="holds no"):
        read(tmp_path / "empty")
    (tmp_path / "x.npz").write_bytes(b"no zip")
    (tmp_path / "x.json").write_text("[" * 10000)
    (tmp_path / "x.pt").write_bytes(b"no tensors")
    np.savez(tmp_path / "o.npz", hands=np.array([{"is_right": 1}], object))
    for name in ("x.npz", "x.json", "x.pt", "o.npz"):
        with pytest.raises(UnusableInput) as e:
            read(tmp_path / name)
        assert "\n" not in str(e.value)
