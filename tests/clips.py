"""Small videos made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def moving_square(count: int = 12, width: int = 96, height: int = 64) -> np.ndarray:
    """(F,H,W,3) uint8: a bright square that moves right, red in the top-left corner, so that turns and flips show."""
    frames = np.full((count, height, width, 3), 40, np.uint8)
    for i, frame in enumerate(frames):
        frame[24:40, 8 + 3 * i : 24 + 3 * i] = 220
        frame[:16, :16] = (220, 30, 30)
    return frames


def write_video(path: Path, frames: np.ndarray, fps: int = 10, codec: str = "libx264", **tags: str) -> Path:
    """Encode frames with PyAV; sound only when `frames` is empty."""
    import av

    with av.open(str(path), "w", options={"movflags": "use_metadata_tags+faststart"}) as container:
        container.metadata.update(tags)
        if len(frames):
            stream = container.add_stream(codec, rate=fps, options={"crf": "12"} if codec == "libx264" else {})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
        else:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 44100
            container.mux(stream.encode(sound))
            container.mux(stream.encode(None))
    return path
