"""The hands of a clip, for `track`: which there are, and each fitted in the object's frame or alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config import Config
from ..hand import HandModel
from ..parallel import each
from ..progress import Progress
from ..scene import SIDES, Sequence
from .track_object import hand_alone

if TYPE_CHECKING:
    from ..tracking.grasp import GraspFit
    from ..tracking.sfm import SfmResult

MISREAD = 0.3  # of the other hand's frames: a hand seen in fewer, and never beside it, is not there


def fit_hands(
    sequence: Sequence,
    sfm: SfmResult,
    config: Config,
    report: Progress | None,
    say=lambda share, what: None,
    scale: float | None = None,
    alone: dict[str, GraspFit] | None = None,
) -> tuple[dict[str, GraspFit], float]:
    """The hands that may hold the object in its frame, others alone (all, where it has no poses); metres per unit of
    `sfm`.

    report: for what the user should know, None to say nothing; say: called with 0..1 and what is done; scale: what an
    earlier fit found, which two hands then need not agree on again; alone: `track_object.hands_alone`, whose fit stays
    where the object's frame does not explain the hand better.
    """
    from ..tracking.contact import beside_in_picture, may_hold
    from ..tracking.fiducial import stiff_hand
    from ..tracking.grasp import HIDDEN, fit_grasp

    without = config.track.without
    hand_masks = {s: sequence.masks[s] for s in SIDES if s in sequence.masks}
    models = {s: HandModel.open(s, dtype=torch.float64) for s in sides_of(sequence, report)}
    lost = int(sfm.registered.sum()) < 3
    far = _distance(sfm)
    hands, alone = {}, alone or {}
    holding = [s for s in models if may_hold(sequence, s)] or list(models)

    def fit_alone(s: str) -> GraspFit:
        return alone[s] if s in alone else hand_alone(sequence, s)

    if lost or "grasp" in without:
        for s, m in models.items():
            hands[s] = fit_alone(s)
            beside = s in hand_masks and beside_in_picture(hand_masks[s], sequence.masks["object"]).mean() > 0.5
            if lost and beside and "fiducial" not in without:
                marks = sequence.landmarks[s]
                clicked = marks.source == "mediapipe"
                hands[s] = stiff_hand(m, sequence.K, marks, hands[s], clicked, sequence.regressed.get(s))
        return hands, 1.0 if lost else _common_scale(hands, far, report)
    for again in range(int(len(holding) == 2 and scale is not None), 2):
        say(again / 2, f"{' and '.join(holding)} hand in the object's frame")

        def fit(s: str, known: tuple[float, float] | None = (scale, 0.01) if again else None) -> GraspFit:
            if s not in holding:
                return fit_alone(s)
            others = [m for side, m in hand_masks.items() if side != s]
            return fit_grasp(
                models[s], sequence.K, sfm.cam_from_object, sfm.registered, sfm.confidence, sequence.landmarks[s],
                hand_masks=hand_masks.get(s), object_points=sfm.points, seed=config.seed,
                object_masks=np.any([sequence.masks["object"], *others], axis=0),
                mediapipe=sequence.landmarks[s].source == "mediapipe",
                scale_prior=known, regressed=sequence.regressed.get(s),
                silhouettes="silhouette" not in without, regrasps="windows" not in without,
                slow_motion="slow-motion" not in without, hidden=1.0 if "visibility" in without else HIDDEN,
            )  # fmt: skip

        hands = dict(zip(models, each(fit, models), strict=True))
        for s, h in hands.items():
            if s in alone and alone[s].confidence.mean() >= h.confidence.mean():
                hands[s] = alone[s]
        scale = _common_scale(hands, far, report)
        if sum(np.isfinite(h.scale_std) for h in hands.values()) < 2:
            break  # two hands that tell the object's size must agree on it; one hand alone does
    return hands, scale


def sides_of(sequence: Sequence, report: Progress | None = None) -> list[str]:
    """The hands that something tells of. One seen in few frames, and never beside the other, is the other misread."""
    from ..tracking.grasp import found

    seen = {s: found(m, sequence.regressed.get(s)) for s, m in sequence.landmarks.items()}
    sides = sorted((s for s in seen if seen[s].any()), key=lambda s: -seen[s].sum())
    if len(sides) == 2:
        more, less = (seen[s] for s in sides)
        if less.sum() < MISREAD * more.sum() and not (more & less).any():
            if report is not None:
                report.note(f"The {sides[1]} hand of {less.sum()} frames was taken for the {sides[0]} one, misread.")
            return sides[:1]
    return [s for s in sequence.landmarks if s in sides]


def _distance(sfm: SfmResult) -> float:
    """How far away the object is, in units of its frame: of its points, as its frame may begin anywhere."""
    if not len(sfm.points):
        return 1.0
    pose = sfm.cam_from_object[sfm.registered]
    return max(float(np.median(pose[:, 2, :3] @ np.median(sfm.points, axis=0) + pose[:, 2, 3])), 1e-9)


def _common_scale(hands, far: float, report: Progress | None) -> float:
    """Metres per unit of the object's frame, in which it is `far` away: the hands' own estimates, weighted by how sure
    each is.

    When no hand tells (none goes along with the object and was seen well enough) the object is put as far away as the
    hands are, and the result is marked partial.
    """
    logs = np.array([np.log(h.scale) for h in hands.values()])
    weights = np.array([1.0 / max(h.scale_std, 0.01) ** 2 for h in hands.values()])
    if not weights.sum() > 0:
        if report is not None:
            report.partial("The object's size is a guess: no hand that goes along with it was seen well enough.")
        wrists = [h.joints[h.confidence > 0, 0, 2] for h in hands.values()]
        distance = float(np.nanmedian(np.concatenate([*wrists, np.zeros(0)]))) if any(map(len, wrists)) else 0.5
        return distance / far
    apart = len(logs) == 2 and (weights > 0).all() and abs(logs[0] - logs[1]) > 0.25
    if apart and report is not None:
        report.note(
            f"the two hands disagree on the object's scale by {100 * (np.exp(abs(logs[0] - logs[1])) - 1):.0f} %"
        )
    return float(np.exp((logs * weights).sum() / weights.sum()))
