"""Settings of the methods, beside what `fit` has for all of them. Field docstrings are the help text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BigsConfig:
    """Gaussians of both hands and the object (`--method bigs`)."""


@dataclass(frozen=True)
class HoldConfig:
    """Neural signed-distance fields of hands and object (`--method hold`)."""
