"""The command line: exit codes, what is printed where, and bad input from end to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fake_stages
from clips import moving_square, write_video
from handhold import pipeline
from handhold.cli import main, parse
from handhold.config import STAGES, Config, PrepareConfig
from handhold.datasets.masks import write_masks


@pytest.fixture
def fakes(monkeypatch):
    """The real command line over the fake stages."""
    defaults = pipeline.run.__kwdefaults__ | {"stages": fake_stages.STAGES}
    monkeypatch.setattr(pipeline.run, "__kwdefaults__", defaults)
    monkeypatch.setattr(pipeline.result, "__defaults__", (fake_stages.STAGES, ()))
    monkeypatch.setattr(fake_stages, "TROUBLE", "")
    fake_stages.RAN.clear()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def usage(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as e:
        main(argv)
    return e.value.code


def test_options_reach_the_configuration(tmp_path):
    argv = "run v.mp4 --out o --K K.txt --truth gt.npz --masks m --joints j.npz "
    argv += "--start 1 --end 2.5 --stride 3 --max-side 320"
    command, args = parse([*argv.split(), "--seed", "4", "--device", "cuda", "--method", "rigid", "--quiet", "--json"])
    assert command == "run" and args.video == Path("v.mp4") and args.out == Path("o") and args.quiet and args.json
    config = args.settings()
    assert config.prepare == PrepareConfig(Path("K.txt"), Path("m"), Path("j.npz"), 1.0, 2.5, 3, 320)
    assert config.evaluate.truth == Path("gt.npz") and (config.seed, config.device) == (4, "cuda")
    assert parse(["run", "v.mp4"])[1].settings() == Config()


def test_a_file_gives_defaults_and_options_win(tmp_path):
    (tmp_path / "c.toml").write_text("seed = 3\n[prepare]\nstride = 2\n")
    config = parse(["run", "v.mp4", "--config", "c.toml", "--stride", "5"])[1].settings()
    assert config.seed == 3 and config.prepare.stride == 5
    assert parse(["run", "v.mp4", "--preset", "draft"])[1].settings().prepare.max_side == 320


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["run"],
        ["walk"],
        ["run", "v.mp4", "--speed", "9"],
        ["run", "v.mp4", "--stride", "many"],
        ["run", "v", "--method", "x"],
    ],
)
def test_wrong_usage_exits_2(argv, capsys):
    assert usage(argv) == 2


def test_impossible_settings_exit_2(capsys, tmp_path):
    (tmp_path / "c.toml").write_text("[prepare]\nstride = -1\n")
    for argv in (["run", "v.mp4", "--stride", "0"], ["run", "v.mp4", "--config", "c.toml"]):
        try:
            code = main(argv)
        except SystemExit as e:  # the parser may be the one to refuse
            code = e.code
        assert code == 2
        assert "stride must be 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, "run", *STAGES, "demo", "assets", "doctor"])
def test_help_exits_0(command, capsys):
    assert usage([command, "--help"] if command else ["--help"]) == 0
    assert "handhold" in capsys.readouterr().out


def test_run_prints_the_result_and_json_prints_only_json(fakes, square_video, capsys):
    assert main(["run", str(square_video), "--out", "o"]) == 0
    out = capsys.readouterr().out
    assert "partial: half of the frames" in out and "report" in out and "x " in out
    assert main(["run", str(square_video), "--out", "o", "--json"]) == 0
    got = capsys.readouterr()
    told = json.loads(got.out)
    assert got.err == "" and told["ok"] and told["partial"] and told["reasons"] == ["half of the frames"]
    assert told["kept"] == list(STAGES) and "x" in told["metrics"] and Path(told["files"]["report.html"]).is_file()
    assert main(["run", str(square_video), "--out", "o", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_default_folder_is_named_after_the_video(fakes, square_video, tmp_path):
    assert main(["run", str(square_video), "--quiet"]) == 0
    assert (tmp_path / "runs" / "square" / "metrics.json").is_file()


def test_stages_alone_keep_the_settings_of_the_run(fakes, square_video, capsys):
    assert main(["prepare", str(square_video), "--out", "o", "--stride", "3", "--quiet"]) == 0
    assert fake_stages.RAN == ["prepare"]
    for stage in STAGES[1:]:
        assert main([stage, "o", "--quiet"]) == 0
    assert fake_stages.RAN == list(STAGES)
    assert main(["run", str(square_video), "--out", "o", "--stride", "3", "--quiet"]) == 0
    assert fake_stages.RAN == list(STAGES)  # nothing had changed
    assert main(["fit", "o", "--fresh", "--quiet"]) == 0
    assert fake_stages.RAN == [*STAGES, "fit"]
    for _ in range(2):  # a switch that is off already may be said again
        assert main(["fit", "o", "--fit.no-mirror", "--quiet"]) == 0
    assert fake_stages.RAN == [*STAGES, "fit", "fit"]
    assert main(["track", str(square_video)]) == 3
    assert "not a run folder" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(fakes, square_video, capsys, monkeypatch):
    monkeypatch.setattr(fake_stages, "TROUBLE", "track:interrupt")
    argv = ["run", str(square_video), "--out", "my run"]
    assert main(argv) == 130
    assert f"handhold run {square_video} --out 'my run'" in capsys.readouterr().err
    monkeypatch.setattr(fake_stages, "TROUBLE", "")
    assert main([*argv, "--quiet"]) == 0
    assert fake_stages.RAN == ["prepare", "track", "track", "fit", "evaluate", "export"]


def test_a_full_disk_exits_3(fakes, square_video, capsys, monkeypatch):
    monkeypatch.setattr(fake_stages, "TROUBLE", "fit:full")
    assert main(["run", str(square_video), "--out", "o", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"] and told["exit_code"] == 3 and "disk is full" in told["error"]


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of `handhold run` and words of the one sentence they must give."""
    good = write_video(folder / "good.mp4", moving_square(12))
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:900])
    (folder / "K.txt").write_text("100 100 480 320")
    (folder / "words.txt").write_text("focal length: long")
    square = {"object": np.ones((12, 33, 44), bool)}
    write_masks(folder / "masks", square, np.arange(12))
    return {
        "missing": (["missing.mp4"], "does not exist"),
        "empty": (["empty.mp4"], "is empty"),
        "truncated": (["cut.mp4"], "video"),
        "sound": ([str(write_video(folder / "sound.mp4", moving_square(0)))], "only sound"),
        "one frame": ([str(write_video(folder / "one.mp4", moving_square(1)))], "1 frame,"),
        "K of another size": (["good.mp4", "--K", "K.txt"], "outside the 96x64 frame"),
        "K of words": (["good.mp4", "--K", "words.txt"], "not a number"),
        "K missing": (["good.mp4", "--K", "none.txt"], "does not exist"),
        "masks of another size": (["good.mp4", "--masks", "masks"], "44x33, but the video is 96x64"),
        "masks missing": (["good.mp4", "--masks", "none"], "does not exist"),
        "truth missing": (["good.mp4", "--truth", "none.npz"], "does not exist"),
        "part that is empty": (["good.mp4", "--start", "60"], "in the chosen part"),
    }


def test_bad_input_is_one_sentence_exit_3_and_nothing_to_trust(tmp_path, capsys):
    for name, (argv, words) in bad_inputs(tmp_path).items():
        assert main(["run", *argv, "--out", f"out {name}", "--quiet"]) == 3, name
        got = capsys.readouterr()
        assert got.out == "", name
        assert words in got.err and got.err.startswith("handhold: ") and got.err.count("\n") == 1, (name, got.err)
        assert not list(Path(f"out {name}").glob("stamps/*.json")), name


def test_ctrl_c_of_a_real_process(square_video, tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import fake_stages; from handhold import pipeline, cli\n"
        "slow = lambda run, config, report: (print('ready', flush=True), time.sleep(60))\n"
        "stages = (pipeline.Stage('prepare', slow, ('1_prepare',), ('prepare',), seeds_torch=False),)\n"
        "pipeline.run.__kwdefaults__['stages'] = stages\n"
        "sys.exit(cli.main(['run', sys.argv[2], '--out', 'o']))"
    )
    argv = [sys.executable, "-c", code, str(Path(__file__).parent), str(square_video)]
    listens = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a job in the background ignores it)
    p = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, preexec_fn=listens
    )
    assert p.stdout.readline() == "ready\n"
    time.sleep(0.2)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=30)
    assert p.returncode == 130 and "go on with" in err and "Traceback" not in err


def test_doctor_tells_what_is_there(capsys):
    code = main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == (0 if told["ok"] else 3)
    names = {f["name"] for f in told["findings"]}
    assert {"python", "torch", "kernels", "landmark weights", "pycolmap", "disk", "cores"} <= names
    assert main(["doctor"]) == code and "A reconstruction can" in capsys.readouterr().out


def test_poses_are_known_without_the_name_of_their_stage():
    for argv in (["--poses", "a.npz"], ["--poses=a.npz"], ["--fit.poses", "a.npz"]):
        assert parse(["fit", "RUN", *argv])[1].fit.poses == Path("a.npz")
