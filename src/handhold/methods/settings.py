"""Settings of the methods, beside what `fit` has for all of them. Field docstrings are the help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import require


@dataclass(frozen=True)
class BigsConfig:
    """Gaussians of both hands and the object (`--method bigs`)."""


@dataclass(frozen=True)
class HoldConfig:
    """Neural signed-distance fields of hands and object (`--method hold`)."""

    preset: Literal["fast", "paper"] = "fast"
    """`fast` is grids of distances with small colour heads, sampled in a band; `paper` the coordinate networks and the
    error-bounded sampler of HOLD, for a GPU."""
    density: Literal["auto", "neus", "laplace"] = "auto"
    """How distance becomes opacity: NeuS, or VolSDF's Laplace density. auto is neus in fast, laplace in paper."""
    compositing: bool = True
    """Render all bodies as one medium; off, each as if it were alone."""
    eikonal: bool = True
    """Hold fields to be distances."""
    refinement: bool = True
    """Refine hand and object poses by outlines and contact between the two trainings."""
    contact: bool = True
    """Keep hands and object in touch and out of each other."""
    encoding: bool = True
    """Open the frequencies of the object's encoding one after the other (`paper`)."""
    background: bool = False
    """Model what is behind the bodies too (NeRF++, `paper`); else the masks say what is background."""
    iterations: int | None = None
    """Steps of the joint training; by default 200 in fast, 80000 in paper."""

    def __post_init__(self) -> None:
        require(self.iterations is None or 0 <= self.iterations <= 10_000_000, "hold.iterations must be 0 to 10000000")

    @property
    def density_kind(self) -> Literal["neus", "laplace"]:
        """`density` with auto resolved."""
        return ("neus" if self.preset == "fast" else "laplace") if self.density == "auto" else self.density
