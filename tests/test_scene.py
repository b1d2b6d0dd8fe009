"""The result file: round trip, permissions, and what is refused."""

from __future__ import annotations

import os
import stat
from dataclasses import replace

import numpy as np
import pytest

from handhold.errors import UnusableInput
from handhold.scene import Body, Mesh, Rigid, Scene, Skinned, load_npz, save_npz


@pytest.fixture
def scene() -> Scene:
    rng = np.random.default_rng(0)
    n, v = 4, 7
    faces = np.array([[0, 1, 2], [2, 3, 4]], np.int32)
    vertices = rng.normal(size=(n, v, 3)).astype(np.float32)
    pose, joints = rng.normal(size=(n, 16, 3)), rng.normal(size=(n, 21, 3))
    motion = Skinned("open_hand_left", pose, rng.normal(size=10), rng.normal(size=(n, 3)), vertices, joints)
    state = (np.array([True, False, True, True]), np.array([1, 0, 0.5, 0.2], np.float32), np.array(["a", "", "c", "d"]))
    thing = Mesh(vertices[0], faces, rng.random((v, 3)).astype(np.float32), np.arange(v) > 3)
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, :3, 3] = rng.normal(size=(n, 3))
    bodies = {"left": Body(Mesh(vertices[0], faces), motion, *state), "object": Body(thing, Rigid(poses), *state)}
    K = np.array([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])
    return Scene(K, (64, 48), 12.5, np.arange(n) * 3, np.tile(np.eye(4), (n, 1, 1)), bodies)


def test_a_scene_comes_back(scene, tmp_path):
    scene.save(tmp_path / "scene.npz")
    again = Scene.load(tmp_path / "scene.npz")
    assert list(again.bodies) == ["left", "object"] and again.size == (64, 48) and again.fps == 12.5
    assert (again.frames == scene.frames).all() and np.allclose(again.K, scene.K)
    for name, body in scene.bodies.items():
        other = again.bodies[name]
        assert (other.valid == body.valid).all() and (other.reason == body.reason).all()
        assert np.allclose(other.confidence, body.confidence)
        for i in range(4):
            assert np.allclose(other.posed(i), body.posed(i), atol=1e-6)
    a, b = scene.bodies["left"].motion, again.bodies["left"].motion
    assert all(np.allclose(getattr(a, k), getattr(b, k), atol=1e-6) for k in ("pose", "betas", "transl", "joints"))
    assert b.model == "open_hand_left"
    a, b = scene.bodies["object"].shape, again.bodies["object"].shape
    assert (a.observed == b.observed).all() and (a.faces == b.faces).all() and np.allclose(a.colors, b.colors)
    floats = {k for k, v in load_npz(tmp_path / "scene.npz").items() if v.dtype.kind == "f" and v.dtype != np.float32}
    assert not floats


def test_hand_colours_come_back_and_files_without_them_load(scene, tmp_path):
    scene.save(tmp_path / "old.npz")
    assert Scene.load(tmp_path / "old.npz").bodies["left"].shape.colors is None
    hand = scene.bodies["left"]
    colors = np.random.default_rng(1).random((7, 3)).astype(np.float32)
    painted = replace(hand, shape=replace(hand.shape, colors=colors))
    replace(scene, bodies={"left": painted}).save(tmp_path / "new.npz")
    assert (Scene.load(tmp_path / "new.npz").bodies["left"].shape.colors == colors).all()
    assert set(load_npz(tmp_path / "new.npz")) - set(load_npz(tmp_path / "old.npz")) == {"hand.left.colors"}


def test_others_may_read_it_as_they_may_read_any_file(scene, tmp_path):
    old = os.umask(0o022)
    try:
        scene.save(tmp_path / "scene.npz")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "scene.npz").stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["scene.npz"]


def test_objects_are_never_pickled_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, {"x": np.arange(3)})
    with pytest.raises(TypeError, match="refusing to pickle"):
        save_npz(path, {"x": np.array([{}], dtype=object)})
    assert load_npz(path)["x"].tolist() == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1


def test_what_is_not_a_scene_is_told(scene, tmp_path):
    with pytest.raises(UnusableInput, match="does not exist"):
        Scene.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(UnusableInput, match="not a readable .npz"):
        Scene.load(tmp_path / "text.npz")
    np.savez(tmp_path / "pickle.npz", version=np.array([{}], dtype=object))
    with pytest.raises(UnusableInput, match="plain arrays"):
        Scene.load(tmp_path / "pickle.npz")
    save_npz(tmp_path / "new.npz", {"version": np.int64(2)})
    with pytest.raises(UnusableInput, match="version 2"):
        Scene.load(tmp_path / "new.npz")
    replace(scene, bodies={}).save(tmp_path / "empty.npz")
    assert Scene.load(tmp_path / "empty.npz").bodies == {}
    arrays = load_npz(tmp_path / "empty.npz")
    del arrays["K"]
    save_npz(tmp_path / "less.npz", arrays)
    with pytest.raises(UnusableInput, match="has no 'K'"):
        Scene.load(tmp_path / "less.npz")
    scene.save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnusableInput):
        Scene.load(tmp_path / "cut.npz")
