"""read_video: frames, indices, orientation, intrinsics, and every way a video can be bad."""

from __future__ import annotations

import struct

import cv2
import numpy as np
import pytest

from clips import moving_square, write_video
from handhold.datasets.exif import equivalent_focal
from handhold.datasets.masks import shrunk_size
from handhold.datasets.video import read_video
from handhold.errors import UnusableInput
from handhold.geometry.cameras import make_K

# QuickTime display matrices, as (a, b, c, d): x' = a x + c y, y' = b x + d y
TURNS = {
    "0": (1, 0, 0, 1),
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirror": (-1, 0, 0, 1),
    "upside down mirror": (1, 0, 0, -1),
    "transpose": (0, 1, 1, 0),
    "anti-transpose": (0, -1, -1, 0),
}


def turned(path, matrix):
    """Write a display matrix into the track header of an mp4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version 0: flags, times, reserved, layer and volume
    a, b, c, d = matrix
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def red_corner(frame):
    """Which corner is red, as (x is right half, y is lower half)."""
    red = (frame[..., 0].astype(int) - frame[..., 1]) > 80
    y, x = np.nonzero(red)
    return bool(x.mean() > frame.shape[1] / 2), bool(y.mean() > frame.shape[0] / 2)


def test_frames_and_indices_survive(square_video):
    s = read_video(square_video)
    assert s.frames.shape == (12, 64, 96, 3) and s.fps == 10 and s.size == (96, 64)
    assert np.abs(s.frames.astype(int) - moving_square()).mean() < 4
    assert s.indices.tolist() == list(range(12))


def test_start_end_stride_keep_source_indices(square_video):
    s = read_video(square_video, start=0.1, end=1.0, stride=2, min_frames=1)
    assert s.indices.tolist() == [1, 3, 5, 7, 9] and s.fps == 5
    whole = read_video(square_video)
    assert (s.frames == whole.frames[s.indices]).all()


def test_shrinking_scales_the_intrinsics(square_video):
    K = make_K(100, 100, 48, 32)
    s = read_video(square_video, max_side=48, K=K)
    assert s.size == (48, 32) and s.K_source == "given"
    assert np.allclose(s.K, make_K(50, 50, 24, 16))
    assert any("shrunk" in n for n in s.notes)


@pytest.mark.parametrize("name", TURNS)
def test_every_orientation_is_shown_upright(tmp_path, name):
    a, b, c, d = TURNS[name]
    s = read_video(turned(write_video(tmp_path / "v.mp4", moving_square()), TURNS[name]))
    assert s.size == ((96, 64) if a else (64, 96))
    # the stored corner is (-1, -1) from the centre; displayed it is turn @ (-1, -1)
    assert red_corner(s.frames[0]) == (-(a + c) > 0, -(b + d) > 0)


def test_given_intrinsics_of_the_stored_frame_are_turned_with_it(tmp_path):
    video = turned(write_video(tmp_path / "v.mp4", moving_square()), TURNS["90"])
    stored, displayed = make_K(100, 101, 50, 30), make_K(101, 100, 34, 50)
    assert np.allclose(read_video(video, K=displayed).K, displayed)
    s = read_video(video, K=stored)
    assert np.allclose(s.K, displayed) and any("turned" in n for n in s.notes)


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("mov", "libx264"), ("webm", "libvpx-vp9")])
def test_other_containers(tmp_path, suffix, codec):
    s = read_video(write_video(tmp_path / f"v.{suffix}", moving_square(), codec=codec))
    assert len(s) == 12 and abs(s.fps - 10) < 0.01


def test_default_intrinsics_are_stated(square_video):
    s = read_video(square_video)
    assert s.K_source == "default" and s.K[0, 0] == 96
    assert any("assumed" in n and "--K" in n for n in s.notes)


def test_focal_length_from_metadata(tmp_path):
    tag = {"com.apple.quicktime.camera.focal_length.35mm_equivalent": "26"}
    s = read_video(write_video(tmp_path / "v.mp4", moving_square(), **tag))
    assert s.K_source == "metadata"
    assert np.isclose(s.K[0, 0], 26 / 43.2666 * np.hypot(96, 64))


def test_folder_of_images_in_natural_order(tmp_path):
    frames = moving_square(12)
    for i, f in enumerate(frames):
        cv2.imwrite(str(tmp_path / f"img_{i}.png"), f[:, :, ::-1])
    s = read_video(tmp_path)
    assert (s.frames == frames).all()  # img_2 before img_10
    assert any("frame rate" in n for n in s.notes)


def test_exif_focal_length(tmp_path):
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8)
    exif += struct.pack("<HHHII", 1, 0x8769, 4, 1, 26) + struct.pack("<I", 0)
    exif += struct.pack("<HHHIHH", 1, 0xA405, 3, 1, 28, 0) + struct.pack("<I", 0)
    jpeg = cv2.imencode(".jpg", moving_square(1)[0])[1].tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])
    assert equivalent_focal(path) == 28
    path.write_bytes(path.read_bytes()[:30])
    assert equivalent_focal(path) is None
    assert equivalent_focal(tmp_path / "none.jpg") is None


def test_truncated_video_gives_what_is_there(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (40, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "v.mp4", noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.6)])
    s = read_video(path)
    assert 8 <= len(s) < 40
    assert any("cut off" in n or "damaged" in n for n in s.notes)
    path.write_bytes(data[: len(data) // 50])
    with pytest.raises(UnusableInput):
        read_video(path)


def test_unusable_videos_say_why_in_one_sentence(tmp_path, square_video):
    empty = tmp_path / "empty.mp4"
    empty.touch()
    text = tmp_path / "text.mp4"
    text.write_text("this is no video\n" * 50)
    (tmp_path / "none").mkdir()
    cases = {
        tmp_path / "missing.mp4": "does not exist",
        empty: "is empty",
        text: "not a video",
        tmp_path / "none": "no png or jpg",
        write_video(tmp_path / "sound.mp4", moving_square(0)): "only sound",
        write_video(tmp_path / "one.mp4", moving_square(1)): "has 1 frame, but at least 8",
    }
    for path, words in cases.items():
        with pytest.raises(UnusableInput, match=words) as e:
            read_video(path)
        assert "\n" not in str(e.value) and str(e.value).endswith(".")
    with pytest.raises(UnusableInput, match="more than .* GiB of memory"):
        read_video(square_video, max_bytes=64 * 96 * 3 * 5)
    with pytest.raises(UnusableInput, match="in the chosen part"):
        read_video(square_video, start=100)


def test_a_playlist_must_not_reach_other_files(tmp_path, square_video):
    playlist = tmp_path / "list.mp4"
    playlist.write_text(f"ffconcat version 1.0\nfile 'http://localhost:1/{square_video.name}'\n")
    with pytest.raises(UnusableInput):
        read_video(playlist)


def test_wrong_intrinsics(square_video):
    for K, words in ((make_K(100, 100, 480, 320), "outside"), (make_K(1, 1, 48, 32), "focal lengths")):
        with pytest.raises(UnusableInput, match=words):
            read_video(square_video, K=K)


def test_shrunk_size():
    assert shrunk_size(1920, 1080, 640) == (640, 360)
    assert shrunk_size(1080, 1920, 640) == (360, 640)
    assert shrunk_size(100, 50, 640) == (100, 50) == shrunk_size(100, 50, 0) == shrunk_size(100, 50, None)
