"""Settings of the methods, beside what `fit` has for all of them. Field docstrings are the help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import require


@dataclass(frozen=True)
class BigsConfig:
    """Gaussians of both hands and the object (`--method bigs`)."""

    variant: Literal["plain", "triplane"] = "plain"
    """Where the Gaussians' values come from: plain is a table for each Gaussian, triplane the paper's feature planes
    with three decoders."""
    shared_hands: bool = True
    """One set of Gaussians for both hands, the left its mirror image; false gives each hand its own."""
    stage2: bool = True
    """Draw hands and object together and refine their poses; false stops after each subject alone."""
    contact: bool = True
    """Pull together what touches for long, push apart what overlaps."""
    densify: bool = True
    """Split and prune the object's Gaussians where the pictures ask for it (plain only)."""
    alone: int = 6
    """Steps per frame of the first stage, each subject alone."""
    together: int = 12
    """Steps per frame of the second stage."""
    steps: int = 1500
    """At most so many steps of both stages, however long the clip."""
    count: int = 8000
    """Gaussians of the object at the start."""
    levels: int = 1
    """How often the hand's mesh is subdivided: 1609 Gaussians for 0, 6412 for 1."""
    resolution: int = 256
    """Texels per axis of the triplane."""
    features: int = 32
    """Features per plane of the triplane."""

    def __post_init__(self) -> None:
        require(self.alone >= 1 and self.together >= 0, "bigs.alone must be at least 1, bigs.together not negative")
        require(1 <= self.steps <= 1_000_000, "bigs.steps must be between 1 and 1000000")
        require(100 <= self.count <= 200_000, "bigs.count must be between 100 and 200000")
        require(0 <= self.levels <= 3, "bigs.levels must be between 0 and 3")
        require(4 <= self.resolution <= 1024, "bigs.resolution must be between 4 and 1024")
        require(1 <= self.features <= 64, "bigs.features must be between 1 and 64")


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
