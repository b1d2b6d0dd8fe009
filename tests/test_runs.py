"""The run folder: stamps that trust only what is whole, and the lock."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from handhold.config import Config
from handhold.errors import UnusableInput
from handhold.files import atomic_file, digest, write_atomically
from handhold.runs import Run, is_run, make_key, open_run


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "r")


def finished(run: Run, key: str = "k") -> None:
    run.begin("track", key, ("2_track",), False)
    run.track_dir.mkdir(parents=True)
    (run.track_dir / "tracks.npz").write_bytes(b"12345")
    run.finish("track", key, ("2_track",), 1.5, ["a note"], ["a reason"])


def test_a_stamp_tells_what_the_stage_told(run):
    assert run.stamp("track") is None
    finished(run)
    stamp = run.stamp("track")
    assert stamp.key == "k" and stamp.seconds == 1.5
    assert stamp.notes == ("a note",) and stamp.reasons == ("a reason",)
    assert stamp.files == {"2_track/tracks.npz": (5, digest(run.track_dir / "tracks.npz"))}


def test_a_stamp_does_not_count_when_a_file_is_gone_or_cut(run):
    finished(run)
    (run.track_dir / "tracks.npz").write_bytes(b"123")
    assert run.stamp("track") is None
    finished(run)
    (run.track_dir / "tracks.npz").unlink()
    assert run.stamp("track") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": 1}', "\x00"])
def test_a_damaged_stamp_does_not_count(run, text):
    finished(run)
    (run.root / "stamps" / "track.json").write_text(text)
    assert run.stamp("track") is None


def test_begin_removes_the_stamp_and_the_files(run):
    finished(run)
    run.begin("track", "k", ("2_track",), False)
    assert run.stamp("track") is None and not run.track_dir.exists()


def test_a_resumable_stage_keeps_its_folder_only_for_the_same_key(run):
    outputs = ("3_fit", "scene.npz")
    run.begin("fit", "k", outputs, True)
    run.fit_dir.mkdir()
    (run.fit_dir / "checkpoint").touch()
    run.scene_path.touch()
    run.begin("fit", "k", outputs, True)
    assert (run.fit_dir / "checkpoint").exists() and not run.scene_path.exists()
    run.begin("fit", "other", outputs, True)
    assert not run.fit_dir.exists()


def test_begin_removes_half_written_files_of_a_killed_attempt(run):
    half, other = run.root / ".preview.mp4.x1y2", run.root / ".lock"
    run.root.mkdir(exist_ok=True)
    half.touch()
    other.touch()
    run.begin("export", "k", ("preview.mp4",), False)
    assert not half.exists() and other.exists()


def test_leftovers_of_a_killed_write_are_not_stamped(run):
    run.begin("track", "k", ("2_track",), False)
    run.track_dir.mkdir()
    (run.track_dir / ".tracks.npz.x1y2").touch()
    (run.track_dir / "tracks.npz").touch()
    stamp = run.finish("track", "k", ("2_track",), 0, [], [])
    assert list(stamp.files) == ["2_track/tracks.npz"] and not (run.track_dir / ".tracks.npz.x1y2").exists()


def test_run_json_round_trip(run, tmp_path):
    config = Config(seed=5)
    run.save_info(config, tmp_path / "v.mp4", "abc")
    assert is_run(run.root) and open_run(run.root).config() == config
    assert run.video == tmp_path / "v.mp4"
    assert json.loads((run.root / "run.json").read_text())["input"]["sha256"] == "abc"
    with pytest.raises(UnusableInput, match="not a run folder"):
        open_run(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from handhold.runs import Run
with Run(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_one_run_and_a_dead_one_does_not_matter(run):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(run.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UnusableInput, match=f"being written by process {other.pid}"), run.lock():
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with run.lock():
        pass


def test_the_lock_is_free_again_afterwards(run):
    for _ in range(2):
        with run.lock():
            pass


def test_atomic_writes_leave_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "f"
    write_atomically(path, "old")
    with pytest.raises(RuntimeError), atomic_file(path) as f:
        f.write(b"half of the n")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_digest_sees_names_and_content(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = digest(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    second = digest(tmp_path / "a")
    (tmp_path / "a" / "y").write_text("2")
    assert len({first, second, digest(tmp_path / "a")}) == 3


def test_keys_depend_on_values_and_not_on_order():
    assert make_key(a=1, b=[2]) == make_key(b=[2], a=1) != make_key(a=1, b=[3])
