"""Where a frame's pose comes from: one small vocabulary for objects and one for hands, from tracking to the report.

A reason in `tracks.npz`, `scene.npz` and the report is one of these words; what else is to be said of a frame lowers
its confidence. The numbers, positions in the tuples, are `object.rung` and `hand.<side>.rung` of `tracks.npz`.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

NOT_FOUND, INTERPOLATED = "not found", "interpolated"
SFM, SFM_HAND, REGISTERED = "sfm", "sfm with hand pixels", "registered"
FIDUCIAL, SILHOUETTE = "fiducial", "silhouette"
GRASP, CARRIED, ALONE = "grasp", "carried", "alone"

OBJECT_RUNGS: tuple[str, ...] = (NOT_FOUND, INTERPOLATED, FIDUCIAL, SILHOUETTE, REGISTERED, SFM_HAND, SFM)
HAND_RUNGS: tuple[str, ...] = (NOT_FOUND, INTERPOLATED, CARRIED, ALONE, GRASP)

MEANING: dict[str, str] = {
    SFM: "structure from motion on the object's own texture",
    SFM_HAND: "structure from motion helped by the pixels of the hand that holds it",
    REGISTERED: "placed on the model of the other frames by colour and silhouette",
    SILHOUETTE: "outline and colour, starting from the hand that holds it",
    FIDUCIAL: "the hand that holds it carries it along: as good as the hand's turn is known",
    GRASP: "the hand's own evidence and the object it holds, together",
    ALONE: "the hand's own evidence; the object tells nothing here",
    CARRIED: "no evidence of its own: it goes along with the object it holds",
    INTERPOLATED: "between its neighbours in time",
    NOT_FOUND: "unknown; the nearest known pose is held and marked not valid",
}


def object_rung(reason: str, hand_pixels: bool = False) -> str:
    """The rung of a reason of `tracking.sfm`; `hand_pixels`: the whole model was made with the hand's pixels."""
    if not reason.startswith("sfm"):
        return reason if reason in OBJECT_RUNGS else NOT_FOUND
    return SFM_HAND if hand_pixels or "hand" in reason else SFM


def hand_rung(reason: str, confidence: float) -> str:
    """The rung of a reason of `tracking.grasp`; frames that it bridges without evidence are interpolated."""
    if reason in HAND_RUNGS and reason != NOT_FOUND:
        return reason
    if reason == NOT_FOUND:
        return INTERPOLATED if confidence > 0 else NOT_FOUND
    if "carried" in reason:
        return CARRIED
    return ALONE if "only" in reason or "unknown" in reason else GRASP


def codes(reasons: np.ndarray, rungs: tuple[str, ...]) -> np.ndarray:
    """(F,) int8 positions of reasons in their vocabulary; -1 for a word that is not in it."""
    at = {word: i for i, word in enumerate(rungs)}
    return np.array([at.get(str(r), -1) for r in reasons], np.int8)


def doubts(reasons: np.ndarray) -> list[str]:
    """One note for what reasons of structure from motion say beyond their rung: how many frames, and what."""
    told = Counter(str(r).removeprefix("sfm: ") for r in reasons)
    worth = (
        "turns suddenly",
        "its link to the rest disagrees",
        "few features shared with neighbours",
        "joined by the grasp",
    )
    lines = [f"{told[w]} where it {w}" if w.startswith("turns") else f"{told[w]}: {w}" for w in worth if told[w]]
    return [f"structure from motion trusts some frames less: {'; '.join(lines)}"] if lines else []
