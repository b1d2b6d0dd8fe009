"""What a file holds, as plain lists, dictionaries, numbers, strings and arrays: JSON, .npz, and .pt of tensors only.

Nothing in a file is run: .npz is read without pickle, .pt with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UnusableInput
from ...scene import load_npz

MAX_BYTES, MAX_FILES = 1 << 30, 200_000
SUFFIXES = (".json", ".npz", ".pt", ".pth")


def read_tree(path: str | os.PathLike) -> Any:
    """The content of one file, by its suffix. Raises UnusableInput in one sentence."""
    path = Path(path)
    if not path.is_file():
        raise UnusableInput(f"{path} does not exist.")
    if path.stat().st_size > MAX_BYTES:
        raise UnusableInput(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no file of hands is.")
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return load_npz(path, MAX_BYTES)
    if suffix in (".pt", ".pth"):
        return _read_torch(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise UnusableInput(f"{path} is not readable JSON ({type(e).__name__}).") from e


def folder_files(folder: str | os.PathLike) -> list[Path]:
    """The files of one kind in a folder, by name; of several kinds the most numerous. Raises UnusableInput when there
    is none."""
    folder = Path(folder)
    kinds: dict[str, list[Path]] = {}
    for p in folder.iterdir():
        if p.is_file() and not p.name.startswith(".") and p.suffix.lower() in SUFFIXES:
            kinds.setdefault(p.suffix.lower(), []).append(p)
    if not kinds:
        raise UnusableInput(f"{folder} holds no {', '.join(SUFFIXES)} files, so there are no hands to read.")
    files = max(kinds.values(), key=len)
    if len(files) > MAX_FILES or sum(p.stat().st_size for p in files) > MAX_BYTES:
        raise UnusableInput(f"{folder} holds more than {MAX_FILES} files or {MAX_BYTES >> 20} MiB of hands.")
    return files


def _read_torch(path: Path) -> Any:
    import torch

    try:
        return _plain(torch.load(path, map_location="cpu", weights_only=True))
    except UnusableInput:
        raise
    except Exception as e:
        raise UnusableInput(
            f"{path} is not a file of plain tensors ({type(e).__name__}); save tensors, numbers and lists, or .npz."
        ) from e


def _plain(value: Any, depth: int = 0) -> Any:
    import torch

    if depth > 32:
        raise UnusableInput("The file is nested too deeply to be one of hands.")
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return (value.float() if value.is_floating_point() else value).numpy()
    if isinstance(value, dict):
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, depth + 1) for v in value]
    return value


def numbers(value: Any, what: str) -> np.ndarray:
    """`value` (an array, nested lists, null for NaN) as float64. Raises UnusableInput, naming `what`."""
    try:
        array = np.asarray(value)
        if array.dtype == object:  # null among numbers
            array = np.asarray(value, float)
        if array.dtype.kind not in "fiub":
            raise ValueError
        return array.astype(np.float64)
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise UnusableInput(f"{what} must be numbers in a regular shape.") from None


def shaped(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """`value` as float64 of `shape`, axes of length 1 aside. Raises UnusableInput, naming `what`."""
    array = numbers(value, what)
    if array.size != int(np.prod(shape)) or tuple(n for n in array.shape if n > 1) not in (shape, (array.size,)):
        raise UnusableInput(f"{what} have shape {array.shape}, expected {shape}.")
    return array.reshape(shape)
