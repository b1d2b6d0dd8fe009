"""How `render.py` measures: interleaved CPU time, comparison of results, the machine and its limits."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

Outputs = dict[str, Tensor]  # what a step made: images by name, and gradients under names that start with "grad "
Step = Callable[[], Outputs]

FORWARD, GRADIENT = 1e-4, 1e-3  # greatest absolute and relative difference
FLIPS = 1e-4  # share of values that may differ more: float32 on the two sides of a threshold (1/255, T = 1e-4)


@dataclass(frozen=True)
class Peer:
    """What `ours` is measured against: a step, and the ratio that is asked for."""

    step: Step | str  # a str says why the peer is absent
    at_least: float | None = None  # CPU time of the peer over ours
    check: Step | None = None  # makes what is compared, where the timed step does not; default: the step
    comparable: bool = True  # False: the peer does the same task by another model


@dataclass(frozen=True)
class Case:
    """One line of the results. A peer that is a str is absent, as one with such a step, but without a demand."""

    title: str
    ours: Step
    peers: dict[str, Peer | str] = field(default_factory=dict)
    at_most_ms: float | None = None
    note: str = ""
    rounds: int | None = None
    slow_ms: float = 10e3  # peers that take longer a call are not timed


def figure(values: list[float], unit: str) -> dict:
    """Median and quartiles."""
    q = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"unit": unit, "median": _round(q[1]), "q1": _round(q[0]), "q3": _round(q[2]), "n": len(values)}


def bar(what: str, value: float | None, least: float | None = None, most: float | None = None) -> dict:
    """One demand and whether it is met; None was not measured and does not meet it."""
    passed = value is not None and (least is None or value >= least) and (most is None or value <= most)
    sense = f">= {least:g}" if least is not None else f"<= {most:g}"
    return {"what": what, "value": None if value is None else _round(value), "bar": sense, "passed": bool(passed)}


def _round(x: float) -> float:
    return float(f"{x:.4g}")


def cpu_ms(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return 1e3 * (time.process_time() - start)


def wall_ms(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def differences(ours: Outputs, peer: Outputs) -> tuple[dict[str, float], bool]:
    """The greatest absolute difference of images and relative one of gradients, and whether they are the same."""
    common = [name for name in ours if name in peer]
    if not common:
        raise ValueError("nothing in common to compare")
    errors, same = {}, True
    for name in common:
        a, b = ours[name].detach(), peer[name].detach()
        difference = (a - b).abs()
        if name.startswith("grad "):
            errors[name] = float((a - b).norm() / b.norm().clamp(min=1e-30))
            same &= errors[name] <= GRADIENT  # False for NaN
        else:
            errors[name] = float(difference.max())
            flipped = int((~(difference <= FORWARD)).sum())
            same &= flipped <= max(3, FLIPS * difference.numel()) and bool(torch.isfinite(b).all())
            if flipped:
                errors[f"{name} values over {FORWARD:g}"] = flipped
    return {name: _round(e) for name, e in errors.items()}, bool(same)


def run_case(case: Case, rounds: int, budget_s: float) -> dict:
    """Checks every peer against ours, then times all of them in turn, round after round, until rounds or budget end.

    In a round a quick step is called several times and gives its median; the ratio is that of one round, so that the
    load of the machine meets both sides. A peer that is not timed leaves its bar unmet.
    """
    reference, steps, rows = case.ours(), {}, {}
    for name, peer in case.peers.items():
        absent = peer if isinstance(peer, str) else peer.step
        if isinstance(absent, str):
            rows[name] = {"absent": absent}
            continue
        rows[name] = {}
        outputs: list[Outputs] = []
        try:
            took = cpu_ms(lambda make=peer.check or peer.step, keep=outputs: keep.append(make()))
        except Exception as e:  # whatever a peer raises is its own affair
            rows[name]["absent"] = f"failed ({type(e).__name__})"
            continue
        if peer.comparable:
            rows[name]["errors"], same = differences(reference, outputs[0])
            if not same:
                rows[name]["absent"] = "not timed: its results differ from ours"
                continue
        if took > case.slow_ms:
            rows[name]["absent"] = f"{took / 1e3:.0f} s a call"
            continue
        steps[name] = peer.step
    times: dict[str, list[float]] = {name: [] for name in ("ours", *steps)}
    end = time.process_time() + budget_s
    limit = case.rounds or rounds
    while len(times["ours"]) < limit and (len(times["ours"]) < min(3, limit) or time.process_time() < end):
        for name, step in {"ours": case.ours, **steps}.items():
            several = [cpu_ms(step)]
            while len(several) < 5 and sum(several) < 100:
                several.append(cpu_ms(step))
            times[name].append(statistics.median(several))
    result = {
        "title": case.title,
        "ours": figure(times["ours"], "CPU-ms"),
        "peers": rows,
        "bars": [],
        "load": load()[0],
    }
    if case.note:
        result["note"] = case.note
    if case.at_most_ms is not None:
        result["bars"].append(bar(f"{case.title}: CPU-ms", result["ours"]["median"], most=case.at_most_ms))
        result["asked"] = result["bars"][-1]["bar"]
    for name, peer in case.peers.items():
        if name in steps:
            ratio = figure([p / o for o, p in zip(times["ours"], times[name], strict=True)], "x")
            rows[name] |= {"time": figure(times[name], "CPU-ms"), "ratio": ratio}
        if isinstance(peer, Peer) and peer.at_least is not None:
            measured = rows[name]["ratio"]["median"] if name in steps else None
            result["bars"].append(bar(f"{case.title}: {name}", measured, least=peer.at_least))
            rows[name]["asked"] = result["bars"][-1]["bar"]
    return result


def write(path: Path, results: dict) -> None:
    """JSON, all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(fd, "w") as f:
        f.write(json.dumps(results, indent=1) + "\n")
    os.chmod(tmp, 0o644)  # mkstemp keeps others from reading
    os.replace(tmp, path)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """So many processes that never wait, until the end of the block."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for p in spinners:
            p.kill()
            p.wait()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> list[float]:
    """Mean number of runnable processes over 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


_FMA = r"""
typedef float v __attribute__((vector_size(32)));
float fma_loop(long n) {
  v a[12], x, y;
  for (int l = 0; l < 8; l++) x[l] = 0.999999f, y[l] = 1e-6f;
  for (int k = 0; k < 12; k++) for (int l = 0; l < 8; l++) a[k][l] = k + l;
  for (long i = 0; i < n; i++) {
#pragma GCC unroll 12
    for (int k = 0; k < 12; k++) a[k] = a[k] * x + y;
  }
  float s = 0;
  for (int k = 0; k < 12; k++) for (int l = 0; l < 8; l++) s += a[k][l];
  return s;
}
"""


def fma_gflops(n: int = 20_000_000) -> float | None:
    """Fused multiply-adds of one thread on vectors of 8 floats, in GFLOP/s; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(_FMA)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-o", str(library), str(source)]
        if subprocess.run([compiler, *flags], capture_output=True).returncode:
            return None
        loop = ctypes.CDLL(str(library)).fma_loop
        loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_float
        loop(n // 10)
        return 12 * 8 * 2 * n / (min(cpu_ms(lambda: loop(n)) for _ in range(3)) * 1e6)


def mm_gflops(n: int = 1024) -> float:
    """Matrix product of torch on the current number of threads, GFLOP/s."""
    a, b = torch.rand(n, n), torch.rand(n, n)
    a @ b
    return 2 * n**3 / (min(cpu_ms(lambda: a @ b) for _ in range(5)) * 1e6)


def copy_gbs(megabytes: int = 256) -> float:
    """Memory bandwidth of one thread, bytes read + bytes written of a copy, GB/s."""
    a = torch.zeros(megabytes * 2**18)
    b = torch.empty_like(a).copy_(a)
    return 2 * a.numel() * 4 / (min(cpu_ms(lambda: b.copy_(a)) for _ in range(5)) * 1e6)
