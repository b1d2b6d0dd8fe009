"""Mask folders: `DIR/{right,left,object,other}/*.png`, one picture per frame, black where the body is not seen.

A file whose name is a number belongs to the frame of that index in the video; other names are taken in their sorted
order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from ..errors import UnusableInput
from ..files import write_atomically
from ..parallel import each

NAMES = ("right", "left", "object", "other")  # other: what else moves, e.g. a sleeve; optional


def natural_key(path: Path) -> list:
    """Sort key by which frame_9 comes before frame_10."""
    return [int(s) if s.isdigit() else s.lower() for s in re.split(r"(\d+)", path.name)]


def shrunk_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """(width, height) with the longer side at most `max_side` (None or 0: as it is), never enlarged, at least 1
    pixel.
    """
    if not max_side or max(width, height) <= max_side:
        return width, height
    s = max_side / max(width, height)
    return max(1, round(width * s)), max(1, round(height * s))


def read_masks(
    folder: str | os.PathLike, indices: np.ndarray, size: tuple[int, int], full_size: tuple[int, int] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Read user-made masks for the frames of a sequence.

    indices: (F,) of each frame in the video; size: (width, height) of the frames; full_size: of the video before the
    frames were shrunk. Masks of either size are accepted; those of `full_size` are resampled by the nearest pixel.
    Returns masks {name: (F,H,W) bool} and confidence {name: (F,) float32}: 1 where a file was given, 0 where none was.
    Raises `UnusableInput` when nothing is there, a file is unreadable or has another size, or the count does not fit.
    """
    folder = Path(folder)
    masks, confidence = {}, {}
    for name in NAMES:
        files = sorted((p for p in (folder / name).glob("*.png") if not p.name.startswith(".")), key=natural_key)
        if not files:
            continue
        by_frame = _by_frame(folder / name, files, indices)
        stack = np.zeros((len(indices), size[1], size[0]), bool)
        for f, path in by_frame.items():
            stack[f] = _read_mask(path, size, full_size or size)
        masks[name] = stack
        confidence[name] = np.isin(np.arange(len(indices)), list(by_frame)).astype(np.float32)
    if not masks:
        raise UnusableInput(f"{folder} has no masks: put one PNG per frame into its folders right, left and object.")
    return masks, confidence


def write_masks(folder: str | os.PathLike, masks: dict[str, np.ndarray], indices: np.ndarray) -> None:
    """Write {name: (F,H,W) bool} as 0/255 PNGs named by the frames' index in the video."""
    for name, stack in masks.items():
        paths = [Path(folder) / name / f"{int(i):06d}.png" for i in indices]
        write_pngs(paths, [np.where(mask, np.uint8(255), np.uint8(0)) for mask in stack])


def write_png(path: str | os.PathLike, image: np.ndarray) -> None:
    """Write (H,W) or RGB (H,W,3) uint8 as PNG: lossless, quick rather than small, atomic."""
    write_pngs([path], [image])


def write_pngs(paths: Sequence[str | os.PathLike], images: Sequence[np.ndarray]) -> None:
    """`write_png` of many, encoded on all cores and then written one by one."""
    for path, data in zip(paths, each(_encoded, images), strict=True):
        write_atomically(path, data, sync=False)


def _encoded(image: np.ndarray) -> bytes:
    if image.ndim == 3:
        image = image[:, :, ::-1]
    ok, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not ok:
        raise ValueError(f"cannot encode an image of shape {image.shape}")
    return data.tobytes()


def _by_frame(folder: Path, files: list[Path], indices: np.ndarray) -> dict[int, Path]:
    """Which file belongs to which frame of the sequence."""
    if all(p.stem.isdigit() for p in files):
        numbered = {int(p.stem): p for p in files}
        found = {f: numbered[int(i)] for f, i in enumerate(indices) if int(i) in numbered}
        if not found:
            raise UnusableInput(f"{folder} has no mask of a frame in use; name them by frame index: 000000.png.")
        return found
    if len(files) != len(indices):
        raise UnusableInput(
            f"{folder} has {len(files)} masks for {len(indices)} frames; "
            "give one per frame, or name them by frame index."
        )
    return dict(enumerate(files))


def _read_mask(path: Path, size: tuple[int, int], full_size: tuple[int, int]) -> np.ndarray:
    mask = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise UnusableInput(f"{path} is not a readable PNG; write masks as black and white PNG files.")
    h, w = mask.shape
    if (w, h) != size:
        if (w, h) != full_size:
            raise UnusableInput(
                f"{path} is {w}x{h}, but the video is {full_size[0]}x{full_size[1]}; make them at its size."
            )
        mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return mask > mask.max() // 2  # written as 0 and 255, or 0 and 1; soft edges are cut half way
