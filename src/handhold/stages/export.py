"""export: scene.npz -> <body>.ply, <body>_splat.ply, scene.glb, preview.mp4 and report.html."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import Config
from ..errors import StageFailed
from ..export.glb import HandRig, hand_rig, write_glb
from ..export.meshes import sealed, write_ply
from ..export.splats import write_splats
from ..hand import HandModel
from ..methods.base import fitted_splats
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Scene, Skinned
from ..shapes.skinned import SkinnedGaussians
from ..view.preview import write_preview
from ..view.report import write_report
from .evaluate import load_metrics
from .prepare import load_prepared
from .track import with_masks_anew


def export(run: Run, config: Config, report: Progress) -> None:
    """Write what other programs open, and the report. Needs no display."""
    scene, sequence = Scene.load(run.scene_path), with_masks_anew(run, load_prepared(run))
    if "object" in scene.bodies:
        write_ply(run.root / "object.ply", scene.bodies["object"].shape)
    for name, g in fitted_splats(run.fit_dir, ("object", *SIDES)).items():
        write_splats(run.root / f"{name}_splat.ply", **(g.rest if isinstance(g, SkinnedGaussians) else g).arrays())
    report(0.1, "scene.glb")
    rigs = _rigs(scene)
    if rigs is not None:
        for side, rig in rigs.items():
            rest = sealed(replace(scene.bodies[side].shape, vertices=rig.vertices))
            write_ply(run.root / f"{side}.ply", rest, f"{side} hand at rest")
        write_glb(run.root / "scene.glb", scene, rigs)
    else:
        report.note("scene.glb and hand meshes were not written: the hand model is not the built-in one.")
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
