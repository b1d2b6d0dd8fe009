"""export: scene.npz -> object.ply, object_splat.ply, scene.glb, preview.mp4 and report.html."""

from __future__ import annotations

import numpy as np

from ..config import Config
from ..errors import StageFailed
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Scene, Skinned, load_npz
from .evaluate import load_metrics
from .prepare import load_prepared

SPLATS = (
    "object_gaussians.npz"  # in 3_fit/, by the fit stage: means, quats, scales, opacities, colors of `write_splats`
)


def export(run: Run, config: Config, report: Progress) -> None:
    """Write what other programs open, and the report. Needs no display."""
    from ..export.glb import write_glb
    from ..export.meshes import write_ply
    from ..export.splats import write_splats
    from ..view.report import write_report

    scene, sequence = Scene.load(run.scene_path), load_prepared(run)
    if "object" in scene.bodies:
        write_ply(run.root / "object.ply", scene.bodies["object"].shape)
    splats = run.fit_dir / SPLATS
    if splats.is_file():
        z = load_npz(splats)
        write_splats(
            run.root / "object_splat.ply", *(z[k] for k in ("means", "quats", "scales", "opacities", "colors"))
        )
    report(0.1, "scene.glb")
    rigs = {side: rig for side in SIDES if side in scene.bodies and (rig := hand_rig(scene, side)) is not None}
    if all(side in rigs or side not in scene.bodies for side in SIDES):
        write_glb(run.root / "scene.glb", scene, rigs)
    else:
        report.note("scene.glb was not written: the hand model of this scene is not the built-in one.")
    if config.export.preview:
        from ..view.preview import write_preview

        report(0.2, "preview.mp4")
        write_preview(run.root / "preview.mp4", sequence, scene)
    report(0.7, "report.html")
    stamps = {name: run.stamp(name) for name in ("prepare", "track", "fit", "evaluate")}
    stamps = {name: stamp for name, stamp in stamps.items() if stamp is not None}
    notes = [f"Partial: {r}" for s in stamps.values() for r in s.reasons] + [
        n for s in stamps.values() for n in s.notes
    ]
    timings = {name: stamp.seconds for name, stamp in stamps.items()}
    metrics = load_metrics(run).get("metrics", {})
    metrics = {k: float("nan") if v is None else v for k, v in metrics.items()}
    write_report(run.root / "report.html", sequence, scene, metrics, tuple(dict.fromkeys(notes)), timings)
    report(1.0)


def hand_rig(scene: Scene, side: str):
    """The shaped and skinned hand of one side as glTF needs it; None when its model is not at hand."""
    import torch

    from ..export.glb import HandRig
    from ..hand.model import HandModel

    motion = scene.bodies[side].motion
    if not isinstance(motion, Skinned):
        raise StageFailed(f"The {side} hand of the scene is not a skinned body; run the `fit` stage again.")
    model = HandModel.open(side, dtype=torch.float64)
    if not motion.model.startswith("open"):
        return None
    if motion.vertices.shape[1] != len(model.v_template):
        model = model.sealed()
    shaped = model.with_shape(torch.as_tensor(np.asarray(motion.betas, np.float64)))
    posed = shaped.with_pose(
        torch.as_tensor(np.asarray(motion.pose, np.float64)), torch.as_tensor(np.asarray(motion.transl, np.float64))
    )
    world_from_joint = np.tile(np.eye(4), (len(motion.pose), 16, 1, 1))
    world_from_joint[..., :3, :3] = posed.global_rotations.numpy()
    world_from_joint[..., :3, 3] = posed.mano_joints.numpy()
    return HandRig(
        vertices=shaped.vertices.numpy(),
        joints=shaped.rest_joints.numpy(),
        weights=model.weights.numpy(),
        parents=np.asarray(model.parents),
        world_from_joint=world_from_joint,
    )
