"""prepare: video -> frames, intrinsics, hand landmarks and masks in `1_prepare/`."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import replace
from functools import partial

import cv2
import numpy as np

from ..config import Config
from ..datasets.masks import read_masks, write_masks, write_png
from ..datasets.video import read_clip
from ..errors import StageFailed, UnusableInput
from ..geometry.cameras import read_K
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Landmarks, Sequence, load_npz, save_npz

LONG = 300  # frames


def prepare(run: Run, config: Config, report: Progress) -> None:
    """Decode, find landmarks and masks (or take the user's own), and write `1_prepare/`.

    Writes frames/%06d.png (named by index in the video), masks/{right,left,object,other}/%06d.png and evidence.npz; see
    `load_prepared`. Raises `UnusableInput`, `MissingAsset`, or `StageFailed` when there is no hand or no object.
    """
    c = config.prepare
    K = None if c.K is None else read_K(c.K)
    decoding = partial(_part, report, 0.0, 0.1)
    sequence, full_size = read_clip(run.video, c.start, c.end, c.stride, c.max_side, K=K, report=decoding)
    if len(sequence) > LONG:
        report.note(f"{len(sequence)} frames take long; --start, --end and --stride make a clip shorter.")
    given = ({}, {})  # read before the slow work, so that a mistake is told at once
    if c.masks is not None:
        given = read_masks(c.masks, sequence.indices, sequence.size, full_size)
    sequence = replace(sequence, landmarks=_landmarks(sequence, full_size, config, partial(_part, report, 0.1, 0.5)))
    sequence = _masks(sequence, *given, config.seed, partial(_part, report, 0.5, 0.9))
    if "object" not in sequence.masks or not sequence.masks["object"].any():
        raise StageFailed("No handled object was found in the video; give --masks with an `object` folder.")
    for note in sequence.notes:
        report.note(note)
    save_prepared(run, sequence, partial(_part, report, 0.9, 1.0))


def save_prepared(run: Run, sequence: Sequence, report=None) -> None:
    """Write `1_prepare/` from a sequence with its evidence."""
    folder = run.prepare_dir
    for i, (index, frame) in enumerate(zip(sequence.indices, sequence.frames, strict=True)):
        write_png(folder / "frames" / f"{int(index):06d}.png", frame)
        if report is not None:
            report((i + 1) / len(sequence), "writing frames")
    write_masks(folder / "masks", sequence.masks, sequence.indices)
    arrays = {
        "indices": np.asarray(sequence.indices, np.int64),
        "fps": np.float64(sequence.fps),
        "K": np.asarray(sequence.K, np.float64),
        "K_source": np.asarray(sequence.K_source),
        "source": np.asarray(sequence.source),
        "notes": np.asarray(sequence.notes, dtype=np.str_).reshape(-1),
    }
    for side, marks in sequence.landmarks.items():
        arrays |= {
            f"landmarks.{side}.points": np.asarray(marks.points, np.float32),
            f"landmarks.{side}.points3d": np.asarray(marks.points3d, np.float32),
            f"landmarks.{side}.confidence": np.asarray(marks.confidence, np.float32),
        }
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
    frames = [_read_png(folder / "frames" / n, cv2.IMREAD_COLOR, again)[:, :, ::-1] for n in names]
    masks = {
        name: np.stack([_read_png(folder / "masks" / name / n, cv2.IMREAD_GRAYSCALE, again) > 127 for n in names])
        for name in (k.removeprefix("mask_confidence.") for k in z if k.startswith("mask_confidence."))
    }
    landmarks = {
        side: Landmarks(*(z[f"landmarks.{side}.{k}"] for k in ("points", "points3d", "confidence")))
        for side in SIDES
        if f"landmarks.{side}.points" in z
    }
    return Sequence(
        frames=np.stack(frames),
        indices=z["indices"],
        fps=float(z["fps"]),
        K=z["K"],
        K_source=str(z["K_source"]),
        source=str(z["source"]),
        landmarks=landmarks,
        masks=masks,
        mask_confidence={name: z[f"mask_confidence.{name}"] for name in masks},
        notes=tuple(str(n) for n in z["notes"]),
    )


def _landmarks(sequence: Sequence, full_size: tuple[int, int], config: Config, report) -> dict[str, Landmarks]:
    """Find landmarks, or take the user's, which are in pixels of the video before shrinking."""
    if config.prepare.joints is not None:
        from ..regressors.landmark_files import load_landmarks

        scale = np.array(sequence.size, np.float32) / np.array(full_size, np.float32)
        found = load_landmarks(config.prepare.joints, len(sequence))
        return {side: replace(marks, points=marks.points * scale) for side, marks in found.items()}
    from .. import assets
    from ..regressors.landmarks import HandLandmarker, require_hands, track_landmarks

    with _hushed():
        landmarker = HandLandmarker(assets.path("palm_detection"), assets.path("hand_landmark"))
    found = track_landmarks(sequence.frames, landmarker, progress=lambda share: report(share, "hand landmarks"))
    return require_hands(found, sequence.source)


def _masks(sequence: Sequence, given, given_confidence, seed: int, report) -> Sequence:
    """Segment what was not given."""
    if {"object", *sequence.landmarks} <= set(given):
        return replace(sequence, masks=given, mask_confidence=given_confidence)
    from ..tracking.masks import segment

    sequence = segment(sequence, report, seed=seed)
    return replace(
        sequence,
        masks=sequence.masks | given,
        mask_confidence=dict(sequence.mask_confidence) | given_confidence,
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
