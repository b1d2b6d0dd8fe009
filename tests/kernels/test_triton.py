"""Triton kernels without a GPU: in Triton's interpreter against the float64 twins, and compiled for sm_90.

Each in a process of its own: TRITON_INTERPRET is read when Triton is imported, and must not reach other tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import handhold
from handhold.kernels import _triton

pytestmark = pytest.mark.timeout(600)  # the first test waits for all cases of the interpreter
HERE = Path(__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed (pip install 'handhold[gpu]', Linux)")

SPLATS = (
    "plain", "harmonics_and_bodies", "unused_coefficients", "features", "many_features",
    "behind_and_across_the_near_plane", "far_outside_the_image", "opacity_0_and_1", "stops_when_opaque", "needles",
    "disks", "disks_with_everything", "disks_near_and_edge_on", "one_pixel", "7x5", "no_gaussians",
    "none_in_view", "other_tiles", "over_many_tiles",
)  # fmt: skip
OTHERS = ("camera_sum", "ssim", "grid_sample", "grid_march", "grid_render", "grid_adam")


def python(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """A Python process of its own that finds this handhold, and compiles anew into a folder that goes away."""
    paths = [str(Path(handhold.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "TRITON_CACHE_DIR": cache, **variables}
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def run(script: str, *arguments: str, **variables: str) -> dict:
    done = python(str(HERE / script), *arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict:
    return run("triton_cases.py", TRITON_INTERPRET="1")


def assert_close(figures: dict) -> None:
    wrong = {k: v for k, v in figures.items() if k.startswith(("image", "alpha")) and not v <= 1e-4}
    wrong |= {k: v for k, v in figures.items() if k.startswith("d ") and not v <= 1e-3}
    assert not wrong


@needs_triton
@pytest.mark.parametrize("case", SPLATS)
def test_splat_equals_the_float64_twin(interpreted, case):
    figures = interpreted[case]
    assert_close(figures)
    assert figures["medians"] == 0


@needs_triton
@pytest.mark.parametrize("case", OTHERS)
def test_grid_and_ssim_equal_their_float64_twins(interpreted, case):
    assert_close(interpreted[case])
    assert interpreted[case].get("optional", True) and interpreted[case].get("misses", True)


@needs_triton
def test_the_cases_exercise_what_they_say(interpreted):
    assert interpreted["stops_when_opaque"]["opaque"] > 0.9998
    assert interpreted["opacity_0_and_1"]["opaque"] > 0.98
    assert interpreted["grid_march"]["hits"] >= 5


@needs_triton
def test_capacity_is_exact_or_loud(interpreted):
    assert interpreted["capacity"]["needed"] > 10
    assert interpreted["capacity"]["same"] and interpreted["capacity"]["nan"]
    assert "run it once before" in interpreted["capacity"]["refused"]  # while a graph is captured


@needs_triton
def test_numbers_that_are_not_finite_stay_where_they_are(interpreted):
    figures = interpreted["hostile_numbers"]
    assert figures["image 3d"] == figures["image 2d"] == 0
    assert figures["gradients 3d"] and figures["gradients 2d"]


@needs_triton
def test_what_does_not_suit_is_refused(interpreted):
    refused = {k: v for k, v in interpreted["refusals"].items() if k != "seconds"}
    assert refused == {"float64": "TypeError", "capacity": "ValueError", "features": "ValueError"}


@needs_triton
@pytest.mark.slow
def test_no_kernel_spills_on_sm_90():
    found = run("triton_compile.py", "light")
    assert all(k["spilled"] == 0 for k in found.values()), found
    assert all(k["registers"] <= 128 for k in found.values()), found  # 16 warps on a multiprocessor, at least


@needs_triton
@pytest.mark.slow
def test_no_kernel_spills_with_all_channels():
    found = run("triton_compile.py", "heavy")
    assert all(k["spilled"] == 0 for k in found.values()), found


def test_unavailable_says_why():
    assert _triton.available() == (not _triton.why_unavailable())
    if not HAS_TRITON:
        assert "handhold[gpu]" in _triton.why_unavailable()


@needs_triton
def test_what_a_gpu_lacks_is_named(monkeypatch):
    monkeypatch.setattr(_triton.torch.cuda, "is_available", lambda: True)
    for capability, compiler, reason in (
        ((6, 1), "gcc", "7.0 or newer"),
        ((9, 0), None, "C compiler"),
        ((9, 0), "gcc", ""),
    ):
        monkeypatch.setattr(_triton.torch.cuda, "get_device_capability", lambda c=capability: c)
        monkeypatch.setattr(_triton.shutil, "which", lambda name, found=compiler: found)
        said = _triton.why_unavailable.__wrapped__()  # what is kept is this machine's answer
        assert reason in said and bool(said) == bool(reason)


def test_nothing_imports_triton_before_it_is_used():
    code = "import sys; from handhold.kernels import grid, splat, ssim; print('triton' in sys.modules)"
    done = python("-c", code)
    assert done.stdout.strip() == "False", done.stderr


def test_the_gpu_benchmark_says_when_there_is_none():
    script = HERE.parents[1] / "benchmarks" / "gpu.py"
    if _triton.available():
        pytest.skip("there is a GPU")
    done = python(str(script))
    assert done.returncode == 1 and done.stderr.startswith("Nothing to measure: ") and "Traceback" not in done.stderr
