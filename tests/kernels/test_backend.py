"""Choice of backend, loading, and the thread pool."""

import contextlib
import io
import os
import subprocess
import sys
import threading

import pytest
import torch

from handhold import kernels
from handhold.errors import HandholdError
from handhold.kernels import _lib
from handhold.kernels.grid import SdfGrid
from handhold.losses import ssim
from handhold.render import splat

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")


def test_environment_forces_the_torch_path(monkeypatch):
    monkeypatch.setenv("HANDHOLD_BACKEND", "torch")
    assert kernels.resolve_backend() == "torch"
    assert SdfGrid(torch.zeros(4, 4, 4), (0, 0, 0), 0.1).backend == "torch"
    monkeypatch.setattr(_lib, "lib", lambda: pytest.fail("the compiled library was used"))
    assert ssim(torch.zeros(8, 8, 3), torch.zeros(8, 8, 3)).item() == pytest.approx(1)
    one = torch.ones(1, 3)
    r = splat(one, torch.ones(1, 4), one * 0.01, torch.ones(1), one, torch.eye(4)[None], torch.eye(3)[None], 4, 4)
    assert r.color.shape == (1, 4, 4, 3)


def test_environment_is_checked(monkeypatch):
    monkeypatch.setenv("HANDHOLD_BACKEND", "cuda")
    with pytest.raises(HandholdError, match="HANDHOLD_BACKEND"):
        kernels.resolve_backend()


def test_without_a_library_everything_runs_and_says_why(monkeypatch):
    monkeypatch.setattr(_lib, "_load", lambda: (None, "they were not built"))
    monkeypatch.delenv("HANDHOLD_BACKEND", raising=False)
    assert not kernels.available() and kernels.why_unavailable() == "they were not built"
    assert kernels.resolve_backend() == "torch"
    assert kernels.info()["available"] is False
    with pytest.raises(HandholdError, match="HANDHOLD_BACKEND=torch"):
        kernels.resolve_backend("cpu")
    monkeypatch.setenv("HANDHOLD_BACKEND", "cpu")
    with pytest.raises(HandholdError):
        kernels.resolve_backend()


@compiled
def test_choice_follows_the_tensors(monkeypatch):
    monkeypatch.delenv("HANDHOLD_BACKEND", raising=False)
    assert kernels.resolve_backend(None, torch.zeros(1), None) == "cpu"
    assert kernels.resolve_backend(None, torch.zeros(1), torch.zeros(1, dtype=torch.float64)) == "torch"
    with pytest.raises(TypeError):
        kernels.resolve_backend("cpu", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(ValueError):
        kernels.resolve_backend("gpu")


@compiled
def test_info_names_what_runs(monkeypatch):
    monkeypatch.delenv("HANDHOLD_BACKEND", raising=False)
    info = kernels.info()
    assert info["backend"] == "cpu" and info["isa"] in ("avx2", "base") and os.path.isfile(info["path"])
    assert info["threads"] == torch.get_num_threads()


@compiled
def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(_lib, "ABI_VERSION", -1)
    _lib._load.cache_clear()
    try:
        assert not kernels.available() and "another version" in kernels.why_unavailable()
    finally:
        monkeypatch.undo()
        _lib._load.cache_clear()
    assert kernels.available()


@compiled
def test_baseline_instruction_set_gives_the_same_picture():
    code = """
import torch
from handhold import kernels
from handhold.kernels.splat import rasterize
from handhold.kernels.ssim import ssim_mean
g = torch.Generator().manual_seed(0)
n = 200
m = torch.randn(n, 3, generator=g) * 0.1 + torch.tensor([0, 0, 0.6])
out, alpha, _ = rasterize(m, torch.randn(n, 4, generator=g), torch.full((n, 3), 0.01), torch.rand(n, generator=g),
    torch.rand(n, 3, generator=g), torch.eye(4), torch.tensor([[50., 0, 16], [0, 50, 16], [0, 0, 1]]), 32, 32)
s = ssim_mean(out[..., :3].permute(2, 0, 1).clamp(0, 1), torch.full((3, 32, 32), 0.5))
print(kernels.info()["isa"], f"{out.double().sum():.9f} {alpha.double().sum():.9f} {s:.9f}")
"""
    env = {**os.environ, "HANDHOLD_ISA": "base", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    with contextlib.redirect_stdout(io.StringIO()) as here:
        exec(code, {})
    name, *base = done.stdout.split()
    assert name == "base"
    assert [float(v) for v in base] == pytest.approx([float(v) for v in here.getvalue().split()[1:]], rel=1e-4)


@compiled
def test_two_python_threads_at_once():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(3, 96, 64, generator=g), torch.rand(3, 96, 64, generator=g)
    want, got = ssim(x, y, "cpu"), []
    workers = [threading.Thread(target=lambda: got.extend(ssim(x, y, "cpu") for _ in range(20))) for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(30)
    assert len(got) == 60 and all(torch.equal(v, want) for v in got)


@compiled
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own():
    code = """
import os, torch
from handhold.losses import ssim
torch.set_num_threads(2)
x, y = torch.rand(3, 96, 64), torch.rand(3, 96, 64)
a = ssim(x, y, "cpu")
pid = os.fork()
if pid == 0:
    os._exit(0 if ssim(x, y, "cpu").item() == a.item() else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60).returncode == 0
