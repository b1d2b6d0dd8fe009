"""`handhold train` and `python -m handhold.train`: settings from TOML, and few packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from handhold import cli, train
from handhold.config import BadConfig
from handhold.regressors.training.loop import Trained

SHIPPED = Path(__file__).parents[1] / "configs" / "frontend.toml"


@pytest.fixture
def asked(monkeypatch):
    """What the training loop is asked for, instead of a training."""
    calls = []

    def fake(tasks, stream, loop, out, **kwargs):
        calls.append((tasks, loop, Path(out), kwargs))
        return Trained(3, 1.0, {"parametric/mpjpe": 12.0}, {"parametric": Path(out) / "export/parametric.safetensors"})

    monkeypatch.setattr(train, "train", fake)
    return calls


def test_settings_come_from_the_file_and_options_win(tmp_path, asked, capsys):
    (tmp_path / "c.toml").write_text(
        'tasks = ["direct", "segmenter"]\n[loop]\nsteps = 7\n[loop.optim]\nlr = 1e-4\n[direct]\ncrops = 5\n'
        "[direct.net]\ndepth = 1\n[direct.net.vit]\nwidth = 96\n[direct.augment]\nblur = 0\n[synth]\nobjects = 50\n"
    )
    argv = ["train", "frontend", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path / "o"), "--device", "cuda"]
    assert cli.main([*argv, "--budget-seconds", "60", "--json"]) == 0
    (tasks, loop, out, kwargs), told = asked[0], json.loads(capsys.readouterr().out)
    assert [t.name for t in tasks] == ["direct", "segmenter"] and out == tmp_path / "o"
    assert (loop.steps, loop.optim.lr, loop.device, loop.budget_seconds) == (7, 1e-4, "cuda", 60.0)
    assert (tasks[0].config.crops, tasks[0].net.depth, tasks[0].net.vit.width) == (5, 1, 96)
    assert tasks[0].config.augment.blur == 0 and kwargs["settings"]["synth"]["objects"] == 50
    assert "parametric" not in kwargs["settings"] and told["ok"] and told["metrics"] == {"parametric/mpjpe": 12.0}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("regressor", ["parametric", "direct"]),
        ("segmenter", ["segmenter"]),
        ("frontend", ["parametric", "direct", "segmenter"]),
    ],
)
def test_the_shipped_settings_train_every_kind(kind, names, tmp_path, asked):
    assert train.main([kind, "--config", str(SHIPPED), "--out", str(tmp_path)]) == 0
    assert [t.name for t in asked[0][0]] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[loop]\nspeed = 3\n", "loop.speed"),
        ('tasks = ["parametrik"]\n', "parametrik"),
        ("[parametric.net]\ndepth = 1.5\n", "parametric.net.depth"),
    ],
)
def test_what_is_wrong_with_the_settings_is_named(text, message, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(BadConfig, match=message.replace(".", r"\.")):
        train.read_config(tmp_path / "c.toml")
    assert train.main(["frontend", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_kind_that_no_task_is_of(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('tasks = ["segmenter"]\n')
    assert train.main(["regressor", "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path)]) == 2
    assert "none of them is a regressor" in capsys.readouterr().err


@pytest.mark.slow
def test_a_rented_machine_needs_few_packages():
    code = """
import sys
for name in ("tyro", "rich", "av", "pycolmap", "manifold3d", "ai_edge_litert", "skimage"):
    sys.modules[name] = None
import handhold.train, handhold.datasets.synthetic.scenes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
