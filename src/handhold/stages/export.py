"""export: scene.npz -> object.ply, object_splat.ply, scene.glb, preview.mp4 and report.html."""

from __future__ import annotations

import torch

from ..config import Config
from ..errors import StageFailed
from ..export.glb import HandRig, hand_rig, write_glb
from ..export.meshes import write_ply
from ..export.splats import write_splats
from ..hand import HandModel
from ..methods.base import OBJECT_SPLATS
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Scene, Skinned, load_npz
from ..view.preview import write_preview
from ..view.report import write_report
from .evaluate import load_metrics
from .prepare import load_prepared
from .track import with_masks_anew

SPLATS = f"{OBJECT_SPLATS}.npz"  # in 3_fit/, by the fit stage: the arguments of `write_splats`


def export(run: Run, config: Config, report: Progress) -> None:
    """Write what other programs open, and the report. Needs no display."""
    scene, sequence = Scene.load(run.scene_path), with_masks_anew(run, load_prepared(run))
    if "object" in scene.bodies:
        write_ply(run.root / "object.ply", scene.bodies["object"].shape)
    splats = run.fit_dir / SPLATS
    if splats.is_file():
        z = load_npz(splats)
        values = (z[k] for k in ("means", "quats", "scales", "opacities", "colors"))
        write_splats(run.root / "object_splat.ply", *values)
    report(0.1, "scene.glb")
    rigs = _rigs(scene)
    if rigs is not None:
        write_glb(run.root / "scene.glb", scene, rigs)
    else:
        report.note("scene.glb was not written: the hand model of this scene is not the built-in one.")
    if config.export.preview:
        report(0.2, "preview.mp4")
        write_preview(run.root / "preview.mp4", sequence, scene)
    report(0.7, "report.html")
    stamps = {name: run.stamp(name) for name in ("prepare", "track", "fit", "evaluate")}
    stamps = {name: stamp for name, stamp in stamps.items() if stamp is not None}
    notes = tuple(dict.fromkeys([*(n for s in stamps.values() for n in s.notes), *report.notes]))
    partial = tuple(dict.fromkeys(r for s in stamps.values() for r in s.reasons))
    timings = {name: stamp.seconds for name, stamp in stamps.items()}
    metrics = load_metrics(run).get("metrics", {})
    metrics = {k: float("nan") if v is None else v for k, v in metrics.items()}
    write_report(run.root / "report.html", sequence, scene, metrics, notes, timings, partial)
    report(1.0)


def _rigs(scene: Scene) -> dict[str, HandRig] | None:
    """The hands as glTF needs them; None when the model of one is not at hand."""
    rigs = {}
    for side in SIDES:
        if side not in scene.bodies:
            continue
        motion = scene.bodies[side].motion
        if not isinstance(motion, Skinned):
            raise StageFailed(f"The {side} hand of the scene is not a skinned body; run the `fit` stage again.")
        if not motion.model.startswith("open"):
            return None
        model = HandModel.open(side, dtype=torch.float64)
        rigs[side] = hand_rig(model if motion.vertices.shape[1] == len(model.v_template) else model.sealed(), motion)
    return rigs
