"""One real run: every second frame of the shipped clip at 320 pixels, from raw video to a scored scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.spatial import cKDTree

from handhold import assets, pipeline
from handhold.config import Config, EvaluateConfig, PrepareConfig
from handhold.errors import MissingAsset
from handhold.geometry import meshes
from handhold.runs import Run
from handhold.scene import Scene, load_npz
from handhold.tracking.rungs import MEANING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FILES = ("object.ply", "object_splat.ply", "scene.glb", "preview.mp4", "report.html")
OUTPUTS = ("run.json", "scene.npz", "metrics.json", *FILES)


def settings(clip) -> Config:
    prepare = PrepareConfig(K=clip / "K.txt", stride=2, max_side=320)
    return Config(prepare=prepare, evaluate=EvaluateConfig(truth=clip / "gt.npz"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, demo_clip) -> pipeline.Result:
    try:
        for name in assets.ASSETS:
            assets.path(name)
    except MissingAsset as e:
        pytest.skip(str(e))
    return pipeline.run(demo_clip / "video.mp4", tmp_path_factory.mktemp("end") / "demo", settings(demo_clip))


def test_from_pixels_to_a_scored_scene(finished):
    run = finished.run
    assert finished.stages == ("prepare", "track", "fit", "evaluate", "export") and not finished.kept
    missing = [name for name in OUTPUTS if not (run.root / name).is_file()]
    assert not missing and all((run.root / name).stat().st_size > 100 for name in OUTPUTS)

    m = json.loads(run.metrics_path.read_text())["metrics"]
    print({k: round(v, 2) for k, v in m.items()}, finished.seconds)
    assert m["frames"] >= 40  # of the clip's frames; every second was used, so 50 is all
    assert m["mpjpe_right"] < 22 and m["rot_deg"] < 6 and m["cd"] < 1.2 and m["f10"] > 75 and m["cd_right"] < 25
    assert 0.6 < m["scale_ratio"] < 1.6


def test_the_scene_is_whole(finished, demo_clip):
    scene = Scene.load(finished.run.scene_path)
    assert set(scene.bodies) == {"right", "object"} and scene.size == (320, 240)
    assert scene.frames.tolist() == list(range(0, 48, 2)) and np.allclose(scene.world_from_cam, np.eye(4))
    hand, thing = scene.bodies["right"], scene.bodies["object"]
    assert np.isfinite(hand.motion.joints[hand.valid]).all() and np.isfinite(thing.motion.world_from_body).all()
    for body in (hand, thing):
        assert ((body.confidence >= 0) & (body.confidence <= 1)).all() and set(body.reason) <= set(MEANING)
    shape = thing.shape
    assert meshes.is_watertight(shape.faces) and shape.observed.mean() > 0.3
    size = np.ptp(shape.vertices, axis=0)
    true = np.ptp(load_npz(demo_clip / "gt.npz")["object_vertices"], axis=0)
    assert 0.4 < np.linalg.norm(size) / np.linalg.norm(true) < 2.5
    # hand and object are where one could hold the other
    i = int(np.argmax(thing.valid & hand.valid))
    gap = cKDTree(thing.posed(i)).query(hand.posed(i))[0].min()
    assert gap < 0.02


def test_the_report_stands_alone(finished):
    page = (finished.run.root / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in page and "default-src 'none'" in page and "mpjpe" in page.lower()


def test_the_same_command_again_keeps_every_stage(finished, demo_clip):
    before = {name: (finished.run.root / name).stat().st_mtime_ns for name in OUTPUTS if name != "run.json"}
    again = pipeline.run(demo_clip / "video.mp4", finished.run.root, settings(demo_clip))
    assert again.kept == again.stages == finished.stages and again.reasons == finished.reasons
    assert before == {name: (finished.run.root / name).stat().st_mtime_ns for name in before}


def test_a_lost_output_is_made_again_and_the_same(finished, demo_clip):
    """What a kill between two stages leaves: the later stage runs again, to the same bytes."""
    run = Run(finished.run.root)
    old = run.metrics_path.read_bytes()
    run.metrics_path.unlink()
    again = pipeline.run(demo_clip / "video.mp4", run.root, settings(demo_clip), last="evaluate")
    assert again.kept == ("prepare", "track", "fit") and run.metrics_path.read_bytes() == old
