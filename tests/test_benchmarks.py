"""The benchmark program runs, compares what it times, and its tables can be made. Nothing here asserts on time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from handhold import kernels

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))
measure = pytest.importorskip("measure", reason="an installed package without benchmarks/")
tables = pytest.importorskip("tables")


@pytest.mark.slow
@pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
def test_quick_run_and_its_tables(tmp_path):
    out = tmp_path / "render.json"
    command = [sys.executable, str(FOLDER / "render.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(out.read_text())
    for case in results["cases"].values():
        assert case["ours"]["median"] > 0
        for name, peer in case["peers"].items():
            assert "ratio" in peer or "not installed" in peer["absent"], (case["title"], name, peer)
    assert results["cases"]["splat"]["peers"]["dense torch, per tile"]["errors"]["grad viewmat"] < 1e-3
    for make in (tables.speed_table, tables.splat_table, tables.machine_table, tables.bars_table):
        rows = [line for line in make(results).splitlines() if line.startswith("|")]
        assert len(rows) > 2 and len({row.count("|") for row in rows}) == 1, make.__name__


def run_against(peer):
    case = measure.Case("a case", lambda: {"image": torch.zeros(4)}, {"peer": measure.Peer(peer)})
    return measure.run_case(case, rounds=1, budget_s=0.1)["peers"]["peer"]


def test_a_peer_with_other_results_is_not_timed():
    for value in (0.1, torch.nan):
        row = run_against(lambda value=value: {"image": torch.full((4,), value)})
        assert "differ" in row["absent"] and "ratio" not in row
    assert "ratio" in run_against(lambda: {"image": torch.full((4,), 1e-5)})


def test_a_peer_that_fails_is_reported():
    assert "ZeroDivisionError" in run_against(lambda: {"image": 1 / 0})["absent"]


def test_a_demand_whose_peer_was_not_timed_stays_and_is_not_met():
    image = {"image": torch.zeros(4)}
    wanted = {"slow": measure.Peer(lambda: image, 4), "none": measure.Peer("not installed", 4)}
    result = measure.run_case(measure.Case("a case", lambda: image, wanted, slow_ms=-1), rounds=1, budget_s=0.1)
    assert [(b["value"], b["bar"], b["passed"]) for b in result["bars"]] == [(None, ">= 4", False)] * 2
    signed = {"machine": {"cpu": "", "cores": 1, "isa": ""}, "quick": False, "date": ""}
    rows = tables.bars_table(result | signed).splitlines()[2:4]
    assert all(row.endswith("| not measured | >= 4 | **no** |") for row in rows)


def test_results_may_be_read_by_all(tmp_path):
    measure.write(tmp_path / "folder" / "results.json", {"a": 1})
    assert (tmp_path / "folder" / "results.json").stat().st_mode & 0o777 == 0o644


def test_gradients_are_compared_by_relative_norm():
    a, b = {"grad x": torch.tensor([1e3, 0.0])}, {"grad x": torch.tensor([1e3, 0.5])}
    errors, same = measure.differences(a, b)
    assert same and errors["grad x"] == pytest.approx(5e-4, rel=1e-3)
    assert not measure.differences(a, {"grad x": torch.tensor([1e3, 2.0])})[1]


def test_a_block_goes_between_its_markers():
    page = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb"
    assert tables.insert(page, "x", r"new \1") == "a\n<!-- x:begin -->\nnew \\1\n<!-- x:end -->\nb"
    assert tables.insert(page, "y", "new") == page
