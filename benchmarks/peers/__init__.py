"""What handhold is measured against, one file per peer; docs/benchmarks.md tells how the installed ones get there."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

PACKAGES = {
    "gsplat_torch": ("gsplat", "1.5.3"),
    "taichi_raster": ("taichi", "1.7.4"),
    "warp_raster": ("warp-lang", "1.19.0"),
}


def load(name: str) -> ModuleType | str:
    """The peer's module, or in words why it is not there."""
    try:
        return importlib.import_module(f"peers.{name}")
    except ImportError as e:
        return f"not installed ({e.name or e})"


def title(name: str) -> str:
    """Package and the version found; with the version meant when that is another one, or none is found."""
    package, meant = PACKAGES[name]
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} {meant}"
    return f"{package} {found}" + ("" if found == meant else f" (for {meant})")
