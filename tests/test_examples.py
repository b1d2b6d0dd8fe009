"""Every example runs, and is short."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from handhold.scene import save_npz

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short_and_run_here():
    files = sorted(EXAMPLES.glob("*.py"))
    run_here = ["01_hand_model", "02_run_and_read_scene", "03_splat", "04_volume", "05_pose_from_silhouette"]
    run_here += ["06_synthetic", "07_novel_views"]
    assert [p.stem for p in files] == run_here, "run the new one here"
    assert all(len(p.read_text(encoding="utf-8").splitlines()) <= 80 for p in files)


def test_hand_model(tmp_path, capsys):
    load("01_hand_model").main(str(tmp_path / "hand.obj"))
    said = capsys.readouterr().out
    assert "watertight True" in said and (tmp_path / "hand.obj").stat().st_size > 10_000


def test_run_and_read_scene(tmp_path, capsys):
    from truth_scene import demo_truth, truth_scene

    truth_scene(demo_truth()).save(tmp_path / "scene.npz")
    for source in (tmp_path, tmp_path / "scene.npz"):
        load("02_run_and_read_scene").main(str(source))
        said = capsys.readouterr().out
        assert "48 frames, 480x360" in said and "object: 48 valid frames" in said and "fingertips stay within" in said


def test_reading_what_is_not_a_scene_ends_with_one_sentence(tmp_path):
    from handhold import UnusableInput

    with pytest.raises(UnusableInput, match="does not exist"):
        load("02_run_and_read_scene").main(str(tmp_path))


def test_splat(tmp_path):
    assert load("03_splat").main(str(tmp_path / "both.png")) > 17
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_volume(tmp_path):
    ball, box = load("04_volume").main(str(tmp_path / "both.png"), size=32)
    assert 0.17 < ball < 0.20 and 0.13 < box < 0.16
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_pose_from_silhouette(tmp_path):
    degrees, millimetres = load("05_pose_from_silhouette").main(str(tmp_path / "hand.png"), size=96, steps=80)
    assert degrees < 1.0 and millimetres < 1.5


def test_novel_views(tmp_path):
    from tiny_scene import made

    scene, splats = made()
    scene.save(tmp_path / "scene.npz")
    for name, g in splats.items():
        save_npz(tmp_path / "3_fit" / f"{name}_gaussians.npz", g.arrays())
    seen, hidden = load("07_novel_views").main(str(tmp_path), str(tmp_path / "views.png"))
    assert 0.02 < seen < hidden < 0.5
    assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_synthetic(tmp_path):
    got = load("06_synthetic").main(str(tmp_path / "s"), samples=4, size=96)
    assert got["vertices"] < 1e-4 and abs(got["iou"] - 0.75) < 0.03 and got["pictures"] == 4
    assert (tmp_path / "s" / "sheet.png").read_bytes().startswith(b"\x89PNG")
