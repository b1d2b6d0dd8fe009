"""The benchmark of methods takes tracked runs as they are, and its table can be made."""

import sys
from pathlib import Path

import pytest

from handhold.runs import Run

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
methods = pytest.importorskip("methods", reason="an installed package without benchmarks/")
tables_methods = pytest.importorskip("tables_methods")


def finished(root: Path) -> Run:
    """A run folder whose first two stages are done."""
    run = Run(root)
    for name, folder in (("prepare", run.prepare_dir), ("track", run.track_dir)):
        folder.mkdir(parents=True)
        (folder / "made.txt").write_text(name)
        run.finish(name, f"key of {name}", (folder.name,), 1.0, ["a note"], [])
    (root / "run.json").write_text("{}")
    return run


def test_a_tracked_clip_is_taken_once(tmp_path):
    source, target = finished(tmp_path / "a"), Run(tmp_path / "b")
    methods.take_tracked(source, target)
    for name in ("prepare", "track"):
        assert target.stamp(name).key == source.stamp(name).key and target.stamp(name).notes == source.stamp(name).notes
    assert (target.track_dir / "made.txt").read_text() == "track"
    (target.track_dir / "of the fit.txt").write_text("kept")
    methods.take_tracked(source, target)
    assert (target.track_dir / "of the fit.txt").exists()


def test_the_table_has_a_row_for_each_method_and_clip():
    row = {"metrics": {"cd": 0.2, "mpjpe_right": 9.0}, "fit_s": 50.2, "fit_peak_mb": 900, "when": "2026-11-28"}
    broken = {"error": "fit (exit 3): no hand", "when": "2026-11-28"}
    results = {"handhold": "0.1.0", "cpus": 2, "machine": "x", "methods": {}}
    results["methods"] = {
        "rigid": {"a": row},
        "bigs": {"a": row, "b": broken},
        "bigs:plain": {"a": row},
        "hold": {"a": row},
    }
    lines = tables_methods.methods_table("rigid", "bigs")(results).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 6 and len({line.count("|") for line in table}) == 1
    assert "plain" not in tables_methods.methods_table("rigid", "bigs", variants=False)(results)
    assert [line.split("|")[2].strip() for line in table[2:]] == ["rigid", "bigs", "bigs, plain", "bigs"]
    assert "no hand" in table[-1]
    assert "No results yet" in tables_methods.methods_table("hold")({})
