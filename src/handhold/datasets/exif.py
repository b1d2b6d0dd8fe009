"""The one EXIF tag that matters here: the 35 mm equivalent focal length of a JPEG (EXIF 2.32, tag 0xA405)."""

from __future__ import annotations

import os
import struct
from pathlib import Path

EXIF_IFD, FOCAL_LENGTH_IN_35MM_FILM = 0x8769, 0xA405


def equivalent_focal(path: str | os.PathLike) -> float | None:
    """Millimetres, or None when the file does not say. Never raises on damaged data."""
    try:
        with Path(path).open("rb") as f:
            data = f.read(1 << 18)
        return _from_tiff(_exif_block(data))
    except (OSError, struct.error, IndexError, ValueError):
        return None


def _exif_block(data: bytes) -> bytes:
    """The TIFF structure inside the APP1 segment."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG")
    at = 2
    while data[at] == 0xFF and data[at + 1] not in (0xD9, 0xDA):
        length = struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return data[at + 10 : at + 2 + length]
        at += 2 + length
    raise ValueError("no EXIF")


def _from_tiff(tiff: bytes) -> float | None:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        raise ValueError("not TIFF")

    def entries(at: int) -> dict[int, tuple[int, bytes]]:
        n = struct.unpack(order + "H", tiff[at : at + 2])[0]
        raw = (tiff[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(n))
        return {struct.unpack(order + "H", e[:2])[0]: (struct.unpack(order + "H", e[2:4])[0], e[8:12]) for e in raw}

    first = entries(struct.unpack(order + "I", tiff[4:8])[0])
    if EXIF_IFD not in first:
        return None
    kind, value = entries(struct.unpack(order + "I", first[EXIF_IFD][1])[0]).get(FOCAL_LENGTH_IN_35MM_FILM, (0, b""))
    mm = (
        struct.unpack(order + "H", value[:2])[0]
        if kind == 3
        else struct.unpack(order + "I", value)[0]
        if kind == 4
        else 0
    )
    return float(mm) or None
