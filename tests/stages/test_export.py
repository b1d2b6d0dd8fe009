"""The export stage: what earlier stages said reaches the report, and a hand whose model is unknown is no failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from truth_scene import demo_truth, truth_scene

from handhold.config import Config, ExportConfig
from handhold.errors import StageFailed
from handhold.progress import Progress
from handhold.runs import Run
from handhold.scene import Body, Scene, Sequence
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
    assert not (run.root / "object.ply").exists() and "scene.glb was not written" in report.notes[0]
    assert report.notes[0] in (run.root / "report.html").read_text(encoding="utf-8")


def test_a_hand_that_is_not_skinned_is_told(tmp_path, short):
    from handhold.stages.export import _rigs

    wrong = replace(short, bodies={"right": short.bodies["object"]})
    with pytest.raises(StageFailed, match="run the `fit` stage again"):
        _rigs(wrong)
