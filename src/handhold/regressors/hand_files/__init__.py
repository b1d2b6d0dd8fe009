"""Hands that other tools found: their files, read as `scene.Landmarks` (docs/formats.md lists the layouts).

A file or folder is recognised by what it holds, not by its name. Handedness is decided once per track and clip
(`tracks.join`), never per frame.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...datasets.masks import natural_key
from ...errors import UnusableInput
from ...scene import SIDES, Landmarks
from ..landmark_files import load_landmarks
from . import mano_dicts, mediapipe_results, openpose
from ._frames import LIST_KEYS, Labelled, label_of, numbers_of, records, rows_of
from ._tree import folder_files, read_tree
from .tracks import Detection, chirality, join

OURS = "handhold 1"
LAYOUTS = (OURS, openpose.LAYOUT, *mediapipe_results.LAYOUTS.values(), mano_dicts.LAYOUT)
_MAX_METRES, _MAX_PIXELS = 1e3, 1e5


@dataclass(frozen=True)
class HandFile:
    """What a file of hands holds."""

    layout: str  # one of `LAYOUTS`
    landmarks: dict[str, Landmarks]  # by side, pixels of the video before it was shrunk, centres at +0.5
    notes: tuple[str, ...] = ()  # what was decided, e.g. whose hand a track is


def read_hands(
    path: str | os.PathLike, indices: np.ndarray, size: tuple[int, int], handedness: str = "auto"
) -> HandFile:
    """Read hands that any of `LAYOUTS` describes.

    indices (F,): index of each frame of the clip in the video. size: (width, height) of the video before it was shrunk.
    handedness: "auto" for the layout's own rule, "as-written", or "swapped" for the other one than written.
    Raises UnusableInput in one sentence when the file is none of these, or does not fit the clip.
    """
    path = Path(path)
    if not path.exists():
        raise UnusableInput(f"{path} does not exist.")
    trees, count = _trees(path)
    if path.is_file() and _is_ours(trees[0][1]):
        found = load_landmarks(path, len(indices))
        if handedness == "swapped":
            other = dict(zip(SIDES, reversed(SIDES), strict=True))
            found = {other[s]: m for s, m in found.items()}
        return HandFile(OURS, found)
    layout, source, entries, count = _entries(path, trees, count)
    if count not in (None, len(indices)) and layout == mano_dicts.LAYOUT and _flat(trees[0][1]):
        raise UnusableInput(
            f"{path} holds {count} hands that do not say their frame, but the clip has {len(indices)} frames; "
            "give each a `frame`, or list the hands of each frame."
        )
    rows = rows_of([n for n, _ in entries], indices, count, path)
    placed = [(row, record) for row, (_, record) in zip(rows, entries, strict=True) if row is not None]
    found = _detections(layout, placed, size, path, handedness)
    found = [d for d in found if _sane(d, path)]
    if not found:
        raise UnusableInput(f"{path} ({layout}) holds no hand in the frames of the clip.")
    landmarks, notes = join(found, len(indices), source)
    return HandFile(layout, landmarks, (*notes, *_doubts(layout, found)))


def _trees(path: Path) -> tuple[list[tuple[int | None, Any]], int | None]:
    """(the frame a file names, its content) of one file, or of those of a folder; and how many there are, where none
    names its frame and their order does."""
    if path.is_file():
        return [(None, read_tree(path))], None
    files = sorted(folder_files(path), key=natural_key)
    numbers = numbers_of([p.stem for p in files])
    if all(n is None for n in numbers):
        return [(k, read_tree(p)) for k, p in enumerate(files)], len(files)
    return [(n, read_tree(p)) for n, p in zip(numbers, files, strict=True)], None


def _is_ours(tree: Any) -> bool:
    if not isinstance(tree, dict):
        return False
    return any(f"{s}_points" in tree or isinstance(tree.get(s), dict) for s in SIDES)


def _entries(path: Path, trees, count: int | None) -> tuple[str, str, Labelled, int | None]:
    """Layout, source, (frame, record) of each record, and the number of frames where records are placed by order."""
    readers: tuple[tuple[Callable[[Any], bool], str], ...] = (
        (openpose.is_record, openpose.SOURCE),
        (mediapipe_results.is_record, mediapipe_results.SOURCE),
        (mano_dicts.is_record, mano_dicts.SOURCE),
    )
    if path.is_file() and isinstance(trees[0][1], dict) and path.suffix.lower() == ".npz":
        frames = mediapipe_results.unpacked(trees[0][1])
        if frames is not None:
            return (
                _layout(mediapipe_results.SOURCE, frames),
                mediapipe_results.SOURCE,
                list(enumerate(frames)),
                len(frames),
            )
    for is_record, source in readers:
        entries, places = _of_reader(path, trees, is_record)
        if entries:
            if source == mano_dicts.SOURCE:
                entries, places = _hands_apart(path, entries, places)
            return _layout(source, [r for _, r in entries]), source, entries, count if path.is_dir() else places
    raise UnusableInput(
        f"{path} is none of the files of hands that can be read ({'; '.join(LAYOUTS)}); see docs/formats.md."
    )


def _flat(tree: Any) -> bool:
    """Whether hands follow each other without frames around them."""
    if isinstance(tree, dict) and not mano_dicts.is_record(tree):
        tree = next((tree[k] for k in LIST_KEYS if isinstance(tree.get(k), list)), [])
    return mano_dicts.is_record(tree) or all(mano_dicts.is_record(e) for e in tree if e)


def _of_reader(path: Path, trees, is_record) -> tuple[Labelled, int | None]:
    """Records with the frames they name; a file of a folder is a frame, whatever is in it."""
    if path.is_dir():
        return [(number, r) for number, tree in trees for _, r in records(tree, is_record)[0]], None
    found, count = records(trees[0][1], is_record)
    if count is None and len(found) == 1 and found[0][0] is None:
        return [(0, found[0][1])], 1
    return found, count


def _hands_apart(path: Path, entries: Labelled, count: int | None) -> tuple[Labelled, int | None]:
    """Stacked hands one by one. In a single file, stacked hands each name their own frame, or are one a frame."""
    if path.is_file() and len(entries) == 1 and count == 1:
        hands = mano_dicts.unstacked(entries[0][1])
        labels = [label_of(h) for h in hands]
        if all(n is not None for n in labels):
            return list(zip(labels, hands, strict=True)), None
        return list(enumerate(hands)), len(hands)
    return [(n, h) for n, record in entries for h in mano_dicts.unstacked(record)], count


def _layout(source: str, found: list[Any]) -> str:
    if source == openpose.SOURCE:
        return openpose.LAYOUT
    if source == mano_dicts.SOURCE:
        return mano_dicts.LAYOUT
    return mediapipe_results.LAYOUTS[mediapipe_results.kind_of(found[0])]


def _detections(layout: str, placed, size, path: Path, handedness: str) -> list[Detection]:
    if layout == mano_dicts.LAYOUT:
        mirror = mano_dicts.left_as_right([h for _, h in placed], path)
        found = [mano_dicts.detection(h, row, size, path, mirror) for row, h in placed]
    elif layout == openpose.LAYOUT:
        found = [d for row, frame in placed for d in openpose.detections(frame, row, size, path)]
    else:
        swap = {"auto": None, "as-written": False, "swapped": True}[handedness]
        return [d for row, frame in placed for d in mediapipe_results.detections(frame, row, size, path, swap)]
    return [replace(d, right=1 - d.right) for d in found] if handedness == "swapped" else found


def _sane(d: Detection, path: Path) -> bool:
    """Whether there is anything to see of the hand; raises UnusableInput when it cannot be one."""
    far = np.nan_to_num(np.abs(d.points)).max() > _MAX_PIXELS or np.nan_to_num(np.abs(d.points3d)).max() > _MAX_METRES
    if far or np.isinf(d.points).any() or np.isinf(d.points3d).any():
        raise UnusableInput(f"{path} holds joints beyond {_MAX_PIXELS:g} pixels or {_MAX_METRES:g} m.")
    return bool(np.isfinite(d.points).all(1).any())


def _doubts(layout: str, found: list[Detection]) -> list[str]:
    """A note where the joints' own shape says they are of the other hands."""
    right, left = (
        chirality(np.stack([d.points3d for d in found if (d.right >= 0.5) == r] or [np.full((21, 3), np.nan)]))
        for r in (True, False)
    )
    if min(right, -left) < -0.5 and max(right, -left) <= 0:
        return [
            f"joints: by their shape the hands of this file ({layout}) are the other ones; if the result is mirrored, "
            "try --joints-handedness swapped (or as-written)"
        ]
    return []
