"""Clips: the truth fits the pictures and itself, objects move with the hands that hold them, and files are as told."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from handhold.cli import main, parse
from handhold.datasets.synthetic import look, motion
from handhold.datasets.synthetic.assemble import FAMILIES
from handhold.datasets.synthetic.clips import draw_clip, make_clip, truth_of, turned, turned_light
from handhold.datasets.synthetic.objects import make_object_bank
from handhold.datasets.synthetic.scenes import Cast, Synth, SynthConfig
from handhold.datasets.synthetic.staging import DEEPEST, ClipConfig, stage_clip
from handhold.datasets.video import read_video
from handhold.errors import UnusableInput
from handhold.geometry.rigid import apply, invert, so3_exp
from handhold.scene import load_npz

F, SIZE = 10, (96, 72)


class Plain(Synth):
    """The generator without its rooms and prints, which take seconds to draw."""

    def cast(self, n, g, split="train", size=None):
        table = look.Materials.table([look.sample_materials(n, "plain", g) for _ in FAMILIES])
        x = torch.linspace(0.1, 0.5, size[0])
        return Cast(table, look.sample_lights(n, g), x.expand(n, 3, size[1], size[0]).clone())

    def textures(self, split):
        return look.make_textures(2, 32)


@pytest.fixture(scope="module")
def synth():
    torch.set_num_threads(1)
    bank = make_object_bank(26, 3)
    wanted = [int(torch.nonzero(x)[0, 0]) for x in (bank.hinged, bank.soft & ~bank.hinged)]
    assert len(wanted) == 2
    return Plain(SynthConfig(size=72, clutter=0, bystanders=0), bank=bank)


@pytest.fixture(scope="module")
def clips(synth):
    made = {}

    def get(kind, hands="right", camera="static", seed=1):
        key = (kind, hands, camera, seed)
        if key not in made:
            config = ClipConfig(kind, hands, camera, turn=150)
            staged = stage_clip(synth, config, seed, F, SIZE)
            batch = draw_clip(synth, staged, seed, config.split, SIZE)
            made[key] = staged, batch, truth_of(synth, staged, batch)
        return made[key]

    return get


@pytest.mark.parametrize(
    "kind,hands,camera",
    [
        ("hold", "left", "static"),
        ("regrasp", "right", "moving"),
        ("hinge", "left", "static"),
        ("squeeze", "left", "moving"),
    ],
)
def test_truth_fits_the_pictures(clips, kind, hands, camera):
    _, batch, gt = clips(kind, hands, camera)
    assert batch.image.shape == (F, 3, SIZE[1], SIZE[0]) and gt["masks"].shape == (F, SIZE[1], SIZE[0])
    shape = gt.get("object_vertices_per_frame", np.repeat(gt["object_vertices"][None], F, 0))
    v = np.einsum("fij,fvj->fvi", gt["object_poses"][:, :3, :3], shape) + gt["object_poses"][:, None, :3, 3]
    n = v.shape[1]
    np.testing.assert_allclose(v, batch.object.vertices[:, :n].numpy(), atol=1e-5)
    for points, label in ((v, 3), (gt[f"{hands}_vertices"], 1 if hands == "right" else 2)):
        pixel = points @ gt["K"].T
        pixel = pixel[..., :2] / pixel[..., 2:]
        for f in range(F):
            rows, columns = np.nonzero(gt["masks"][f] == label)
            if len(rows):  # inside the box of the projected vertices
                low, high = pixel[f].min(0) - 1, pixel[f].max(0) + 1
                assert columns.min() >= low[0] and columns.max() <= high[0]
                assert rows.min() >= low[1] and rows.max() <= high[1]
                z = gt["depth"][f, rows, columns].astype(float)
                assert z.min() > points[f, :, 2].min() - 0.01 and z.max() < points[f, :, 2].max() + 0.01
    assert (gt["depth"] > 0)[gt["masks"] > 0].all()
    # faces point outward: the volume is positive, mirrored or not
    a, b, c = (shape[0][gt["object_faces"][:, k]] for k in range(3))
    assert np.einsum("ij,ij->i", a, np.cross(b, c)).sum() > 0


def test_hands_follow_their_parameters(synth, clips):
    _, _, gt = clips("hold", "left")
    assert "right_joints" not in gt
    model = synth.hand.mirrored()
    theta = so3_exp(torch.from_numpy(gt["left_pose"]))
    posed = model.with_shape(torch.from_numpy(gt["betas"])).with_pose(theta, torch.from_numpy(gt["left_transl"]))
    np.testing.assert_allclose(posed.vertices.numpy(), gt["left_vertices"], atol=2e-5)
    np.testing.assert_allclose(posed.joints.numpy(), gt["left_joints"], atol=2e-5)


@pytest.mark.parametrize(
    "kind,hands", [("hold", "right"), ("grasp", "right"), ("regrasp", "right"), ("hinge", "right")]
)
def test_what_is_held_moves_with_the_hand_and_nothing_goes_in(synth, clips, kind, hands):
    staged, batch, gt = clips(kind, hands, "moving" if kind == "regrasp" else "static")
    spec, held = staged.spec, gt["held"]
    wrist = batch.right.rotations[:, 0]
    inner = wrist.mT @ spec.cam_from_object[:, :3, :3]
    still = invert(staged.cam_from_world) @ spec.cam_from_object
    for f in range(1, F):
        second = motion.schedule(kind, F).second > 0.5
        if held[f] and held[f - 1] and second[f] == second[f - 1]:
            torch.testing.assert_close(inner[f], inner[f - 1], atol=1e-4, rtol=0)
        if not held[f] and not held[f - 1]:
            torch.testing.assert_close(still[f], still[f - 1], atol=1e-4, rtol=0)
    points = apply(invert(spec.cam_from_object), batch.right.vertices)
    inside = -synth.bank.signed_distance(spec.index, points, spec.angle).amin(1)
    assert inside[torch.from_numpy(held)].max() < DEEPEST + 0.002
    assert gt["right_contact"][held].any(1).all() and not gt["right_contact"][~held].any()


def test_pressing_dents_the_object_where_it_is_touched(clips):
    staged, _, gt = clips("squeeze", "left", "moving")
    rest, v = gt["object_vertices"], gt["object_vertices_per_frame"]
    size = np.linalg.norm(v - rest, axis=-1).max(1)
    assert size[0] < 1e-4 and 0.002 < size.max() < 0.015
    assert (staged.shape[0, : len(rest)] * torch.tensor([-1.0, 1, 1])).sub(torch.from_numpy(v[0])).abs().max() < 1e-6


def test_a_hinge_turns_its_part_about_its_axis(clips):
    _, _, gt = clips("hinge", "left")
    angle, part = gt["joint_angle"], gt["part"] == 1
    f = int(np.abs(angle).argmax())
    assert abs(angle[f]) > 0.1 and part.any() and (~part).any()
    turn = so3_exp(torch.from_numpy(gt["joint_axis"] * angle[f])).numpy()
    x = (gt["object_vertices"] - gt["joint_pivot"]) @ turn.T + gt["joint_pivot"]
    moved = gt["object_vertices_per_frame"][f]
    np.testing.assert_allclose(moved[part], x[part], atol=1e-5)
    np.testing.assert_allclose(moved[~part], gt["object_vertices"][~part], atol=1e-6)


def test_a_clip_is_a_function_of_its_seed(synth):
    config = ClipConfig(turn=90)
    a, b, c = (stage_clip(synth, config, seed, 6, SIZE).spec for seed in (4, 4, 5))
    torch.testing.assert_close(a.cam_from_object, b.cam_from_object, atol=0, rtol=0)
    torch.testing.assert_close(a.rotations, b.rotations, atol=0, rtol=0)
    assert not torch.equal(a.cam_from_object, c.cam_from_object)


def test_a_moving_camera_moves_all_alike(synth):
    still = stage_clip(synth, ClipConfig("empty", "both", turn=90), 2, 6, SIZE)
    moving = stage_clip(synth, ClipConfig("empty", "both", "moving", turn=90), 2, 6, SIZE)
    assert torch.allclose(still.cam_from_world, torch.eye(4).expand(6, 4, 4))
    extra = invert(moving.cam_from_world)[:, None] @ moving.spec.cam_from_extra
    torch.testing.assert_close(extra, extra[:1].expand_as(extra), atol=1e-5, rtol=0)


def test_turned_backgrounds_follow_the_rays():
    K = torch.tensor([[[60.0, 0, 32], [0, 60, 24], [0, 0, 1]]])
    y, x = torch.meshgrid(torch.arange(48) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    picture = torch.stack([x, y, x + y])[None]
    turn = so3_exp(torch.tensor([[0.05, -0.08, 0.03]]))
    got = turned(picture, K, turn)[0]
    ray = torch.linalg.inv(K[0]) @ torch.tensor([30.5, 20.5, 1.0])
    before = K[0] @ (turn[0].T @ ray)  # x_cam = turn x_world
    np.testing.assert_allclose(got[:2, 20, 30], (before[:2] / before[2]).numpy(), atol=0.05)


def test_turned_light_stays_where_it_was():
    light = look.sample_lights(2, torch.Generator().manual_seed(0))
    turn = so3_exp(torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.2, 0.1]]))
    got = turned_light(light, turn)
    normal = torch.nn.functional.normalize(torch.randn(2, 3, generator=torch.Generator().manual_seed(1)), dim=1)
    seen = (turn @ normal[..., None])[..., 0]
    for before, after in ((light.direction, got.direction), (light.plane[:, None], got.plane[:, None])):
        torch.testing.assert_close((before @ normal[..., None]), (after @ seen[..., None]))
    even = torch.einsum("bi,bic->bc", normal, light.harmonics[:, 1:4])
    torch.testing.assert_close(torch.einsum("bi,bic->bc", seen, got.harmonics[:, 1:4]), even)


def test_files_can_be_read_and_scored(synth, tmp_path, clips):
    folder = make_clip(tmp_path / "c", ClipConfig("hold", turn=150), 1, F, 12.0, SIZE, synth=synth)
    sequence = read_video(folder / "video.mp4", min_frames=2)
    assert len(sequence) == F and sequence.size == SIZE and abs(sequence.fps - 12) < 0.01
    _, batch, truth = clips("hold")
    shown = sequence.frames.astype(float) / 255
    assert np.abs(shown - batch.image.permute(0, 2, 3, 1).numpy()).mean() < 0.03
    gt = load_npz(folder / "gt.npz")
    np.testing.assert_array_equal(gt["masks"], truth["masks"])
    fx, fy, cx, cy = (float(v) for v in (folder / "K.txt").read_text().split())
    np.testing.assert_allclose([fx, fy, cx, cy], gt["K"][[0, 1, 0, 1], [0, 1, 2, 2]], rtol=1e-6)
    assert json.loads((folder / "clip.json").read_text())["clip"]["kind"] == "hold"
    assert {"object_vertices", "object_faces", "object_poses", "right_joints", "right_vertices"} <= set(gt)


def test_wrong_settings(synth, tmp_path):
    for config in (ClipConfig("dance"), ClipConfig(hands="three"), ClipConfig(camera="shaky")):
        with pytest.raises(ValueError, match="must be one of"):
            stage_clip(synth, config, 0, 8, SIZE)
    with pytest.raises(ValueError, match="even"):
        make_clip(tmp_path / "c", synth=synth, size=(97, 72))
    rigid_only = replace(synth.bank, hinged=torch.zeros_like(synth.bank.hinged))
    with pytest.raises(UnusableInput, match="No object with a hinge"):
        stage_clip(Plain(synth.config, bank=rigid_only), ClipConfig("hinge"), 0, 8, SIZE)
    assert not (tmp_path / "c").exists()


def test_command_line(tmp_path, monkeypatch, synth, capsys):
    _, args = parse(["synth", "o", "--clip", "--kind", "regrasp", "--frame-size", "96", "72"])
    assert args.clip and args.kind == "regrasp" and args.frame_size == (96, 72)
    monkeypatch.setattr(
        "handhold.datasets.synthetic.scenes.Synth", lambda config, device: Plain(config, device, synth.bank)
    )
    argv = ["synth", str(tmp_path / "c"), "--clip", "--kind", "empty", "--frames", "3", "--frame-size", "96", "72"]
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] and "object_poses" not in load_npz(told["files"]["gt.npz"])
    argv = ["synth", str(tmp_path / "s"), "--samples", "4", "--size", "64", "--shard", "16", "--quiet"]
    assert main(argv) == 0 and main(argv) == 0
    assert main([*argv, "--seed", "1"]) == 3 and "other settings" in capsys.readouterr().err
    for wrong in (["--samples", "0"], ["--shard", "24"], ["--frame-size", "97", "72"]):
        assert main(["synth", str(tmp_path / "x"), *wrong]) == 2
    (tmp_path / "far.obj").write_text("v 0 0 0\nv 9 0 0\nv 0 9 0\nv 0 0 9\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    monkeypatch.undo()
    assert main(["synth", str(tmp_path / "x"), "--meshes", str(tmp_path), "--objects", "1"]) == 3
    assert "m across" in capsys.readouterr().err and not (tmp_path / "x").exists()
