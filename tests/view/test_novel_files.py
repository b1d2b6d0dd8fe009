"""`handhold render`: which files are written, what they hold, and what is told when something does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from handhold.cli import main, parse
from handhold.config import BadConfig, RenderConfig
from handhold.errors import UnusableInput
from handhold.runs import Run
from handhold.scene import load_npz, save_npz
from handhold.view.novel import Camera
from handhold.view.novel_files import frame_rows, pair, read_cameras, read_poses, render_run
from tiny_scene import FRAMES, SIZE, made

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run folder with the tiny scene and its Gaussians."""
    scene, splats = made()
    run = Run(tmp_path_factory.mktemp("run"))
    scene.save(run.scene_path)
    for name, g in splats.items():
        save_npz(run.fit_dir / f"{name}_gaussians.npz", g.arrays())
    (run.root / "run.json").write_text("{}")
    return run


def images(folder: Path) -> dict[int, np.ndarray]:
    return {int(p.stem): cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in sorted(folder.glob("*.png"))}


def film(path: Path) -> np.ndarray:
    with av.open(str(path)) as f:
        return np.stack([x.to_ndarray(format="rgb24") for x in f.decode(video=0)])


def test_the_clip_with_everything(run, tmp_path):
    every = RenderConfig(
        outputs=("color", "depth", "masks", "normals"), png=True, posed_splats=True, out=tmp_path / "r"
    )
    told = render_run(run, every)
    assert told["pictures"] == FRAMES and told["drawn_as"] == "splats" and told["bodies"] == ["right", "object"]
    numbers = [10, 11, 12]  # of the frames in the video
    colors = images(tmp_path / "r" / "color")
    assert list(colors) == numbers and colors[10].shape == (SIZE[1], SIZE[0], 3)
    shown = film(tmp_path / "r" / "color.mp4")
    assert len(shown) == FRAMES and np.abs(shown[0].astype(int) - colors[10][..., ::-1]).mean() < 6
    seen, whole = (images(tmp_path / "r" / k / "object") for k in ("masks", "masks_alone"))
    hand = images(tmp_path / "r" / "masks" / "right")
    assert list(seen) == list(hand) == numbers and set(np.unique(whole[10])) == {0, 255} and not hand[12].any()
    for n in numbers:
        depth = load_npz(tmp_path / "r" / "depth" / f"{n:06d}.npz")
        assert set(depth) == {"depth", "right", "object"} and depth["depth"].dtype == np.float32
        assert ((depth["object"] > 0) == (whole[n] > 0)).all() and (
            (depth["depth"] > 0) == (seen[n] | hand[n] > 0)
        ).all()
    normals = images(tmp_path / "r" / "normals")
    assert np.median(normals[12][seen[12] > 0], axis=0) == pytest.approx([0, 128, 128], abs=3)  # b = z, towards us
    assert len(list((tmp_path / "r" / "splats" / "right").glob("*.ply"))) == 2
    assert len(list((tmp_path / "r" / "splats" / "object").glob("*.ply"))) == 3
    # what was drawn can be drawn again from its cameras, and nothing old stays
    again = RenderConfig(camera=str(tmp_path / "r" / "cameras.npz"), png=True, out=tmp_path / "s")
    render_run(run, again)
    assert all((v == colors[k]).all() for k, v in images(tmp_path / "s" / "color").items())
    render_run(run, RenderConfig(frames="1", out=tmp_path / "r"))
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["cameras.npz", "color"]


def test_one_frame_from_all_sides_and_without_gaussians(run, tmp_path):
    told = render_run(run, RenderConfig(camera="orbit", frames="1", size=(33, 21), draw="meshes", out=tmp_path / "r"))
    assert told["pictures"] == 48 and told["drawn_as"] == "meshes"
    shown = film(tmp_path / "r" / "color.mp4")
    assert shown.shape == (48, 22, 34, 3)  # an even size
    z = load_npz(tmp_path / "r" / "cameras.npz")
    assert z["world_from_cam"].shape == (48, 4, 4) and z["size"].tolist() == [33, 21] and set(z["frames"]) == {11}
    assert np.ptp(shown.astype(int).mean((1, 2)), axis=0).max() > 5


def test_poses_from_files(run, tmp_path):
    own = read_poses(run.scene_path)["right"]
    assert np.isnan(own.pose[2]).all() and own.pose.shape == (FRAMES, 16, 3) and own.transl.shape == (FRAMES, 3)
    (tmp_path / "p.json").write_text(json.dumps({"right": {"pose": np.full((15, 3), 0.1).tolist()}}))
    given = read_poses(tmp_path / "p.json")["right"]
    assert given.pose.shape == (15, 3) and given.transl is None
    pictures = []
    for k, pose in enumerate((None, str(run.scene_path), "fist", str(tmp_path / "p.json"))):
        render_run(run, RenderConfig(pose=pose, frames="0", out=tmp_path / str(k)))
        pictures.append(images(tmp_path / str(k) / "color")[10].astype(int))
    assert (pictures[0] == pictures[1]).all()
    assert all(np.abs(p - pictures[0]).mean() > 0.5 for p in pictures[2:])


def test_cameras_from_files(tmp_path):
    scene, _ = made()
    (tmp_path / "c.json").write_text(json.dumps({"world_from_cam": np.eye(4).tolist()}))
    camera = read_cameras(tmp_path / "c.json", scene, (96, 72))
    assert len(camera) == 1 and camera[0].K[0, 0] == 100 and camera[0].size == (96, 72)
    for bad in (
        {"world_from_cam": np.eye(3)},
        {"world_from_cam": 2 * np.eye(4)},
        {"world_from_cam": np.diag([1.0, 1, -1, 1])},
        {"world_from_cam": np.eye(4) * np.nan},
        {"world_from_cam": np.eye(4), "K": np.zeros((3, 3))},
        {"world_from_cam": np.eye(4), "size": np.array([1e9, 5])},
        {"K": np.eye(3)},
    ):
        save_npz(tmp_path / "c.npz", bad)
        with pytest.raises(UnusableInput, match="has"):
            read_cameras(tmp_path / "c.npz", scene)
    for text in ("[1, 2]", "{", '{"world_from_cam": "x"}', '{"world_from_cam": [[1], [2, 3]]}'):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(UnusableInput):
            read_cameras(tmp_path / "c.json", scene)


def test_frames_and_cameras_are_paired():
    assert frame_rows("all", 3) == [0, 1, 2] and frame_rows("2", 3) == [2] and frame_rows("0,2", 3) == [0, 2]
    assert frame_rows("::2", 5) == [0, 2, 4] and frame_rows("3:1:-1", 5) == [3, 2]
    for wrong in ("", "x", "3", "-1", "1:1", "1:2:3:4", "::0", "1,"):
        with pytest.raises(BadConfig, match="this clip has 0 to 2"):
            frame_rows(wrong, 3)
    c = [Camera(np.eye(3), np.eye(4), (16, 16)) for _ in range(3)]
    assert [r for r, _ in pair([7], c)] == [7, 7, 7] and pair([1, 2], c[:1]) == [(1, c[0]), (2, c[0])]
    with pytest.raises(UnusableInput, match="3 cameras for 2 frames"):
        pair([0, 1], c)


def test_the_command(run, tmp_path, capsys):
    out = tmp_path / "r"
    argv = f"render {run.root} --camera orbit --without right --frames 0:2 --size 64 48 --json --out {out}".split()
    assert parse(argv)[1].order() == RenderConfig("orbit", "0:2", ("right",), size=(64, 48), out=out)
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and told["bodies"] == ["object"] and Path(told["files"]["color.mp4"]).is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for more, code in (
        (["--frames", "99"], 2),
        (["--size", "4", "4"], 2),
        (["--without", "left"], 3),
        (["--pose", "sideways"], 3),
        (["--camera", "nowhere.npz"], 3),
        (["--out", str(tmp_path / "mine")], 3),
    ):
        assert main(["render", str(run.root), "--quiet", *more]) == code, more
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["render", str(tmp_path), "--quiet"]) == 3 and (tmp_path / "mine" / "thesis.tex").is_file()


def test_a_hand_without_gaussians_makes_all_meshes(run, tmp_path):
    bare = Run(tmp_path / "run")
    bare.root.mkdir()
    scene, splats = made()
    replace(scene).save(bare.scene_path)
    save_npz(bare.fit_dir / "object_gaussians.npz", splats["object"].arrays())
    order = RenderConfig(frames="0", out=tmp_path / "r")
    assert render_run(bare, order)["drawn_as"] == "meshes"
    assert render_run(bare, replace(order, without=("right",)))["drawn_as"] == "splats"
    with pytest.raises(UnusableInput, match="The right has no Gaussians"):
        render_run(bare, replace(order, draw="splats"))
