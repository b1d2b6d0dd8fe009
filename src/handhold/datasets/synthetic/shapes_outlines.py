"""What the recipes share: the thing they make, outlines in the plane, profiles to turn, cylinders."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shapes_solids import (
    Solid,
    lathe,
)

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Thing:
    """One object before it enters the bank. The second part turns about a hinge by an angle within `bounds`, 0 as
    given."""

    base: Solid
    second: Solid | None = None
    axis: tuple[float, float, float] = (1.0, 0.0, 0.0)
    pivot: tuple[float, float, float] = (0.0, 0.0, 0.0)
    bounds: tuple[float, float] = (0.0, 0.0)  # radians
    soft: bool = False


def smooth(points: np.ndarray, n: int) -> np.ndarray:
    """Closed Catmull-Rom curve through points (N,2) as (n,2)."""
    k = len(points)
    t = np.arange(n) * k / n
    i, u = t.astype(int), (t % 1)[:, None]
    p = [points[(i + s) % k] for s in (-1, 0, 1, 2)]
    return 0.5 * (
        2 * p[1]
        + (p[2] - p[0]) * u
        + (2 * p[0] - 5 * p[1] + 4 * p[2] - p[3]) * u**2
        + (3 * p[1] - p[0] - 3 * p[2] + p[3]) * u**3
    )


def round_rect(w: float, h: float, r: float, arc: int = 5) -> np.ndarray:
    r = min(r, 0.49 * w, 0.49 * h)
    a = np.linspace(0, np.pi / 2, arc)
    quarter = [np.stack([np.cos(a + k * np.pi / 2), np.sin(a + k * np.pi / 2)], 1) * r for k in range(4)]
    centre = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [w / 2 - r, h / 2 - r]
    return np.concatenate([q + c for q, c in zip(quarter, centre, strict=True)])


def strip(x: np.ndarray, width: np.ndarray, bend: np.ndarray | float = 0.0) -> np.ndarray:
    """Outline of a strip along x of half-width `width`, its middle line at `bend`."""
    y = np.broadcast_to(np.asarray(bend, float), x.shape)
    return np.concatenate([np.stack([x, y - width], 1), np.stack([x, y + width], 1)[::-1]])


def radii(rng: Rng, z: np.ndarray, low: float, high: float, knots: int = 5) -> np.ndarray:
    """Smooth random radii at heights z in [0,1]."""
    x = np.linspace(0, 1, knots)
    y = rng.uniform(low, high, knots)
    c = np.polynomial.chebyshev.chebfit(2 * x - 1, y, knots - 1)
    return np.clip(np.polynomial.chebyshev.chebval(2 * z - 1, c), low, high)


def hollow(r: np.ndarray, z: np.ndarray, wall: float, floor: float) -> np.ndarray:
    """Profile of an open vessel with outer radii r at heights z, climbing."""
    inner = np.maximum(r - wall, 0.001)
    up = np.stack([r, z], 1)
    down = np.stack([inner, z], 1)[::-1]
    down = down[down[:, 1] > z[0] + floor]
    lip = [((r[-1] + inner[-1]) / 2, z[-1] + wall * 0.4)]
    return np.array(
        [(0, z[0]), (r[0] * 0.6, z[0]), *up, *lip, *down, (down[-1, 0] * 0.9, z[0] + floor), (0, z[0] + floor)]
    )


def cylinder(radius: float, height: float, bevel: float = 0.0012, sides: int = 32, rows: int = 6) -> Solid:
    h = height / 2
    bevel = min(bevel, 0.4 * radius, 0.4 * h)
    wall = np.linspace(-h + bevel, h - bevel, rows)
    profile = [(0, -h), (radius * 0.5, -h), (radius - bevel, -h), *((radius, z) for z in wall)]
    return lathe(np.array([*profile, (radius - bevel, h), (radius * 0.5, h), (0, h)]), sides)
