"""Recipes for things that hands hold: each draws one solid, or the two parts of a hinged one, from a generator.

Sizes are metres, of things as they are; z is up where a thing has an up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .shapes_solids import (
    Solid,
    blob,
    box,
    ellipsoid,
    extrusion,
    grid_faces,
    lathe,
    polygon_distance,
    superquadric,
    tube,
    turn,
    union,
    weld,
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


def _smooth(points: np.ndarray, n: int) -> np.ndarray:
    """Closed Catmull-Rom curve through points (N,2) as (n,2)."""
    k = len(points)
    t = np.arange(n) * k / n
    i, u = t.astype(int), (t % 1)[:, None]
    p = [points[(i + s) % k] for s in (-1, 0, 1, 2)]
    return 0.5 * (2 * p[1] + (p[2] - p[0]) * u + (2 * p[0] - 5 * p[1] + 4 * p[2] - p[3]) * u**2
                  + (3 * p[1] - p[0] - 3 * p[2] + p[3]) * u**3)  # fmt: skip


def _round_rect(w: float, h: float, r: float, arc: int = 5) -> np.ndarray:
    r = min(r, 0.49 * w, 0.49 * h)
    a = np.linspace(0, np.pi / 2, arc)
    quarter = [np.stack([np.cos(a + k * np.pi / 2), np.sin(a + k * np.pi / 2)], 1) * r for k in range(4)]
    centre = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [w / 2 - r, h / 2 - r]
    return np.concatenate([q + c for q, c in zip(quarter, centre, strict=True)])


def _strip(x: np.ndarray, width: np.ndarray, bend: np.ndarray | float = 0.0) -> np.ndarray:
    """Outline of a strip along x of half-width `width`, its middle line at `bend`."""
    y = np.broadcast_to(np.asarray(bend, float), x.shape)
    return np.concatenate([np.stack([x, y - width], 1), np.stack([x, y + width], 1)[::-1]])


def _radii(rng: Rng, z: np.ndarray, low: float, high: float, knots: int = 5) -> np.ndarray:
    """Smooth random radii at heights z in [0,1]."""
    x = np.linspace(0, 1, knots)
    y = rng.uniform(low, high, knots)
    c = np.polynomial.chebyshev.chebfit(2 * x - 1, y, knots - 1)
    return np.clip(np.polynomial.chebyshev.chebval(2 * z - 1, c), low, high)


def carton(rng: Rng) -> Thing:
    size = np.sort(rng.uniform([0.018, 0.03, 0.05], [0.06, 0.1, 0.2]))
    return Thing(box(rng.permutation(size), rng.choice([0.0, 0.0015]), 5))


def small_box(rng: Rng) -> Thing:
    return Thing(box(rng.uniform(0.018, 0.065, 3), rng.choice([0.0, 0.003]), 4))


def big_box(rng: Rng) -> Thing:
    return Thing(box(rng.uniform(0.08, 0.24, 3), rng.choice([0.0, 0.004]), 6))


def gable(rng: Rng) -> Thing:
    w, h, top = rng.uniform(0.05, 0.075), rng.uniform(0.09, 0.19), rng.uniform(0.02, 0.035)
    fin = 0.0015
    outline = np.array([
        [-w / 2, 0], [w / 2, 0], [w / 2, h * 0.5], [w / 2, h], [fin, h + top], [fin, h + top + 0.015],
        [-fin, h + top + 0.015], [-fin, h + top], [-w / 2, h], [-w / 2, h * 0.5],
    ])  # fmt: skip
    body = extrusion(outline, w * rng.uniform(0.85, 1.1), 4).moved(turn=turn(0, 90))
    if rng.random() < 0.5:
        body = union(body, cylinder(0.014, 0.012).moved((w * 0.27, 0, h + top * 0.6), turn(1, 35)))
    return Thing(body)


def rounded_box(rng: Rng) -> Thing:
    size = np.sort(rng.uniform([0.02, 0.03, 0.04], [0.07, 0.11, 0.18]))
    return Thing(box(rng.permutation(size), rng.uniform(0.15, 0.8) * size[0] / 2, 6))


def cylinder(radius: float, height: float, bevel: float = 0.0012, sides: int = 32, rows: int = 6) -> Solid:
    h = height / 2
    bevel = min(bevel, 0.4 * radius, 0.4 * h)
    wall = np.linspace(-h + bevel, h - bevel, rows)
    profile = [(0, -h), (radius * 0.5, -h), (radius - bevel, -h), *((radius, z) for z in wall)]
    return lathe(np.array([*profile, (radius - bevel, h), (radius * 0.5, h), (0, h)]), sides)


def can(rng: Rng) -> Thing:
    r, h = rng.uniform(0.02, 0.045), rng.uniform(0.05, 0.16)
    rim, step = rng.uniform(0.001, 0.003), rng.uniform(0.0, 0.006)
    z = np.linspace(0.06, 0.94, 7) * h
    profile = [(0, rim), (r - 0.006 - step, rim), (r - 0.004 - step, 0), (r - step, 0.002), *((r, t) for t in z),
               (r - step, h - 0.002), (r - 0.002 - step, h), (r - 0.004 - step, h - rim - 0.001), (0, h - rim - 0.001)]  # fmt: skip
    return Thing(lathe(np.array(profile)))


def rod(rng: Rng) -> Thing:
    return Thing(
        cylinder(np.exp(rng.uniform(np.log(0.004), np.log(0.022))), rng.uniform(0.08, 0.24), rows=10, sides=20)
    )


def disc(rng: Rng) -> Thing:
    return Thing(cylinder(rng.uniform(0.02, 0.07), rng.uniform(0.004, 0.03), 0.002, rows=3, sides=36))


def bottle(rng: Rng) -> Thing:
    r, h = rng.uniform(0.022, 0.045), rng.uniform(0.11, 0.25)
    neck = r * rng.uniform(0.28, 0.65)
    shoulder, top = rng.uniform(0.5, 0.78), rng.uniform(0.82, 0.9)
    z = np.linspace(0.03, 1, 16)
    body = r * (1 - 0.12 * rng.random() * np.abs(np.sin(z * rng.uniform(2, 9) + rng.uniform(0, 3))))
    s = np.clip((z - shoulder) / (top - shoulder), 0, 1)
    radius = body + (neck - body) * s**2 * (3 - 2 * s)
    cap = neck * rng.uniform(1.05, 1.3)
    c = rng.uniform(0.01, 0.025)
    profile = [
        (0, 0),
        (r * 0.8, 0),
        *np.stack([radius, z * h], 1),
        (cap, h),
        (cap, h + c * 0.9),
        (cap * 0.9, h + c),
        (0, h + c),
    ]
    return Thing(lathe(np.array(profile)))


def jar(rng: Rng) -> Thing:
    r, h = rng.uniform(0.025, 0.05), rng.uniform(0.05, 0.14)
    lid, c = r * rng.uniform(0.85, 1.04), rng.uniform(0.008, 0.03)
    z = np.linspace(0.04, 0.96, 7) * h
    profile = [(0, 0), (r * 0.9, 0), *((r, t) for t in z), (lid * 0.9, h), (lid * 0.92, h + 0.002), (lid, h + 0.003),
               (lid, h + c), (lid * 0.96, h + c + 0.001), (0, h + c + 0.001)]  # fmt: skip
    return Thing(lathe(np.array(profile), 36))


def _hollow(r: np.ndarray, z: np.ndarray, wall: float, floor: float) -> np.ndarray:
    """Profile of an open vessel with outer radii r at heights z, climbing."""
    inner = np.maximum(r - wall, 0.001)
    up = np.stack([r, z], 1)
    down = np.stack([inner, z], 1)[::-1]
    down = down[down[:, 1] > z[0] + floor]
    lip = [((r[-1] + inner[-1]) / 2, z[-1] + wall * 0.4)]
    return np.array(
        [(0, z[0]), (r[0] * 0.6, z[0]), *up, *lip, *down, (down[-1, 0] * 0.9, z[0] + floor), (0, z[0] + floor)]
    )


def _vessel(rng: Rng, rows: int = 9) -> tuple[Solid, np.ndarray, np.ndarray]:
    h, r0 = rng.uniform(0.06, 0.13), rng.uniform(0.022, 0.04)
    z = np.linspace(0, 1, rows)
    r = r0 * (1 + rng.uniform(-0.1, 0.45) * z ** rng.uniform(0.6, 2) + rng.uniform(-0.05, 0.2) * np.sin(np.pi * z))
    r[0] *= 0.93
    return lathe(_hollow(r, z * h, rng.uniform(0.003, 0.005), 0.006), 30), r, z * h


def cup(rng: Rng) -> Thing:
    return Thing(_vessel(rng, 11)[0])


def mug(rng: Rng) -> Thing:
    body, r, z = _vessel(rng)
    low, high = rng.uniform(0.12, 0.28), rng.uniform(0.72, 0.9)
    heights = np.array([low, high]) * z[-1]
    reach = rng.uniform(0.026, 0.042)
    a = np.linspace(-np.pi / 2, np.pi / 2, 14)
    x0 = np.interp((np.sin(a) + 1) / 2 * (heights[1] - heights[0]) + heights[0], z, r)
    power = rng.uniform(0.5, 1.0)
    spine = np.stack([x0 - 0.002 + reach * np.cos(a).clip(0) ** power, 0 * a,
                      heights.mean() + np.sin(a) * np.ptp(heights) / 2], 1)  # fmt: skip
    return Thing(union(body, tube(spine, rng.uniform(0.0045, 0.007), 10, rng.uniform(0.9, 1.6))))


def bowl(rng: Rng) -> Thing:
    r, h = rng.uniform(0.04, 0.1), rng.uniform(0.015, 0.06)
    z = np.linspace(0, 1, 10)
    radius = r * (rng.uniform(0.4, 0.6) + 0.45 * z ** rng.uniform(0.35, 0.8))
    return Thing(lathe(_hollow(radius, z * h, 0.004, 0.005), 36))


def glass(rng: Rng) -> Thing:
    r, h, stem = rng.uniform(0.025, 0.042), rng.uniform(0.06, 0.1), rng.uniform(0.04, 0.09)
    z = np.linspace(0.05, 1, 8)
    radius = r * np.sqrt(z) * (1 + 0.3 * np.sin(np.pi * z))
    foot = r * rng.uniform(0.8, 1.05)
    s = rng.uniform(0.0035, 0.006)
    bowl_ = _hollow(radius, stem + z * h, 0.003, 0.005)[2:]
    return Thing(
        lathe(
            np.array([(0, 0), (foot, 0), (foot, 0.003), (s * 1.5, 0.008), (s, stem * 0.5), (s * 1.1, stem), *bowl_]), 28
        )
    )


def vase(rng: Rng) -> Thing:
    z = np.linspace(0, 1, 18)
    r, h = _radii(rng, z, rng.uniform(0.008, 0.02), rng.uniform(0.025, 0.05), 6), rng.uniform(0.08, 0.22)
    return Thing(lathe(np.array([(0, 0), *np.stack([r, z * h], 1), (0, h)])))


def ring(rng: Rng) -> Thing:
    """Tape rolls, rings, bangles."""
    r, tube_, h = rng.uniform(0.02, 0.055), rng.uniform(0.006, 0.016), rng.uniform(0.012, 0.05)
    outline = _round_rect(tube_, h, 0.3 * min(tube_, h), 3) + [r, 0]
    angle = np.linspace(0, 2 * np.pi, 33)
    v = np.stack([outline[:, None, 0] * np.cos(angle), outline[:, None, 0] * np.sin(angle),
                  np.repeat(outline[:, 1:], 33, 1)], -1)  # fmt: skip
    v = np.concatenate([v, v[:1]])
    v, f = weld(v.reshape(-1, 3), grid_faces(len(v), 33, True))
    return Thing(Solid(
        v.astype(np.float32), f, lambda p: polygon_distance(np.stack([np.hypot(p[:, 0], p[:, 1]), p[:, 2]], 1), outline)
    ))  # fmt: skip


def phone(rng: Rng) -> Thing:
    w = rng.uniform(0.058, 0.082)
    h, t = w * rng.uniform(1.85, 2.2), rng.uniform(0.007, 0.011)
    body = extrusion(_round_rect(w, h, rng.uniform(0.004, 0.014)), t, bevel=0.0015)
    if rng.random() < 0.6:
        bump = extrusion(_round_rect(w * 0.4, w * 0.42, 0.006, 3), 0.003, bevel=0.0006)
        body = union(body, bump.moved((w * 0.24, h / 2 - w * 0.28, -t / 2 - 0.0008)))
    return Thing(body)


def tablet(rng: Rng) -> Thing:
    return Thing(
        extrusion(
            _round_rect(rng.uniform(0.1, 0.17), rng.uniform(0.15, 0.24), 0.01), rng.uniform(0.006, 0.012), bevel=0.0015
        )
    )


def remote(rng: Rng) -> Thing:
    w, h, t = rng.uniform(0.035, 0.055), rng.uniform(0.12, 0.21), rng.uniform(0.012, 0.026)
    return Thing(
        extrusion(_round_rect(w, h, rng.uniform(0.2, 0.49) * w), t, 2, bevel=0.004, scale=rng.uniform(0.85, 1.0))
    )


def card(rng: Rng) -> Thing:
    t = rng.uniform(0.003, 0.006)
    return Thing(box([rng.uniform(0.05, 0.09), rng.uniform(0.07, 0.14), t], 0, 5), soft=rng.random() < 0.4)


def book(rng: Rng) -> Thing:
    w, h, t = rng.uniform(0.09, 0.17), rng.uniform(0.14, 0.23), rng.uniform(0.01, 0.035)
    pages = box([w - 0.006, h - 0.006, t - 0.004], 0, 3).moved((0.001, 0, 0))
    covers = [box([w, h, 0.002], 0, 3).moved((0, 0, s * (t / 2 - 0.001))) for s in (-1, 1)]
    return Thing(union(pages, *covers, box([0.003, h, t], 0, 3).moved((-w / 2, 0, 0))))


def pen(rng: Rng) -> Thing:
    r, h = rng.uniform(0.0035, 0.0075), rng.uniform(0.12, 0.175)
    grip = r * rng.uniform(0.9, 1.2)
    tip = rng.uniform(0.012, 0.025)
    profile = [(0, 0), (0.001, 0.001), (r * 0.55, tip * 0.6), (grip, tip), (grip, tip + 0.035), (r, tip + 0.036), (r, h * 0.5),
               (r, h * 0.8), (r * 0.97, h - 0.01), (r * 0.5, h - 0.009), (r * 0.45, h), (0, h)]  # fmt: skip
    body = lathe(np.array(profile), int(rng.choice([6, 14, 16])))
    if rng.random() < 0.5:
        body = union(body, box([0.004, 0.0015, 0.04], 0, 2).moved((0, r + 0.002, h * 0.8)))
    return Thing(body)


def spoon(rng: Rng) -> Thing:
    length, head = rng.uniform(0.12, 0.2), rng.uniform(0.015, 0.025)
    x = np.linspace(0, 1, 26)
    bowl_ = np.sqrt(np.clip(1 - ((x - 0.86) / 0.14) ** 2, 0, 1)) * head
    handle = 0.004 + 0.003 * (1 - x) ** 2
    outline = _strip(x * length, np.maximum(bowl_, np.where(x < 0.8, handle, 0.0012)))
    return Thing(_arched(extrusion(outline, rng.uniform(0.003, 0.005), bevel=0.0008), rng.uniform(-0.015, 0.015)))


def knife(rng: Rng) -> Thing:
    length, width = rng.uniform(0.15, 0.24), rng.uniform(0.008, 0.018)
    handle = rng.uniform(0.4, 0.55)
    x = np.linspace(handle, 1, 14)
    edge = width * np.sqrt(np.clip(1 - ((x - handle) / (1 - handle)) ** 4, 0.002, 1))
    blade = extrusion(
        np.concatenate([[[handle * length, 0], [length, 0.002]], np.stack([x * length, -edge], 1)[::-1]])
        + [0, width / 2],
        0.0028,
    )
    grip = superquadric([handle * length, width * 1.3, rng.uniform(0.012, 0.02)], 0.5, 0.5, 7)
    return Thing(union(blade, grip.moved((handle * length / 2, 0, 0))))


def fork(rng: Rng) -> Thing:
    length, w = rng.uniform(0.15, 0.2), rng.uniform(0.01, 0.013)
    neck = 0.72
    n = int(rng.integers(3, 5))
    gap = 2 * w / (2 * n - 1)
    y = -w + gap * np.arange(2 * n)
    tines = []
    for k in range(n):
        tines += [[length, y[2 * k]], [length, y[2 * k + 1]]]
        if k < n - 1:
            tines += [[0.82 * length, y[2 * k + 1]], [0.82 * length, y[2 * k + 2]]]
    x = np.linspace(0, neck, 10)
    half = 0.0035 + 0.004 * (1 - x / neck) ** 2
    low, high = np.stack([x * length, -half], 1), np.stack([x * length, half], 1)[::-1]
    outline = np.concatenate([low, [[0.78 * length, -w]], tines, [[0.78 * length, w]], high])
    return Thing(_arched(extrusion(outline, 0.0035, bevel=0.0), rng.uniform(-0.01, 0.01)))


def _arched(solid: Solid, rise: float) -> Solid:
    """The solid with its middle along x lifted by `rise` (a shear in z, so lengths along z keep)."""
    lo, hi = solid.vertices[:, 0].min(), solid.vertices[:, 0].max()

    def lift(x):
        return (rise * np.sin(np.pi * np.clip((x - lo) / (hi - lo), 0, 1))).astype(np.float32)

    v = solid.vertices.copy()
    v[:, 2] += lift(v[:, 0])

    def distance(p):
        q = p.copy()
        q[:, 2] -= lift(p[:, 0])
        return solid.distance(q)

    return Solid(v, solid.faces, distance)


def wrench(rng: Rng) -> Thing:
    length, head, t = rng.uniform(0.12, 0.22), rng.uniform(0.014, 0.024), rng.uniform(0.006, 0.011)
    jaw, shaft = head * rng.uniform(0.4, 0.6), head * rng.uniform(0.35, 0.5)
    a = np.linspace(-2.7, -0.55, 9)
    top = np.stack([length + head * np.cos(a), head * np.sin(a)], 1)
    mouth = np.array(
        [
            [length + head * 0.85, -jaw],
            [length - head * 0.2, -jaw],
            [length - head * 0.2, jaw],
            [length + head * 0.85, jaw],
        ]
    )
    x = np.linspace(0, 0.85, 6) * length
    low = np.stack([x, np.full(6, -shaft)], 1)
    b = np.linspace(np.pi / 2, 3 * np.pi / 2, 8)[1:-1]
    butt = np.stack([-0.6 * shaft + shaft * np.cos(b), shaft * np.sin(b)], 1)
    outline = np.concatenate([low, top, mouth, (top * [1, -1])[::-1], (low * [1, -1])[::-1], butt])
    return Thing(extrusion(outline, t, bevel=0.001))


def key(rng: Rng) -> Thing:
    r, length = rng.uniform(0.01, 0.015), rng.uniform(0.022, 0.04)
    a = np.linspace(0.3, 2 * np.pi - 0.3, 16)
    teeth = [[r + length, 0.003]]
    for k in range(5):
        x = r + length * (1 - 0.18 * k)
        teeth += [[x, -0.001 - 0.003 * rng.random()], [x - 0.1 * length, -0.004]]
    bow = np.stack([r * np.cos(a), r * np.sin(a)], 1)
    return Thing(extrusion(np.concatenate([bow, teeth[::-1]]), rng.uniform(0.003, 0.004), bevel=0.0004))


def plate_shape(rng: Rng) -> Thing:
    """A thick plate of random smooth outline: toys, soaps, cookies, puzzle pieces."""
    k = int(rng.integers(4, 9))
    a = (np.arange(k) + rng.uniform(-0.25, 0.25, k)) / k * 2 * np.pi
    points = np.stack([np.cos(a), np.sin(a)], 1) * (rng.uniform(0.55, 1.0, k) * rng.uniform(0.02, 0.06))[:, None]
    outline = _smooth(points * [1, rng.uniform(0.5, 1)], 40)
    t = rng.uniform(0.006, 0.035)
    return Thing(extrusion(outline, t, 2, bevel=rng.uniform(0.0005, 0.003), scale=rng.uniform(0.85, 1)))


def prism(rng: Rng) -> Thing:
    """Stars, gears, nuts and toy bricks: a regular outline."""
    k, r = int(rng.integers(3, 9)), rng.uniform(0.014, 0.04)
    inner = rng.choice([1.0, rng.uniform(0.45, 0.85)])
    a = np.arange(2 * k) * np.pi / k
    outline = (
        np.stack([np.cos(a), np.sin(a)], 1)
        * np.where(np.arange(2 * k) % 2, r * inner * (np.cos(np.pi / k) if inner == 1 else 1), r)[:, None]
    )
    return Thing(
        extrusion(outline, rng.uniform(0.008, 0.09), 3, bevel=0.001, scale=rng.choice([1.0, rng.uniform(0.6, 1)]))
    )


def screwdriver(rng: Rng) -> Thing:
    r, grip, shaft = rng.uniform(0.01, 0.017), rng.uniform(0.07, 0.11), rng.uniform(0.05, 0.12)
    s = rng.uniform(0.0025, 0.0045)
    z = np.linspace(0, 1, 9)
    body = r * (1 - 0.2 * np.sin(z * np.pi * rng.uniform(1, 2)) ** 2)
    profile = [(0, 0), (body[0] * 0.7, 0), *np.stack([body, 0.004 + z * grip], 1), (s * 1.3, grip + 0.01), (s, grip + 0.012),
               (s, grip + shaft / 2), (s, grip + shaft), (0, grip + shaft)]  # fmt: skip
    return Thing(lathe(np.array(profile), int(rng.choice([8, 12, 24]))))


def hammer(rng: Rng) -> Thing:
    r, h = rng.uniform(0.009, 0.014), rng.uniform(0.15, 0.22)
    z = np.linspace(-h, 0, 10)
    handle = tube(np.stack([0 * z, 0 * z, z], 1), r * (1 + 0.25 * np.cos((z / h + 0.1) * 6)), 12, 1.0)
    head = cylinder(rng.uniform(0.011, 0.018), rng.uniform(0.05, 0.085), sides=20, rows=3).moved(turn=turn(1, 90))
    return Thing(union(handle, head))


def brush(rng: Rng) -> Thing:
    """Hair brushes, paddles, magnifiers, lollipops: a head on a stick."""
    h, r = rng.uniform(0.08, 0.14), rng.uniform(0.004, 0.011)
    head = rng.uniform([0.02, 0.008, 0.02], [0.07, 0.035, 0.08])
    z = np.linspace(-h, 0.01, 8)
    handle = tube(np.stack([0 * z, 0 * z, z], 1), r * (1 - 0.2 * np.sin(z * 30)), 12)
    top = superquadric(head, rng.uniform(0.3, 1), rng.uniform(0.3, 1), 9)
    return Thing(union(handle, top.moved((0, 0, head[2] / 2))))


def toothbrush(rng: Rng) -> Thing:
    h = rng.uniform(0.15, 0.19)
    x = np.linspace(0, h, 14)
    spine = np.stack([x, 0 * x, 0.004 * np.sin(x * 30)], 1)
    stick = tube(spine, np.interp(x / h, [0, 0.3, 0.5, 0.75, 1], [0.005, 0.007, 0.0055, 0.003, 0.0035]), 10)
    return Thing(union(stick, box([0.024, 0.009, 0.011], 0.001, 3).moved((h - 0.01, 0, 0.007))))


def pan(rng: Rng) -> Thing:
    r, h = rng.uniform(0.04, 0.075), rng.uniform(0.02, 0.05)
    z = np.linspace(0, 1, 6)
    body = lathe(_hollow(r * (0.85 + 0.15 * z), z * h, 0.003, 0.004), 30)
    x = np.linspace(r * 0.97, r + rng.uniform(0.09, 0.14), 10)
    spine = np.stack([x, 0 * x, h * 0.8 + (x - r) * rng.uniform(0.0, 0.3)], 1)
    return Thing(union(body, tube(spine, np.linspace(0.006, 0.011, 10), 10)))


def kettle(rng: Rng) -> Thing:
    """Jugs and kettles: a body with a large handle, sometimes a spout."""
    z = np.linspace(0, 1, 10)
    r, h = _radii(rng, z, 0.03, rng.uniform(0.04, 0.06), 4), rng.uniform(0.09, 0.15)
    body = lathe(np.array([(0, 0), *np.stack([r, z * h], 1), (0, h)]), 26)
    a = np.linspace(-1.5, 1.5, 14)
    spine = np.stack([0.028 + 0.055 * np.cos(a) ** 0.7, 0 * a, h * (0.55 + 0.36 * np.sin(a))], 1)
    parts = [body, tube(spine, rng.uniform(0.006, 0.009), 10)]
    if rng.random() < 0.6:
        s = np.linspace(0, 1, 8)
        curve = np.stack([-0.03 - 0.06 * s, 0 * s, h * (0.4 + 0.55 * s**1.5)], 1)
        parts.append(tube(curve, np.linspace(0.014, 0.007, 8), 10))
    return Thing(union(*parts))


def basket(rng: Rng) -> Thing:
    """A box or a tub under an arch: bags, buckets, cases, padlocks, kettlebells."""
    scale = rng.choice([0.35, 0.8, 1.0, 1.0])
    w, d, h = rng.uniform([0.09, 0.03, 0.05], [0.2, 0.1, 0.13]) * scale
    body = box([w, d, h], rng.uniform(0.001, 0.3) * min(d, h), 5).moved((0, 0, -h / 2))
    a = np.linspace(0, np.pi, 16)
    rise, half = rng.uniform(0.045, 0.075) * scale, min(0.5 * w - 0.01 * scale, 0.06)
    squareness = rng.uniform(0.35, 1.0)
    spine = np.stack(
        [half * np.sign(np.cos(a)) * np.abs(np.cos(a)) ** squareness, 0 * a, rise * np.sin(a).clip(0) ** squareness], 1
    )
    return Thing(union(body, tube(spine, rng.uniform(0.004, 0.01) * max(scale, 0.6), 10)))


def spray(rng: Rng) -> Thing:
    thing = bottle(rng)
    top = thing.base.vertices[:, 2].max()
    head = box([rng.uniform(0.05, 0.075), 0.022, 0.02], 0.005, 3).moved((0.014, 0, top + 0.008))
    trigger = tube(
        np.array([[0.028, 0, top], [0.033, 0, top - 0.015], [0.031, 0, top - 0.035], [0.026, 0, top - 0.045]]), 0.004, 8
    )
    return Thing(union(thing.base, head, trigger))


def drill(rng: Rng) -> Thing:
    """Power tools, hair dryers, toy pistols: a barrel on a grip."""
    r, h = rng.uniform(0.016, 0.034), rng.uniform(0.1, 0.18)
    barrel = cylinder(r, h, 0.005, 24, 5).moved((h * 0.2, 0, 0), turn(1, 90))
    nose = cylinder(r * 0.55, 0.04, 0.003, 16, 3).moved((h * 0.7 + 0.018, 0, 0), turn(1, 90))
    grip = superquadric([rng.uniform(0.032, 0.045), rng.uniform(0.026, 0.036), rng.uniform(0.11, 0.14)], 0.4, 0.7, 9)
    return Thing(union(barrel, nose, grip.moved((-0.01, 0, -0.055 - r * 0.5), turn(1, rng.uniform(-5, 20)))))


def gamepad(rng: Rng) -> Thing:
    w = rng.uniform(0.09, 0.14)
    body = superquadric([w, 0.055, 0.032], 0.6, 0.5, 8)
    grips = [ellipsoid([0.036, 0.085, 0.036], 7).moved((s * w * 0.42, -0.03, -0.004), turn(2, s * 20)) for s in (-1, 1)]
    return Thing(union(body, *grips))


def mouse(rng: Rng) -> Thing:
    w, length, h = rng.uniform(0.05, 0.066), rng.uniform(0.09, 0.12), rng.uniform(0.03, 0.042)
    dome = superquadric([w, length, 2 * h], rng.uniform(0.7, 1.1), rng.uniform(0.5, 0.9), 11)
    v = dome.vertices.copy()
    v[:, 2] = np.maximum(v[:, 2], 0)
    return Thing(Solid(v, dome.faces, lambda p: np.maximum(dome.distance(p), -p[:, 2])))


def ball(rng: Rng) -> Thing:
    return Thing(ellipsoid([np.exp(rng.uniform(np.log(0.022), np.log(0.12)))] * 3, 10))


def fruit(rng: Rng) -> Thing:
    """Apples, pears, lemons, eggs, peppers."""
    r = rng.uniform(0.02, 0.045)
    a = np.linspace(0, np.pi, 20)
    taper, dent, point = rng.uniform(-0.25, 0.25), rng.uniform(0, 0.35), rng.choice([0.0, rng.uniform(0, 0.3)])
    radius = r * np.sin(a) * (1 + taper * np.cos(a))
    z = (
        -r
        * rng.uniform(0.85, 1.35)
        * np.cos(a)
        * (1 - dent * np.exp(-((np.sin(a) / 0.35) ** 2)) + point * np.abs(np.cos(a)) ** 9)
    )
    body = lathe(np.stack([np.where(np.sin(a) < 1e-6, 0, radius), z], 1), 28)
    if rng.random() < 0.4:
        s = np.linspace(0, 1, 5)
        body = union(body, tube(np.stack([0.006 * s**2, 0 * s, z[-1] - 0.004 + 0.018 * s], 1), 0.0014, 6))
    return Thing(body)


def banana(rng: Rng) -> Thing:
    length, bend, r = rng.uniform(0.1, 0.2), rng.uniform(0.2, 1.3), rng.uniform(0.012, 0.022)
    s = np.linspace(-1, 1, 22)
    spine = np.stack([np.sin(s * bend) / bend * length / 2, (1 - np.cos(s * bend)) / bend * length / 2, 0 * s], 1)
    radius = r * (1 - np.abs(s) ** 5 * rng.uniform(0.5, 0.85)) * (1 - 0.1 * s)
    return Thing(tube(spine, radius, int(rng.choice([6, 12, 16]))), soft=rng.random() < 0.3)


def egg_toy(rng: Rng) -> Thing:
    return Thing(superquadric(rng.uniform(0.025, 0.1, 3), rng.uniform(0.25, 1.6), rng.uniform(0.25, 1.6)))


def stone(rng: Rng) -> Thing:
    return Thing(blob(rng.uniform(0.025, 0.1, 3), rng, rng.uniform(0.08, 0.4)))


def figure(rng: Rng) -> Thing:
    """Plush toys and figurines: a body with head and limbs."""
    w, h = rng.uniform(0.03, 0.06), rng.uniform(0.05, 0.09)
    parts = [ellipsoid([w, w * 0.8, h], 6)]
    head = rng.uniform(0.7, 1.1) * w
    parts.append(ellipsoid([head, head * 0.9, head], 6).moved((0, 0, h / 2 + head * 0.3)))
    for s in (-1, 1):
        limb = ellipsoid([w * 0.35, w * 0.35, h * 0.75], 4)
        parts.append(limb.moved((s * w * 0.28, 0, -h * 0.55), turn(1, -s * rng.uniform(0, 30))))
        parts.append(limb.moved((s * w * 0.55, 0, h * 0.12), turn(1, -s * rng.uniform(20, 100))))
        if rng.random() < 0.6:
            parts.append(ellipsoid([head * 0.35] * 3, 3).moved((s * head * 0.35, 0, h / 2 + head * 0.72)))
    return Thing(union(*parts), soft=rng.random() < 0.6)


def toy_car(rng: Rng) -> Thing:
    length, w = rng.uniform(0.06, 0.12), rng.uniform(0.03, 0.05)
    body = box([length, w, w * 0.5], w * 0.1, 4)
    cabin = box([length * rng.uniform(0.35, 0.6), w * 0.85, w * 0.4], w * 0.12, 3).moved(
        (rng.uniform(-0.1, 0.1) * length, 0, w * 0.4)
    )
    wheels = [cylinder(w * 0.22, w * 0.2, 0.001, 14, 2).moved((x * length * 0.3, y * w * 0.46, -w * 0.25), turn(0, 90))
              for x in (-1, 1) for y in (-1, 1)]  # fmt: skip
    return Thing(union(body, cabin, *wheels))


def bricks(rng: Rng) -> Thing:
    """A few boxes grown together."""
    parts, at = [], np.zeros(3)
    for _ in range(int(rng.integers(2, 5))):
        size = rng.uniform(0.018, 0.06, 3)
        parts.append(box(size, rng.choice([0.0, 0.002]), 3).moved(at))
        at = at + (rng.random(3) < 0.5) * rng.choice([-1, 1], 3) * size * 0.5
    return Thing(union(*parts))


def sponge(rng: Rng) -> Thing:
    return Thing(box(np.sort(rng.uniform(0.025, 0.12, 3))[[1, 2, 0]], rng.uniform(0.002, 0.008), 7), soft=True)


def pillow(rng: Rng) -> Thing:
    return Thing(
        superquadric(
            rng.uniform([0.07, 0.07, 0.025], [0.15, 0.18, 0.06]), rng.uniform(0.9, 1.5), rng.uniform(0.3, 0.6)
        ),
        soft=True,
    )


def pouch(rng: Rng) -> Thing:
    """Crisp bags, sachets, squeezed tubes."""
    w, h, t = rng.uniform(0.05, 0.13), rng.uniform(0.08, 0.18), rng.uniform(0.015, 0.05)
    return Thing(superquadric([w, t, h], rng.uniform(1.2, 1.6), rng.uniform(0.6, 1.0), 12), soft=True)


def hinged_box(rng: Rng) -> Thing:
    """Boxes with a lid, laptops, jewel cases, notebooks."""
    flat = rng.random() < 0.4
    w, d = rng.uniform(0.06, 0.2), rng.uniform(0.05, 0.13)
    h = rng.uniform(0.008, 0.02) if flat else rng.uniform(0.02, 0.08)
    lid = h * (rng.uniform(0.35, 0.5) if flat else rng.uniform(0.15, 0.5))
    r = rng.choice([0.0, 0.003])
    base = box([w, d, h], r, 4).moved((0, 0, -h / 2))
    top = box([w, d, lid], min(r, lid * 0.3), 4).moved((0, 0, lid / 2 + 0.0004))
    return Thing(base, top, (1, 0, 0), (0, d / 2, 0), (-2.4 if flat else -2.0, 0.0))


def clamshell(rng: Rng) -> Thing:
    r, h = rng.uniform(0.02, 0.05), rng.uniform(0.01, 0.03)
    a = np.linspace(0, np.pi / 2, 7)
    half = lathe(np.array([(0, 0), (r * 0.6, 0), *np.stack([r * np.cos(a)[:-1], h * np.sin(a)[:-1]], 1), (0, h)]), 28)
    return Thing(half.moved(turn=turn(0, 180)), half.moved((0, 0, 0.0004)), (1, 0, 0), (0, r, 0), (-1.9, 0.0))


def scissors(rng: Rng) -> Thing:
    length, t = rng.uniform(0.13, 0.2), rng.uniform(0.003, 0.005)
    x = np.linspace(-0.28, 0.6, 12) * length
    blade = extrusion(_strip(x, 0.001 + 0.007 * np.clip(1 - (x / (0.6 * length)).clip(0) ** 2, 0, 1)), t)
    a = np.linspace(0, 2 * np.pi, 19)
    rx, ry = rng.uniform(0.016, 0.024), rng.uniform(0.012, 0.016)
    loop = np.stack([-0.28 * length - rx + 0.004 + rx * np.cos(a), -ry * 0.9 + ry * np.sin(a), 0 * a], 1)
    half = union(blade, tube(loop, rng.uniform(0.0035, 0.005), 8))
    other = half.moved((0, 0, t), np.diag([1.0, -1.0, 1.0]))
    other = Solid(other.vertices, other.faces[:, ::-1], other.distance)
    return Thing(half, other, (0, 0, 1), (0, 0, 0), (0.0, 0.9))


def pliers(rng: Rng) -> Thing:
    length, t = rng.uniform(0.13, 0.19), rng.uniform(0.008, 0.012)
    s = np.linspace(0, 1, 12)
    handle = tube(
        np.stack([-s * 0.62 * length, 0.004 + 0.016 * np.sin(s * 2.2), 0 * s], 1), rng.uniform(0.005, 0.008), 10
    )
    jaw = extrusion(
        np.array(
            [
                [-0.02, -0.008],
                [0.0, -0.009],
                [0.012, -0.009],
                [0.35 * length, -0.004],
                [0.35 * length, -0.0003],
                [0, 0.0],
                [-0.02, 0.004],
            ]
        ),
        t,
    )
    half = union(handle, jaw)
    other = half.moved((0, 0, 0.0005), np.diag([1.0, -1.0, 1.0]))
    other = Solid(other.vertices, other.faces[:, ::-1], other.distance)
    return Thing(half, other, (0, 0, 1), (0, 0, 0), (-0.1, 0.6))


def flip_phone(rng: Rng) -> Thing:
    """Folding phones, glasses cases, compacts, staplers: two long halves that meet at one end."""
    w, h, t = rng.uniform(0.03, 0.06), rng.uniform(0.07, 0.13), rng.uniform(0.007, 0.016)
    half = box([w, h, t], 0.4 * t, 4)
    return Thing(half.moved((0, 0, -t / 2)), half.moved((0, 0, t / 2 + 0.0003)), (1, 0, 0), (0, h / 2, 0), (-2.7, 0.0))


RECIPES: dict[str, tuple[float, Callable[[Rng], Thing]]] = {
    f.__name__: (weight, f)
    for weight, f in [
        (4, carton), (1.5, small_box), (2, big_box), (2, gable), (2.5, rounded_box), (3.5, can), (1.5, rod), (1.2, disc),
        (4, bottle), (2, jar), (2, cup), (3.5, mug), (1.5, bowl), (1, glass), (1.5, vase), (1, ring), (3.5, phone), (1, tablet),
        (1.5, remote), (1.2, card), (1.5, book), (2, pen), (1, spoon), (1, knife), (0.8, fork), (1, wrench), (0.8, key),
        (1.5, plate_shape), (1.5, prism), (1.5, screwdriver), (1, hammer), (1.5, brush), (1, toothbrush), (1, pan), (1, kettle),
        (1.5, basket), (1.5, spray), (1.5, drill), (1, gamepad), (1, mouse), (1.5, ball), (2, fruit), (1.2, banana),
        (2, egg_toy), (2.5, stone), (2, figure), (1, toy_car), (1.5, bricks), (1.2, sponge), (0.8, pillow), (1, pouch),
        (2.5, hinged_box), (1, clamshell), (1.2, scissors), (0.8, pliers), (1, flip_phone),
    ]
}  # fmt: skip
"""Name -> (share among drawn objects, recipe)."""
