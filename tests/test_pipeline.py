"""Stamps, resume and failure of the pipeline, on small stages that compute a number."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fake_stages
from handhold.config import BadConfig, Config, EvaluateConfig, ExportConfig, PrepareConfig, TrackConfig
from handhold.errors import MissingAsset, UnusableInput
from handhold.pipeline import STAGES, run
from handhold.progress import Progress

ALL = ["prepare", "track", "fit", "evaluate", "export"]


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.bin"
    path.write_bytes(b"pixels")
    return path


@pytest.fixture
def go(video, tmp_path, monkeypatch):
    """Run the fake stages; gives (result, names of the stages that ran)."""

    def call(config=None, trouble="", **kw):
        monkeypatch.setattr(fake_stages, "TROUBLE", trouble)
        fake_stages.RAN.clear()
        result = run(kw.pop("video", video), tmp_path / "out", config or Config(), stages=fake_stages.STAGES, **kw)
        return result, list(fake_stages.RAN)

    return call


def metrics(out: Path) -> float:
    return json.loads((out / "metrics.json").read_text())["metrics"]["x"]


def test_a_second_run_does_nothing_and_tells_the_same(go):
    first, ran = go()
    assert ran == ALL and first.notes == ("the camera was assumed",) and first.reasons == ("half of the frames",)
    second, ran = go()
    assert ran == [] and list(second.kept) == ALL
    assert (second.notes, second.reasons, second.partial) == (first.notes, first.reasons, True)
    assert set(second.seconds) == set(ALL)


def test_a_setting_reruns_its_stage_and_what_follows_from_it(go, tmp_path):
    go()
    before = metrics(tmp_path / "out")
    assert go(Config(export=ExportConfig(preview=False)))[1] == ["export"]
    truth = tmp_path / "gt.npz"
    np.savez(truth, a=1)
    scored = Config(evaluate=EvaluateConfig(truth=truth))
    assert go(scored)[1] == ["evaluate", "export"]  # export because preview is back
    np.savez(truth, a=2)
    assert "evaluate" in go(scored)[1]  # a path counts by its content
    assert go(Config(prepare=PrepareConfig(stride=2)))[1] == ALL
    assert metrics(tmp_path / "out") != before
    go()
    assert metrics(tmp_path / "out") == before


def test_another_video_and_another_seed_run_everything(go, video):
    go()
    assert go(Config(seed=1))[1] == ALL
    video.write_bytes(b"other pixels")
    assert go(Config(seed=1))[1] == ALL


def test_a_missing_package_is_told_before_any_work(go, monkeypatch):
    monkeypatch.setattr("handhold.tracking._sfm_learned.PACKAGES", ("no_such_package",))
    learned = Config(track=TrackConfig(features="xfeat"))
    with pytest.raises(MissingAsset, match="handhold.xfeat."):
        go(learned)
    assert fake_stages.RAN == []
    assert go(learned, last="prepare")[1] == ["prepare"]  # which has no use for it


def test_the_same_output_stops_the_chain(go):
    """A stage that ran again and made the same bytes does not make the next one run."""
    go()
    assert go(first="track", last="track", fresh=True)[1] == ["track"]
    assert go()[1] == []


def test_a_damaged_output_is_made_again(go, tmp_path):
    go()
    (tmp_path / "out" / "2_track" / "tracks.npz").write_bytes(b"")
    assert go()[1] == ["track"]


def test_one_stage_alone_needs_the_one_before(go, tmp_path):
    with pytest.raises(UnusableInput, match="not a run folder"):
        go(first="track", last="track")
    go(last="prepare")
    with pytest.raises(UnusableInput, match="no finished `track` stage; run `handhold track`"):
        go(first="fit", last="fit")
    assert go(first="track", last="track", video=None)[1] == ["track"]
    assert go()[1] == ["fit", "evaluate", "export"]


@pytest.mark.parametrize("stage", ALL)
def test_kill_in_any_stage_and_the_same_command_gives_the_same_numbers(video, tmp_path, stage):
    program = [sys.executable, str(Path(fake_stages.__file__)), str(video)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*program, str(whole)], check=True, timeout=60)
    killed = subprocess.run([*program, str(cut), f"{stage}:kill"], timeout=60)
    assert killed.returncode == -9
    assert not (cut / "stamps" / f"{stage}.json").exists()
    subprocess.run([*program, str(cut)], check=True, timeout=60)
    assert metrics(cut) == metrics(whole)
    for name in ("1_prepare/half.bin", "1_prepare/evidence.npz", "2_track/tracks.npz", "scene.npz", "report.html"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_fit_goes_on_from_its_checkpoint(go, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        go(trouble="fit:interrupt")
    kept = (tmp_path / "out" / "3_fit" / "checkpoint.npz").stat().st_mtime_ns
    assert go()[1] == ["fit", "evaluate", "export"]
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["stage"] == "fit" and e["event"] in ("begin", "stopped", "done")] == [
        "begin", "stopped", "begin", "done",
    ]  # fmt: skip
    assert kept < (tmp_path / "out" / "3_fit" / "checkpoint.npz").stat().st_mtime_ns


@pytest.mark.parametrize("stage", ALL)
def test_a_full_disk_is_one_sentence_and_no_stamp(go, tmp_path, stage):
    with pytest.raises(UnusableInput, match=f"disk is full.*same command.*{stage} stage") as e:
        go(trouble=f"{stage}:full")
    assert e.value.exit_code == 3
    assert not (tmp_path / "out" / "stamps" / f"{stage}.json").exists()
    assert stage in go()[1]


def test_missing_input_leaves_nothing_behind(go, tmp_path):
    with pytest.raises(UnusableInput, match="does not exist"):
        go(video=tmp_path / "none.mp4")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_not_taken(go, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("my own")
    with pytest.raises(UnusableInput, match="holds other files"):
        go()
    assert (tmp_path / "out" / "report.html").read_text() == "my own"


def test_unreadable_truth_is_told_before_any_work(go, tmp_path):
    (tmp_path / "gt.npz").write_text("no")
    with pytest.raises(UnusableInput, match="gt.npz"):
        go(Config(evaluate=EvaluateConfig(truth=tmp_path / "gt.npz")))
    assert fake_stages.RAN == []


@pytest.mark.parametrize("device", ["warp", "cuda"])
def test_a_device_that_is_not_there(go, device):
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BadConfig, match="cpu"):
        go(Config(device=device))


def test_an_output_path_that_is_a_file(video, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UnusableInput, match="choose another"):
        run(video, tmp_path / "file" / "out", stages=fake_stages.STAGES)


def test_progress_keeps_events_notes_and_reasons(tmp_path):
    report = Progress(tmp_path / "events.jsonl")
    report.begin("fit")
    for _ in report.each(range(3), 3, "steps"):
        pass
    report(1.0, "end", loss=0.5)
    report.note("n")
    report.note("n")
    report.partial("p")
    report.end("done")
    events = [json.loads(line) for line in report.events.read_text().splitlines()]
    assert {"begin", "progress", "note", "partial", "done"} == {e["event"] for e in events}
    assert report.notes == ["n"] and report.reasons == ["p"]
    assert any(e.get("loss") == 0.5 for e in events)


def test_the_stage_table_fits_the_configuration():
    assert [s.name for s in STAGES] == ALL
    for stage in STAGES:
        for name in stage.settings:
            value = Config()
            for part in name.split("."):
                value = getattr(value, part)
    outputs = [o for s in STAGES for o in s.outputs]
    assert len(outputs) == len(set(outputs))
    assert replace(STAGES[0], function=print).load() is print
