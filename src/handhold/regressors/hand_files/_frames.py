"""Which frame of the clip a record belongs to.

A record names its frame by a number (the number in its file's name, or a key such as `frame`), which is the frame's
index in the video, counted from 0, as with masks; or records come in order, one per frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UnusableInput

FRAME_KEYS = ("frame", "frame_idx", "frame_index", "frame_id", "img_name", "img_path", "img_fn", "image")
LIST_KEYS = ("frames", "results", "data", "detections", "hands", "predictions")
_TAILS = re.compile(r"(_keypoints|_out|_hands?|_hamer|_wilor|_results?|\.(png|jpe?g|bmp|webp))+$", re.IGNORECASE)

Labelled = list[tuple[int | None, Any]]  # (the frame a record names, or None; the record)


def number_of(name: str) -> int | None:
    """The last number in the name of a frame's file, without the endings that tools add; None where there is none."""
    found = re.search(r"(\d{1,15})\D*$", _TAILS.sub("", name))
    return int(found.group(1)) if found else None


def numbers_of(names: Sequence[str]) -> list[int | None]:
    """`number_of` for the files of a folder. Where all end in two numbers and the last is small (`000012_0`), the last
    counts the hands of a frame and the one before it is the frame's."""
    pairs = [re.search(r"(\d{1,15})_(\d{1,2})$", _TAILS.sub("", n)) for n in names]
    if pairs and all(pairs) and len({m.group(1) for m in pairs}) > 1 and all(len(m.group(2)) == 1 for m in pairs):
        return [int(m.group(1)) for m in pairs]
    return [number_of(n) for n in names]


def label_of(record: Any) -> int | None:
    """The frame that a record itself names."""
    if not isinstance(record, dict):
        return None
    for key in FRAME_KEYS:
        value = record.get(key)
        if isinstance(value, np.ndarray | np.generic) and value.size == 1:
            value = value.reshape(-1)[0].item()
        if isinstance(value, bool):
            continue
        if isinstance(value, int | float) and float(value).is_integer():
            return int(value)
        if isinstance(value, str):
            return number_of(Path(value).name)
    return None


def records(tree: Any, is_record: Callable[[Any], bool]) -> tuple[Labelled, int | None]:
    """The records in one file, and the length of the list of frames where their places in it say the frame.

    tree: as from `read_tree`. is_record: whether a value is one (a frame, or one hand). An entry of a list may be one
    record, a list of them, or empty; where each record names its frame, the places say nothing.
    """
    if is_record(tree):
        return [(label_of(tree), tree)], None
    if isinstance(tree, dict):
        for key in LIST_KEYS:
            if isinstance(tree.get(key), list | dict):
                inner, count = records(tree[key], is_record)
                own = label_of(tree)
                return (inner, count) if own is None else ([(own, r) for _, r in inner], None)
        named = [(number_of(str(k)), v) for k, v in tree.items()]
        if named and all(n is not None for n, _ in named):
            return [(n, r) for n, v in named for _, r in records(v, is_record)[0]], None
        return [], None
    if not isinstance(tree, list):
        return [], None
    found = [
        (place, label, r)
        for place, entry in enumerate(tree)
        if isinstance(entry, dict | list) and len(entry)
        for label, r in _inside(entry, is_record)
    ]
    if found and all(label is not None for _, label, _ in found):
        return [(label, r) for _, label, r in found], None
    return [(place, r) for place, _, r in found], len(tree)


def _inside(entry: Any, is_record: Callable[[Any], bool]) -> Labelled:
    """The records of one frame: their places in it are not frames."""
    inner, count = records(entry, is_record)
    return inner if count is None else [(label_of(r), r) for _, r in inner]


def rows_of(labels: Sequence[int | None], indices: np.ndarray, count: int | None, source: Any) -> list[int | None]:
    """The row of the clip that each record belongs to, None for frames that are not used.

    labels: the frames that records name, or their places in a list of `count` frames (None: names). indices (F,):
    index of each frame of the clip in the video. A list as long as the clip goes with it one by one, a longer one with
    the frames of the video. Names are counted from 1 where none is 0 and one is just past the end of the whole video.
    Raises UnusableInput when nothing fits.
    """
    indices = np.asarray(indices)
    if count is not None:
        if count == len(indices):
            return [int(n) for n in labels]
        if count <= int(indices[-1]):
            raise UnusableInput(
                f"{source} holds {count} frames, but the clip has {len(indices)}; give one entry per frame of the "
                "video, empty where no hand was found, or name each entry's frame with a `frame` key."
            )
    named = [n for n in labels if n is not None]
    if len(named) < len(labels):
        raise UnusableInput(f"{source} does not say which frame each hand is of; number the files by frame: 000000.")
    whole = np.array_equal(indices, np.arange(len(indices)))
    first = 1 if whole and named and min(named) >= 1 and max(named) == len(indices) else 0
    row = {int(i) + first: k for k, i in enumerate(indices)}
    rows = [row.get(n) for n in labels]
    if named and all(r is None for r in rows):
        raise UnusableInput(f"{source} has hands of frames {min(named)} to {max(named)}, none of which is in the clip.")
    return rows
