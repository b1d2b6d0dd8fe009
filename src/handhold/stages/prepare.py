"""prepare: video -> frames, intrinsics, hand landmarks, estimates and masks in `1_prepare/`.

Landmarks tell where hands are; the segmenter finds them where landmarks do not, and what they hold; the regressor looks
at each; and masks are made of all that.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from ..config import Config, is_sam
from ..datasets.hold import is_build, read_build
from ..datasets.masks import read_masks, write_masks, write_pngs
from ..datasets.video import read_clip
from ..errors import StageFailed, UnusableInput
from ..geometry.cameras import read_K
from ..parallel import cores, each
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, HandEstimates, Landmarks, Sequence, load_npz, save_npz

LONG = 300  # frames
EVIDENCE = 3  # version of evidence.npz


def prepare(run: Run, config: Config, report: Progress) -> None:
    """Decode, find landmarks, estimates and masks (or take the user's own), and write `1_prepare/`.

    Of a HOLD build folder, frames, K and masks are taken; `--K` and `--masks` win over them.

    Writes frames/%06d.png (named by index in the video), masks/{right,left,object,other}/%06d.png and evidence.npz; see
    `load_prepared`. Raises `UnusableInput`, `MissingAsset`, or `StageFailed` when there is no hand or no object.
    """
    c = config.prepare
    K = None if c.K is None else read_K(c.K)
    decoding = partial(_part, report, 0.0, 0.1)
    given: tuple[dict, dict] = ({}, {})  # read before the slow work, so that a mistake is told at once
    if is_build(run.video):
        build = read_build(run.video, c.start, c.end, c.stride, c.max_side, K=K, report=decoding)
        given, full_size = (dict(build.sequence.masks), dict(build.sequence.mask_confidence)), build.full_size
        sequence = replace(build.sequence, masks={}, mask_confidence={}, settled=())
        names = f"{' and '.join(given[0])} masks" if given[0] else "no masks"
        report.note(f"A HOLD build: its frames, intrinsics and {names} are taken; poses are found anew.")
    else:
        sequence, full_size = read_clip(run.video, c.start, c.end, c.stride, c.max_side, K=K, report=decoding)
    if len(sequence) > LONG:
        report.note(f"{len(sequence)} frames take long; --start, --end and --stride make a clip shorter.")
    if c.masks is not None:
        own = read_masks(c.masks, sequence.indices, sequence.size, full_size)
        given = (given[0] | own[0], given[1] | own[1])
    sam = _sam(config, given[0])
    segmenter, regressor = _networks(config, given[0], report)
    sequence = _with_landmarks(sequence, full_size, config, partial(_part, report, 0.1, 0.35))
    probabilities = None
    if segmenter is not None:
        from ..regressors.segment_clip import segment_clip

        probabilities = segment_clip(segmenter, sequence.frames, partial(_part, report, 0.35, 0.6))
    sequence = _with_sides(sequence, given[0], probabilities)
    if regressor is not None:
        from ..regressors.hands import regress_clip

        boxes = _boxes(sequence, given[0], probabilities)
        estimates = regress_clip(regressor, sequence.frames, sequence.K, boxes, partial(_part, report, 0.6, 0.75))
        sequence = replace(sequence, regressed=estimates)
    sequence = _with_hands(sequence)
    sequence = _masks(sequence, *given, probabilities, config.seed, partial(_part, report, 0.75, 0.9), sam)
    if "object" not in sequence.masks or not sequence.masks["object"].any():
        raise StageFailed("No handled object was found in the video; give --masks with an `object` folder.")
    for note in sequence.notes:
        report.note(note)
    save_prepared(run, sequence, partial(_part, report, 0.9, 1.0), probabilities)


def save_prepared(run: Run, sequence: Sequence, report=None, probabilities: np.ndarray | None = None) -> None:
    """Write `1_prepare/` from a sequence with its evidence, and the segmenter's probabilities (F,5,h,w), if any."""
    folder = run.prepare_dir
    if probabilities is not None:
        rounded = np.round(probabilities.astype(np.float32) * 255).astype(np.uint8)
        save_npz(folder / "probabilities.npz", {"probabilities": rounded})
    if report is not None:
        report(0.0, "writing frames")
    write_pngs([folder / "frames" / f"{int(i):06d}.png" for i in sequence.indices], sequence.frames)
    write_masks(folder / "masks", sequence.masks, sequence.indices)
    arrays = {
        "version": np.int64(EVIDENCE),
        "indices": np.asarray(sequence.indices, np.int64),
        "fps": np.float64(sequence.fps),
        "K": np.asarray(sequence.K, np.float64),
        "K_source": np.asarray(sequence.K_source),
        "source": np.asarray(sequence.source),
        "notes": np.asarray(sequence.notes, dtype=np.str_).reshape(-1),
        "settled": np.asarray(sequence.settled, dtype=np.str_).reshape(-1),
    }
    for side, marks in sequence.landmarks.items():
        arrays |= {
            f"landmarks.{side}.points": np.asarray(marks.points, np.float32),
            f"landmarks.{side}.points3d": np.asarray(marks.points3d, np.float32),
            f"landmarks.{side}.confidence": np.asarray(marks.confidence, np.float32),
            f"landmarks.{side}.source": np.asarray(marks.source),
        }
    for side, seen in sequence.regressed.items():
        for f in fields(HandEstimates):
            arrays[f"regressed.{side}.{f.name}"] = np.asarray(getattr(seen, f.name), np.float32)
    for name in sequence.masks:
        given = sequence.mask_confidence.get(name, sequence.masks[name].any((1, 2)))
        arrays[f"mask_confidence.{name}"] = np.asarray(given, np.float32)
    save_npz(folder / "evidence.npz", arrays)


def load_prepared(run: Run) -> Sequence:
    """The sequence with its evidence, as `prepare` left it. Raises `UnusableInput` when it is not complete."""
    folder = run.prepare_dir
    again = f"{folder} is not complete; run `handhold prepare {run.root}` again."
    if not (folder / "evidence.npz").is_file():
        raise UnusableInput(again)
    z = load_npz(folder / "evidence.npz")
    names = [f"{int(i):06d}.png" for i in z["indices"]]
    frames = each(lambda n: _read_png(folder / "frames" / n, cv2.IMREAD_COLOR, again)[:, :, ::-1], names)
    masks = {
        name: read_mask_folder(folder / "masks" / name, z["indices"], again)
        for name in (k.removeprefix("mask_confidence.") for k in z if k.startswith("mask_confidence."))
    }
    landmarks = {
        side: Landmarks(
            *(z[f"landmarks.{side}.{k}"] for k in ("points", "points3d", "confidence")),
            str(z.get(f"landmarks.{side}.source", "mediapipe")),  # versions 1 and 2 did not say
        )
        for side in SIDES
        if f"landmarks.{side}.points" in z
    }
    regressed = {
        side: HandEstimates(**{f.name: z[f"regressed.{side}.{f.name}"] for f in fields(HandEstimates)})
        for side in SIDES
        if f"regressed.{side}.confidence" in z
    }
    return Sequence(
        frames=np.stack(frames),
        indices=z["indices"],
        fps=float(z["fps"]),
        K=z["K"],
        K_source=str(z["K_source"]),
        source=str(z["source"]),
        landmarks=landmarks,
        regressed=regressed,
        masks=masks,
        mask_confidence={name: z[f"mask_confidence.{name}"] for name in masks},
        settled=tuple(str(n) for n in z.get("settled", ())),
        notes=tuple(str(n) for n in z["notes"]),
    )


def load_probabilities(run: Run) -> np.ndarray | None:
    """The segmenter's (F,5,h,w) float16, background, right, left, object, forearm; None where there was none."""
    path = run.prepare_dir / "probabilities.npz"
    return load_npz(path)["probabilities"].astype(np.float16) / 255 if path.is_file() else None


def read_mask_folder(folder: Path, indices: np.ndarray, message: str) -> np.ndarray:
    """(F,H,W) bool as `write_masks` wrote them; raises `UnusableInput` with `message` where one is missing."""
    names = (f"{int(i):06d}.png" for i in indices)
    return np.stack(each(lambda n: _read_png(folder / n, cv2.IMREAD_GRAYSCALE, message) > 127, names))


def _with_landmarks(sequence: Sequence, full_size: tuple[int, int], config: Config, report) -> Sequence:
    """Find landmarks, or take the user's, which are in pixels of the video before shrinking."""
    c = config.prepare
    if c.joints is not None:
        from ..regressors.hand_files import read_hands

        scale = np.array(sequence.size, np.float32) / np.array(full_size, np.float32)
        given = read_hands(c.joints, sequence.indices, full_size, c.joints_handedness)
        found = {side: replace(marks, points=marks.points * scale) for side, marks in given.landmarks.items()}
        return replace(sequence, landmarks=found, notes=(*sequence.notes, *given.notes))
    from .. import assets
    from ..regressors.landmarks import HandLandmarker, track_landmarks

    with _hushed():
        landmarker = HandLandmarker(assets.path("palm_detection"), assets.path("hand_landmark"), cores())
    found = track_landmarks(sequence.frames, landmarker, progress=lambda share: report(share, "hand landmarks"))
    return replace(sequence, landmarks=found)


def _sam(config: Config, given: dict[str, np.ndarray]):
    """The SAM that the settings name, or None; not needed when the user gives the object's mask and a hand's."""
    if not is_sam(config.prepare.segmenter) or ("object" in given and any(s in given for s in SIDES)):
        return None
    from ..regressors.sam import open_sam

    return open_sam(config.prepare.segmenter, config.device)


def _networks(config: Config, given: dict[str, np.ndarray], report):
    """The segmenter and the regressor that the settings ask for, None where there is none; said when that is missing.

    A segmenter is not needed when the user gives the object's mask and a hand's.
    """
    from ..regressors.hands import REGRESSOR, SEGMENTER, open_network

    c = config.prepare
    first = "auto" if is_sam(c.segmenter) else c.segmenter  # SAM goes over what the segmenter that comes along finds
    wanted = {"segmenter": (first, SEGMENTER), "hand regressor": (c.hand_regressor, REGRESSOR)}
    if "object" in given and any(s in given for s in SIDES):
        del wanted["segmenter"]
    found = {}
    for what, (choice, name) in wanted.items():
        found[what] = open_network(choice, name, config.device)
        if found[what] is None and choice == "auto":
            report.note(f"No trained {what} comes with this installation; the clip is read without one.")
    return found.get("segmenter"), found["hand regressor"]


def _hand_pixels(sequence: Sequence, given: dict[str, np.ndarray], probabilities) -> dict[str, np.ndarray]:
    """(F,H,W) bool by side: the user's masks, or where the segmenter sees that hand."""
    out = {s: given[s] for s in SIDES if s in given}
    if probabilities is not None:
        label = probabilities.argmax(1).astype(np.uint8)
        if label.shape[1:] != sequence.frames.shape[1:3]:
            label = np.stack([cv2.resize(m, sequence.size, interpolation=cv2.INTER_NEAREST) for m in label])
        out |= {s: label == 1 + k for k, s in enumerate(SIDES) if s not in out}
    return out


def _with_sides(sequence: Sequence, given: dict[str, np.ndarray], probabilities) -> Sequence:
    """Where landmarks found no hand at all, the sides that masks show in a tenth of the frames, without landmarks."""
    if any((marks.confidence > 0).any() for marks in sequence.landmarks.values()):
        return sequence
    n, least = len(sequence), 0.002 * sequence.frames.shape[1] * sequence.frames.shape[2]
    none = Landmarks(
        np.full((n, 21, 2), np.nan, np.float32), np.full((n, 21, 3), np.nan, np.float32), np.zeros(n, np.float32)
    )
    pixels = _hand_pixels(sequence, given, probabilities)
    shown = [s for s, m in pixels.items() if (m.reshape(n, -1).sum(1) > least).mean() > 0.1]
    return replace(sequence, landmarks=dict.fromkeys(shown, none))


def _boxes(sequence: Sequence, given: dict[str, np.ndarray], probabilities) -> dict[str, np.ndarray]:
    """Where to look for each hand. A lone hand is wherever a hand is, whichever side the segmenter takes it for."""
    from ..regressors.hands import hand_boxes

    pixels, sides = _hand_pixels(sequence, given, probabilities), list(sequence.landmarks)
    if len(sides) == 1 and pixels:
        pixels = {sides[0]: pixels[sides[0]] if sides[0] in given else np.any(list(pixels.values()), axis=0)}
    return {s: hand_boxes(sequence.landmarks[s], pixels.get(s), len(sequence)) for s in sides}


def _with_hands(sequence: Sequence) -> Sequence:
    """The sides that anything is known of. Raises `StageFailed` when there is none."""
    from ..regressors.landmarks import require_hands

    known = {s: m for s, m in sequence.landmarks.items() if s in sequence.regressed or (m.confidence > 0).any()}
    if not any(s in sequence.regressed for s in known):
        require_hands(known, sequence.source)
    return replace(sequence, landmarks=known)


def _masks(sequence: Sequence, given, given_confidence, probabilities, seed: int, report, sam=None) -> Sequence:
    """Segment what was not given; SAM, where there is one, goes over that."""
    if {"object", *sequence.landmarks} <= set(given):
        return replace(sequence, masks=given, mask_confidence=given_confidence, settled=tuple(given))
    from ..tracking.masks import segment

    share = 1.0 if sam is None else 0.5
    sequence = segment(sequence, partial(_part, report, 0.0, share), seed=seed, probabilities=probabilities)
    if sam is not None:
        from ..regressors.sam import refine_masks

        sequence = refine_masks(sam, sequence, partial(_part, report, share, 1.0))
    return replace(
        sequence,
        masks=sequence.masks | given,
        mask_confidence=dict(sequence.mask_confidence) | given_confidence,
        settled=tuple(given if sam is None else sequence.masks),
    )


@contextlib.contextmanager
def _hushed():
    """Keep what native code says on stderr while it loads ("INFO: Created TensorFlow Lite ...") from the user."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _part(report, first: float, last: float, fraction: float, text: str = "", **metrics: float) -> None:
    """Report a step's own 0..1 as a part of the stage's."""
    report(first + (last - first) * min(max(fraction, 0.0), 1.0), text, **metrics)


def _read_png(path, flag: int, message: str) -> np.ndarray:
    image = cv2.imread(str(path), flag)
    if image is None:
        raise UnusableInput(message)
    return image
