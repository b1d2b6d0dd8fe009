"""A video file or a folder of images -> `Sequence`: upright frames, their index in the source, and intrinsics."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import cv2
import numpy as np

from ..errors import UnusableInput
from ..geometry.cameras import K_from_equivalent_focal, check_K, default_K, orient_frame, orient_K, scale_K
from ..scene import Sequence
from .exif import equivalent_focal
from .masks import natural_key, shrunk_size

IMAGE_TYPES = (".png", ".jpg", ".jpeg")
MIN_FRAMES = 8
FOLDER_FPS = 30.0


@dataclass(frozen=True)
class _Source:
    """What decoding needs and finds: images come one by one, upright."""

    frames: Iterator[tuple[int, float, np.ndarray]]  # index, seconds, (H,W,3) uint8 RGB as displayed
    fps: float
    turn: Callable[[], np.ndarray]  # (2,2) displayed from stored axes; known after the first frame
    focal35: float | None  # 35 mm equivalent focal length, if the file says so
    expected: int  # frames according to the file; 0 if it does not say
    trouble: list[str]  # filled while decoding


def read_video(
    path: str | os.PathLike,
    start: float | None = None,
    end: float | None = None,
    stride: int = 1,
    max_side: int | None = None,
    *,
    K: np.ndarray | None = None,
    fps: float = FOLDER_FPS,
    min_frames: int = MIN_FRAMES,
    max_bytes: int = 1 << 30,
    report: Callable[..., None] | None = None,
) -> Sequence:
    """Decode a clip; see `read_clip`, of which this is the first result."""
    return read_clip(
        path, start, end, stride, max_side, K=K, fps=fps, min_frames=min_frames, max_bytes=max_bytes, report=report
    )[0]


def read_clip(
    path: str | os.PathLike,
    start: float | None = None,
    end: float | None = None,
    stride: int = 1,
    max_side: int | None = None,
    *,
    K: np.ndarray | None = None,
    fps: float = FOLDER_FPS,
    min_frames: int = MIN_FRAMES,
    max_bytes: int = 1 << 30,
    report: Callable[..., None] | None = None,
) -> tuple[Sequence, tuple[int, int]]:
    """Decode a clip, and tell its own size.

    path: a video (mp4, mov, mkv, webm, ...) or a folder of png/jpg images, taken in natural order at `fps`.
    start, end: seconds, start <= t < end; stride: every n-th frame of those; max_side: shrink to this many pixels, by
    area.
    K: (3,3) intrinsics of the video as displayed. If its principal point only fits the stored, not yet turned frame,
       it is turned with it. Without K: from the file's focal length, or else a stated default.
    max_bytes: refuse clips whose decoded frames need more memory.
    Returns the sequence (frames turned upright and with square pixels, `indices` in the source, fps of the frames
    kept, K of these frames, `K_source`, and notes) and the (width, height) of the frames as displayed, before
    shrinking. Raises `UnusableInput` with one sentence.
    """
    path = Path(path)
    if not path.exists():
        raise UnusableInput(f"{path} does not exist; give the path of a video or of a folder of images.")
    source = _open_folder(path, fps) if path.is_dir() else _open_video(path)
    frames, indices, notes, first, used, seen = [], [], [], None, 0, 0
    full_size = size = None
    complete = True
    for index, seconds, image in source.frames:
        seen = index + 1
        if end is not None and seconds >= end - 1e-9:
            complete = False
            break
        if start is not None and seconds < start - 1e-9:
            continue
        first = index if first is None else first
        if (index - first) % stride:
            continue
        if full_size is None:
            full_size = (image.shape[1], image.shape[0])
            size = shrunk_size(*full_size, max_side)
        if (image.shape[1], image.shape[0]) != full_size:
            raise UnusableInput(
                f"{path} changes its size from {full_size[0]}x{full_size[1]} to {image.shape[1]}x{image.shape[0]} "
                f"at frame {index}; give a clip of one size."
            )
        if size != full_size:
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        used += image.nbytes
        if used > max_bytes:
            raise UnusableInput(
                f"{path} needs more than {max_bytes / 2**30:.2g} GiB of memory at {size[0]}x{size[1]}; "
                "take a part of it with --start and --end, or use --stride or --max-side."
            )
        frames.append(image)
        indices.append(index)
        if report is not None and source.expected:
            report(min(seen / source.expected, 1.0), "decoding")
    _check_count(path, len(frames), seen, min_frames, source.trouble, start, end, stride)
    if source.trouble:
        notes.append(
            f"The video is damaged ({source.trouble[0]}); the {len(frames)} frames that could be decoded are used."
        )
    elif complete and source.expected > seen + max(2, source.expected // 50):
        notes.append(f"The video says it has {source.expected} frames, but only {seen} are there; it may be cut off.")
    if size != full_size:
        notes.append(f"Frames were shrunk from {full_size[0]}x{full_size[1]} to {size[0]}x{size[1]}.")
    if path.is_dir():
        notes.append(f"A folder of images has no frame rate; {fps:g} frames per second were assumed.")
    K, K_source, K_note = _intrinsics(path, K, source, full_size)
    K = scale_K(K, size[0] / full_size[0], size[1] / full_size[1])
    sequence = Sequence(
        frames=np.stack(frames),
        indices=np.asarray(indices, np.int64),
        fps=source.fps / stride,
        K=K,
        K_source=K_source,
        source=str(path),
        notes=tuple(notes + K_note),
    )
    return sequence, full_size


def _check_count(path, count, seen, min_frames, trouble, start, end, stride) -> None:
    if count >= min_frames:
        return
    if seen == 0:
        why = f" ({trouble[0]})" if trouble else ""
        raise UnusableInput(f"{path} has no frame that can be decoded{why}; give an intact video.")
    chosen = start is not None or end is not None or stride > 1
    advice = "give a longer clip" + (" or a smaller --stride" if stride > 1 else "")
    raise UnusableInput(
        f"{path} has {count} frame{'s' * (count != 1)}{' in the chosen part' if chosen else ''}, "
        f"but at least {min_frames} are needed to see motion; {advice}."
    )


def _intrinsics(path: Path, K, source: _Source, size: tuple[int, int]) -> tuple[np.ndarray, str, list[str]]:
    """Intrinsics of frames of `size` (as displayed, before shrinking), where they come from, and notes."""
    w, h = size
    if K is not None:
        turn = source.turn()
        if turn[0, 0] == 0:
            off = lambda K, w, h: np.hypot(K[0, 2] / w - 0.5, K[1, 2] / h - 0.5)  # noqa: E731
            if off(K, h, w) < off(K, w, h):
                check_K(K, h, w, "--K")
                return (
                    orient_K(K, turn, h, w),
                    "given",
                    ["The given intrinsics fit the frames as stored, and were turned upright."],
                )
        check_K(K, w, h, "--K")
        return np.asarray(K, np.float64), "given", []
    if source.focal35 is not None and 8 <= source.focal35 <= 800:
        K = K_from_equivalent_focal(source.focal35, w, h)
        note = (
            f"The focal length, {K[0, 0]:.0f} pixels, is from the file's metadata ({source.focal35:g} mm equivalent)."
        )
        return K, "metadata", [note]
    K = default_K(w, h)
    fov = np.degrees(2 * np.arctan(w / 2 / K[0, 0]))
    note = (
        f"The camera is unknown: a horizontal field of view of {fov:.0f} degrees was assumed, so depth may be off by "
        "tens of percent; give --K for a metric result."
    )
    return K, "default", [note]


def _open_folder(path: Path, fps: float) -> _Source:
    files = sorted(
        (p for p in path.iterdir() if p.suffix.lower() in IMAGE_TYPES and not p.name.startswith(".")), key=natural_key
    )
    if not files:
        raise UnusableInput(f"The folder {path} has no png or jpg images; give a folder of frames, or a video.")
    trouble: list[str] = []

    def frames():
        for i, p in enumerate(files):
            image = cv2.imread(str(p), cv2.IMREAD_COLOR)  # 8 bits, turned as its EXIF says
            if image is None:
                raise UnusableInput(f"{p} is not a readable image; remove it or write it again.")
            yield i, i / fps, np.ascontiguousarray(image[:, :, ::-1])

    return _Source(frames(), fps, lambda: np.eye(2), equivalent_focal(files[0]), len(files), trouble)


def _open_video(path: Path) -> _Source:
    if path.stat().st_size == 0:
        raise UnusableInput(f"{path} is empty; give the path of a video or of a folder of images.")
    try:
        # only plain files: a playlist must not make us read other paths or the network
        container = av.open(str(path), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except (av.error.FFmpegError, OSError, ValueError) as e:
        if getattr(e, "errno", None) == 13:
            raise UnusableInput(f"{path} may not be read by this user; change its permissions.") from e
        raise UnusableInput(
            f"{path} is not a video that can be read, or is cut off; give an intact mp4, mov, mkv or webm."
        ) from e
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        what = "only sound" if container.streams.audio else "no pictures"
        container.close()
        raise UnusableInput(f"{path} has {what}; give a file with video.")
    stream = streams[0]
    stream.thread_type = "AUTO"
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    fps = fps if 0 < fps < 1000 else 30.0
    duration = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    expected = stream.frames or int(duration * fps)
    sar = float(stream.sample_aspect_ratio or 1)
    trouble: list[str] = []
    turn = [np.eye(2)]

    def frames():
        index, origin = 0, None
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    trouble.append(f"frame {index} is broken")
                    index += 1
                    continue
                if index == 0 or origin is None:
                    turn[0] = _turn(frame)
                seconds = frame.time
                if seconds is not None:
                    origin = seconds if origin is None else origin
                    seconds -= origin
                else:
                    seconds = index / fps
                yield index, seconds, _upright(frame, turn[0], sar)
                index += 1
        except (av.error.FFmpegError, OSError) as e:
            if isinstance(e, MemoryError):
                raise
            trouble.append(f"decoding stopped after {index} frames")
        finally:
            container.close()

    focal = _metadata_focal({**container.metadata, **stream.metadata})
    return _Source(frames(), fps, lambda: turn[0], focal, expected, trouble)


def _turn(frame: av.VideoFrame) -> np.ndarray:
    """(2,2) displayed from stored axes, from the display matrix; the identity without one, or with one that is no
    multiple of 90 degrees.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2)
    m = (
        np.frombuffer(bytes(data), np.int32)[:9].reshape(3, 3)[:2, :2] / 65536.0
    )  # row vectors: x' = a x + c y, y' = b x + d y
    turn = np.rint(m.T / max(np.abs(m).max(), 1e-9))
    ok = (np.abs(turn).sum(0) == 1).all() and (np.abs(turn).sum(1) == 1).all()
    return turn if ok else np.eye(2)


def _upright(frame: av.VideoFrame, turn: np.ndarray, sar: float) -> np.ndarray:
    """(H,W,3) RGB as displayed; sar: width of a stored pixel over its height."""
    image = frame.to_ndarray(format="rgb24")
    if 0.1 < sar < 10 and abs(sar - 1) > 1e-3:
        width = max(1, round(image.shape[1] * sar))
        image = cv2.resize(image, (width, image.shape[0]), interpolation=cv2.INTER_LINEAR)
    return orient_frame(image, turn)


def _metadata_focal(metadata: dict[str, str]) -> float | None:
    """35 mm equivalent focal length in a video's tags, as phones write it."""
    for key, value in metadata.items():
        k = key.lower().replace("-", "_")
        if "35mm" in k and "focal" in k:
            try:
                return float(value.split()[0])
            except (ValueError, IndexError):
                continue
    return None
