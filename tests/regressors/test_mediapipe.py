"""What is around the two networks (anchors, suppression, ROIs, crops), and the networks where they are there."""

import cv2
import numpy as np
import pytest

from handhold import assets
from handhold.errors import MissingAsset, UnusableInput
from handhold.regressors import mediapipe as mp


def test_anchors_are_cell_centres():
    a = mp.palm_anchors()
    assert a.shape == (2016, 2)
    np.testing.assert_allclose(a[0], 0.5 / 24)
    np.testing.assert_allclose(a[2], [1.5 / 24, 0.5 / 24])
    np.testing.assert_allclose(a[1152:1158], np.full((6, 2), 0.5 / 12))
    np.testing.assert_allclose(a.mean(0), 0.5)


def test_weighted_nms():
    boxes = np.array([[0, 0, 10, 10, 7], [1, 0, 11, 10, 9], [50, 50, 60, 60, 1]], float)
    out = mp.weighted_nms(boxes, np.array([0.9, 0.3, 0.5]))
    assert [s for _, s in out] == [0.9, 0.5]
    np.testing.assert_allclose(out[0][0], (boxes[0] * 0.9 + boxes[1] * 0.3) / 1.2)
    np.testing.assert_allclose(out[1][0], boxes[2])
    assert mp.weighted_nms(np.zeros((0, 5)), np.zeros(0)) == []


@pytest.mark.parametrize("angle", [0.0, 0.7, -2.5, np.pi])
def test_roi_round_trip(angle):
    rng = np.random.default_rng(1)
    roi = mp.Roi(np.array([200.0, 120.0]), 90.0, angle)
    p = rng.uniform(0, 400, (5, 2))
    np.testing.assert_allclose(roi.to_image(roi.to_unit(p)), p, atol=1e-9)
    np.testing.assert_allclose(roi.to_image(np.array([0.5, 0.5])), roi.center)
    up = roi.to_image(np.array([0.5, 0.0])) - roi.center
    np.testing.assert_allclose(up, 45 * np.array([np.sin(angle), -np.cos(angle)]), atol=1e-9)
    back = roi.jittered((0.1, -0.2), 1.5, 0.3)
    np.testing.assert_allclose(roi.to_unit(back.center), [0.6, 0.3], atol=1e-12)
    assert back.size == 135 and np.isclose(back.angle, angle + 0.3)


def hand(scale=100.0):
    """21 points of a schematic hand that points up, wrist at the origin."""
    p = np.zeros((21, 2))
    for f in range(5):
        for k in range(4):
            p[1 + 4 * f + k] = [(f - 2) * 0.22, -(0.45 if f == 0 else 0.9) - (0.25 if k else 0.0) * k]
    return p * scale


def test_roi_from_points_is_equivariant():
    p = hand()
    roi = mp.roi_from_points(p)
    assert abs(roi.angle) < 0.2
    a = 1.1
    r = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    moved = mp.roi_from_points(2 * p @ r.T + [300, 200])
    np.testing.assert_allclose(moved.center, 2 * r @ roi.center + [300, 200], atol=1e-9)
    assert np.isclose(moved.size, 2 * roi.size) and np.isclose(moved.angle, roi.angle + a)
    unit = roi.to_unit(p)
    assert (unit > 0).all() and (unit < 1).all()


def test_crop_places_pixel_centres():
    """A smooth image sampled by any ROI has, at crop pixel centres, the value of the image at their image points."""
    h, w = 220, 240
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    image = (
        np.stack([x, y, 0 * x], -1).round().astype(np.uint8)
    )  # rounds to even, so that means of neighbours are whole
    for roi in (mp.Roi(np.array([120.0, 110.0]), 80.0, 0.4), mp.Roi(np.array([110.0, 120.0]), 190.0, -0.2)):
        c = mp.crop(mp.image_pyramid(image), roi.image_from_unit(), 64)
        u = (np.stack(np.meshgrid(np.arange(64), np.arange(64)), -1) + 0.5) / 64
        p = roi.to_image(u)
        inside = (p > 4).all(-1) & (p < [w - 4, h - 4]).all(-1)
        off = (c[..., :2].astype(float) - p)[inside]
        assert np.abs(off).max() < 1.6 and np.abs(off.mean(0)).max() < 0.05


def test_missing_and_wrong_network_files(tmp_path):
    with pytest.raises(MissingAsset, match="handhold assets"):
        mp.HandLandmarker(tmp_path / "a.tflite", tmp_path / "b.tflite")
    (tmp_path / "a.tflite").write_bytes(b"not a network")
    with pytest.raises(UnusableInput):
        mp.HandLandmarker(tmp_path / "a.tflite", tmp_path / "a.tflite")


@pytest.fixture(scope="module")
def landmarker():
    if not all(assets.status().values()):
        pytest.skip("the hand networks are not in the cache; run `handhold assets`")
    return mp.HandLandmarker(assets.path("palm_detection"), assets.path("hand_landmark"))


@pytest.fixture(scope="module")
def clip():
    """The demo clip's first frames, its truth in pixels and its joints in metres."""
    from importlib.resources import files

    import av

    folder = files("handhold") / "data" / "demo"
    with av.open(str(folder / "video.mp4")) as video:
        frames = [f.to_ndarray(format="rgb24") for f, _ in zip(video.decode(video=0), range(6), strict=False)]
    with np.load(str(folder / "gt.npz"), allow_pickle=False) as z:
        joints, K = z["right_joints"][: len(frames)].astype(float), z["K"]
    p = joints @ K.T
    return np.stack(frames), p[..., :2] / p[..., 2:], joints


def test_detects_the_demo_hand(landmarker, clip):
    frames, truth, joints = clip
    d = landmarker.detect(frames[0])[0]
    assert np.median(np.linalg.norm(d.points - truth[0], axis=-1)) < 12
    assert d.presence > 0.7 and d.right > 0.8
    # camera-aligned axes: after scale and shift, no rotation is left
    a, b = d.points3d - d.points3d.mean(0), joints[0] - joints[0].mean(0)
    u, _, vt = np.linalg.svd(a.T @ b)
    r = (u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt).T
    assert np.degrees(np.arccos((np.trace(r) - 1) / 2)) < 25


def test_mirrored_image_gives_mirrored_hand(landmarker, clip):
    frames, truth, _ = clip
    d = landmarker.detect(frames[0])[0]
    m = landmarker.detect(np.ascontiguousarray(frames[0][:, ::-1]))[0]
    assert m.right < 0.2
    back = mp.mirrored(m, frames.shape[2])
    size = d.roi.size / 2
    assert np.median(np.linalg.norm(back.points - d.points, axis=-1)) < 0.06 * size
    assert np.linalg.norm(back.points3d - d.points3d, axis=-1).mean() < 0.02
    # and a mirrored look through the same ROI is the same function of the mirrored image, exactly
    roi = mp.roi_from_points(d.points)
    flipped = mp.Roi(np.array([frames.shape[2] - roi.center[0], roi.center[1]]), roi.size, -roi.angle)
    a = landmarker.read(frames[0], roi, mirror=True)
    b = mp.mirrored(landmarker.read(np.ascontiguousarray(frames[0][:, ::-1]), flipped), frames.shape[2])
    np.testing.assert_allclose(a.points, b.points, atol=0.5)
    assert abs(a.right - b.right) < 0.05


def test_turned_image_gives_turned_hand(landmarker, clip):
    frames, truth, _ = clip
    roi = mp.roi_from_points(truth[0])
    d = landmarker.read(frames[0], roi)
    turned = cv2.rotate(frames[0], cv2.ROTATE_90_CLOCKWISE)
    h = frames.shape[1]
    c = np.array([h - roi.center[1], roi.center[0]])
    t = landmarker.read(turned, mp.Roi(c, roi.size, roi.angle + np.pi / 2))
    np.testing.assert_allclose(t.points, np.stack([h - d.points[:, 1], d.points[:, 0]], -1), atol=0.5)
    np.testing.assert_allclose(t.points3d, d.points3d[:, [1, 0, 2]] * [-1, 1, 1], atol=2e-3)


def test_track_landmarks_on_a_short_clip(landmarker, clip):
    from handhold.regressors.landmarks import track_landmarks

    frames, truth, _ = clip
    clip3 = frames[:3].copy()
    clip3[1] = 0  # a frame without a hand
    done = []
    found = track_landmarks(clip3, landmarker, progress=done.append)
    assert list(found) == ["right"] and done[-1] == 1.0
    r = found["right"]
    assert r.points.dtype == r.points3d.dtype == r.confidence.dtype == np.float32
    assert r.confidence[1] == 0 and np.isnan(r.points[1]).all()
    assert (r.confidence[[0, 2]] > 0.5).all()
    assert np.median(np.linalg.norm(r.points - truth[:3], axis=-1)[[0, 2]]) < 12
    assert track_landmarks(np.zeros_like(clip3), landmarker) == {}
