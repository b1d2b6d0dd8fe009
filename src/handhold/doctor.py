"""What this machine has of what handhold uses, and what a lack costs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    needed: bool  # a reconstruction cannot run without it
    text: str  # what is there; when not ok, what that costs and what to do


def examine() -> list[Finding]:
    """Look at everything. Never raises: what fails is a finding."""
    checks: tuple[tuple[str, bool, Callable[[], tuple[bool, str]]], ...] = (
        ("python", True, _python),
        ("torch", True, _torch),
        ("kernels", False, _kernels),
        ("landmark weights", False, _assets),
        ("pycolmap", True, lambda: _package("pycolmap", "pycolmap", "the object's motion cannot be found without it")),
        ("av", True, lambda: _package("av", "av", "no video can be read without it")),
        ("opencv", True, lambda: _package("opencv-python-headless", "cv2", "no image can be read without it")),
        (
            "litert",
            False,
            lambda: _package("ai-edge-litert", "ai_edge_litert", "hand landmarks must be given with --joints"),
        ),
        ("cores", False, _cores),
        ("memory", False, _memory),
        ("disk", True, _disk),
    )
    findings = []
    for name, needed, check in checks:
        try:
            ok, text = check()
        except Exception as e:  # a doctor must not fall ill
            ok, text = False, f"{type(e).__name__}: {e}"
        findings.append(Finding(name, ok, needed, text))
    return findings


def print_findings(findings: list[Finding]) -> None:
    """A table on stdout: ok, missing (but a run can do without), or needed."""
    for f in findings:
        state = "ok" if f.ok else "NEEDED" if f.needed else "lacks"
        print(f"{state:7s} {f.name:17s} {f.text}")
    lacking = [f.name for f in findings if f.needed and not f.ok]
    print(f"A reconstruction cannot run: {', '.join(lacking)}." if lacking else "A reconstruction can run.")


def _python() -> tuple[bool, str]:
    ok = (3, 11) <= sys.version_info[:2] < (3, 15)
    return ok, f"{platform.python_version()} on {platform.platform()}" + ("" if ok else "; handhold needs 3.11 to 3.14")


def _torch() -> tuple[bool, str]:
    import torch

    if torch.cuda.is_available():
        return True, f"{torch.__version__}, CUDA {torch.version.cuda} on {torch.cuda.get_device_name(0)}"
    return True, f"{torch.__version__}, CPU only, {torch.get_num_threads()} threads"


def _kernels() -> tuple[bool, str]:
    from . import kernels

    state = kernels.info()
    if state["available"]:
        unused = os.environ.get("HANDHOLD_BACKEND", "").strip().lower() == "torch"
        told = "; HANDHOLD_BACKEND=torch keeps them from being used, which is many times slower" if unused else ""
        gpu = ", Triton kernels on the GPU" if state["triton"] else ""
        return True, f"compiled, {state['isa']}, {state['threads']} threads{gpu}" + told
    return (
        False,
        f"not compiled: {state['why_unavailable']}; everything works, but fitting is many times slower",
    )


def _assets() -> tuple[bool, str]:
    from . import assets

    state = assets.status()
    missing = [name for name, there in state.items() if not there]
    if missing:
        return False, f"{', '.join(missing)} missing; get them with `handhold assets`, or give --joints and --masks"
    return True, f"{', '.join(state)} present"


def _package(distribution: str, module: str, cost: str) -> tuple[bool, str]:
    import importlib.util

    # found, not imported: pycolmap and OpenCV in one process have crashed
    if importlib.util.find_spec(module) is None:
        return False, f"not installed, {cost}; install handhold again"
    try:
        return True, importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return True, "installed"


def _cores() -> tuple[bool, str]:
    try:
        n = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        n = os.cpu_count() or 1
    return n >= 2, f"{n}" + ("" if n >= 2 else "; two or more are recommended")


def _memory() -> tuple[bool, str]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return total >= 4, f"{total:.1f} GiB" + (
        "" if total >= 4 else "; a run can need 4 GiB: use --max-side and --stride"
    )


def _disk() -> tuple[bool, str]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 2**30
    return free >= 0.5, f"{free:.1f} GiB free in {here}" + ("" if free >= 0.5 else "; a run needs half a GiB")
