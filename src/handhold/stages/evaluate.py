"""evaluate: scene.npz (and truth, if given) -> metrics.json."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from ..config import Config
from ..errors import UnusableInput
from ..files import write_atomically
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Scene, load_npz

ENOUGH = 0.9  # a body found in less of the clip than this makes the result partial


def evaluate(run: Run, config: Config, report: Progress) -> None:
    """Write metrics.json: how much of the clip was recovered and how, and the error against truth where truth is given.

    metrics.json: {"version": 1, "truth": bool, "metrics": {name: number or null}, "bodies": {name: {"frames", "valid",
    "confidence", "how": {reason: count}}}}. The names of the metrics are explained in `handhold.metrics.MEANING`.
    """
    scene = Scene.load(run.scene_path)
    bodies = {name: _state(body) for name, body in scene.bodies.items()}
    for name, state in bodies.items():
        if state["valid"] < ENOUGH * state["frames"]:
            what = "The object" if name == "object" else f"The {name} hand"
            report.partial(f"{what} was recovered in {state['valid']} of {state['frames']} frames.")
    if "object" not in bodies:
        report.partial("No object was recovered.")
    if not any(side in bodies for side in SIDES):
        report.partial("No hand was recovered.")
    metrics: dict[str, Any] = {}
    if config.evaluate.truth is not None:
        from ..methods.held_out import load as load_held_out
        from ..methods.held_out import score as score_held_out
        from ..metrics import evaluate as score

        report(0.1, "scoring")
        try:
            truth = load_npz(config.evaluate.truth)
            metrics = {k: _plain(v) for k, v in score(scene, truth).items()}
            if "masks" in truth and (drawn := load_held_out(run.fit_dir)) is not None:
                metrics |= {k: _plain(v) for k, v in score_held_out(drawn, truth["masks"]).items()}
        except (KeyError, IndexError, ValueError) as e:
            what = f"has no {e.args[0]!r}" if isinstance(e, KeyError) else "is of another clip"
            raise UnusableInput(f"The truth {config.evaluate.truth} {what}; give the truth of this video.") from e
    out = {"version": 1, "truth": config.evaluate.truth is not None, "metrics": metrics, "bodies": bodies}
    write_atomically(run.metrics_path, json.dumps(out, indent=1, allow_nan=False) + "\n")
    report(1.0, **{k: v for k, v in metrics.items() if v is not None and k in ("cd", "rot_deg", "mpjpe_right")})


def load_metrics(run: Run) -> dict[str, Any]:
    """metrics.json; empty when there is none."""
    try:
        return json.loads(run.metrics_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _state(body) -> dict[str, Any]:
    valid = np.asarray(body.valid, bool)
    how, counts = np.unique(np.asarray(body.reason, dtype=np.str_), return_counts=True)
    return {
        "frames": int(valid.size),
        "valid": int(valid.sum()),
        "confidence": _plain(np.mean(body.confidence[valid]) if valid.any() else 0.0),
        "how": {str(h): int(c) for h, c in zip(how, counts, strict=True)},
    }


def _plain(value: Any) -> float | None:
    """A number JSON has; None for what is not finite."""
    value = float(value)
    return value if math.isfinite(value) else None
