"""The export stage: what earlier stages said reaches the report, and a hand whose model is unknown is no failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from truth_scene import demo_truth, mirrored, truth_scene

from handhold.config import Config, ExportConfig
from handhold.errors import StageFailed, UnusableInput
from handhold.export.splats import FIELDS, SH_C0
from handhold.hand import HandModel
from handhold.progress import Progress
from handhold.runs import Run
from handhold.scene import Body, Scene, Sequence, save_npz
from handhold.shapes.gaussians import Gaussians
from handhold.shapes.skinned import SkinnedGaussians
from handhold.stages.export import export
from handhold.stages.prepare import save_prepared

QUICK = Config(export=ExportConfig(preview=False))


@pytest.fixture(scope="module")
def short() -> Scene:
    """Six frames of the demo's truth."""
    scene, some = truth_scene(demo_truth()), slice(0, 48, 8)
    bodies = {}
    for name, body in scene.bodies.items():
        m = body.motion
        keys = ("world_from_body",) if name == "object" else ("pose", "transl", "vertices", "joints")
        motion = replace(m, **{k: getattr(m, k)[some] for k in keys})
        bodies[name] = Body(body.shape, motion, body.valid[some], body.confidence[some], body.reason[some])
    return replace(scene, frames=scene.frames[some], world_from_cam=scene.world_from_cam[some], bodies=bodies)


def ready(root: Path, scene: Scene) -> Run:
    run = Run(root)
    width, height = scene.size
    frames = np.full((len(scene.frames), height, width, 3), 90, np.uint8)
    save_prepared(run, Sequence(frames, scene.frames, scene.fps, scene.K, "given", masks={}))
    scene.save(run.scene_path)
    return run


def test_reasons_are_shown_as_such_and_notes_once(tmp_path, short):
    run = ready(tmp_path, short)
    for stage in ("prepare", "track"):
        run.begin(stage, "key", (), False)
        run.finish(stage, "key", (), 1.0, ["the focal length is a guess"], ["half of the object is <unknown>"])
    export(run, QUICK, Progress())
    page = (run.root / "report.html").read_text(encoding="utf-8")
    assert page.count("half of the object is &lt;unknown&gt;") == 1 and "Partial: " not in page
    assert page.count("the focal length is a guess") == 1
    assert (run.root / "scene.glb").is_file() and (run.root / "object.ply").is_file()
    assert not (run.root / "preview.mp4").exists() and not (run.root / "object_splat.ply").exists()


def test_a_hand_of_another_model_leaves_out_the_glb_alone(tmp_path, short):
    hand = short.bodies["right"]
    other = replace(hand, motion=replace(hand.motion, model="mano_right"))
    run, report = ready(tmp_path, replace(short, bodies={"right": other})), Progress()
    export(run, QUICK, report)
    assert not (run.root / "scene.glb").exists() and (run.root / "report.html").is_file()
    assert not (run.root / "object.ply").exists() and "scene.glb and hand meshes were not" in report.notes[0]
    assert report.notes[0] in (run.root / "report.html").read_text(encoding="utf-8")


def read_ply(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, colours and faces of a mesh."""
    head, body = path.read_bytes().split(b"end_header\n", 1)
    count = int(head.split(b"element vertex ")[1].split()[0])
    points = np.frombuffer(body, [("p", "<f4", 3), ("c", "u1", 3), ("o", "u1")], count)
    faces = np.frombuffer(body[points.nbytes :], [("n", "u1"), ("i", "<i4", 3)])["i"]
    return points["p"], points["c"], faces


def test_hands_are_closed_coloured_meshes_at_rest_and_splats(tmp_path, short):
    """The same for a left hand; its Gaussians are written as they are at rest."""
    scene = mirrored(short)
    hand = scene.bodies["left"]
    model = HandModel.open("left", dtype=torch.float64)
    rest = model.with_shape(torch.as_tensor(hand.motion.betas, dtype=torch.float64)).vertices.numpy()
    colors = np.clip(0.5 + 4 * rest, 0, 1).astype(np.float32)
    painted = replace(hand, shape=replace(hand.shape, colors=colors))
    run = ready(tmp_path, replace(scene, bodies={**scene.bodies, "left": painted}))
    n = len(rest)
    quats, scales = torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1), torch.full((n, 3), 1e-3)
    points, opacities = torch.from_numpy(rest).float(), torch.full((n,), 0.9)
    g = Gaussians(points, quats, scales, opacities, torch.from_numpy(colors), torch.zeros(n))
    save_npz(run.fit_dir / "left_gaussians.npz", SkinnedGaussians(g, model.weights.float()).arrays())
    export(run, QUICK, Progress())
    points, seen, faces = read_ply(run.root / "left.ply")
    directed = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    _, twice = np.unique(np.sort(directed, 1), axis=0, return_counts=True)
    assert (twice == 2).all() and len(np.unique(directed, axis=0)) == len(directed)  # every edge twice, once each way
    a, b, c = (points[faces[:, k]].astype(float) for k in range(3))
    assert 1e-4 < np.einsum("ni,ni->", a, np.cross(b, c)) / 6 < 1e-3  # cubic metres, outwards
    assert np.allclose(points[:n], rest, atol=1e-6) and len(points) == n + 1
    assert np.abs(seen[:n] / 255 - colors).max() < 0.003
    body = (run.root / "left_splat.ply").read_bytes().split(b"end_header\n", 1)[1]
    table = np.frombuffer(body, "<f4").reshape(-1, len(FIELDS))
    assert np.allclose(table[:, :3], rest, atol=1e-6) and np.allclose(table[:, 6:9] * SH_C0 + 0.5, colors, atol=1e-5)
    assert not (run.root / "right.ply").exists() and not (run.root / "object_splat.ply").exists()


def test_broken_gaussians_are_told(tmp_path, short):
    run = ready(tmp_path, short)
    save_npz(run.fit_dir / "right_gaussians.npz", {"means": np.zeros((3, 3))})
    with pytest.raises(UnusableInput, match="right_gaussians.npz cannot be used: there are no quats"):
        export(run, QUICK, Progress())


def test_a_hand_that_is_not_skinned_is_told(tmp_path, short):
    from handhold.stages.export import _rigs

    wrong = replace(short, bodies={"right": short.bodies["object"]})
    with pytest.raises(StageFailed, match="run the `fit` stage again"):
        _rigs(wrong)
