"""Recipes for things that hands hold: packages, vessels, rods and rings. In metres, z up."""

from __future__ import annotations

import numpy as np

from .shapes_outlines import Rng, Thing, cylinder, hollow, radii, round_rect
from .shapes_solids import (
    Solid,
    box,
    extrusion,
    grid_faces,
    lathe,
    polygon_distance,
    tube,
    turn,
    union,
    weld,
)


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
    outline = np.array(
        [
            [-w / 2, 0],
            [w / 2, 0],
            [w / 2, h * 0.5],
            [w / 2, h],
            [fin, h + top],
            [fin, h + top + 0.015],
            [-fin, h + top + 0.015],
            [-fin, h + top],
            [-w / 2, h],
            [-w / 2, h * 0.5],
        ]
    )
    body = extrusion(outline, w * rng.uniform(0.85, 1.1), 4).moved(turn=turn(0, 90))
    if rng.random() < 0.5:
        body = union(body, cylinder(0.014, 0.012).moved((w * 0.27, 0, h + top * 0.6), turn(1, 35)))
    return Thing(body)


def rounded_box(rng: Rng) -> Thing:
    size = np.sort(rng.uniform([0.02, 0.03, 0.04], [0.07, 0.11, 0.18]))
    return Thing(box(rng.permutation(size), rng.uniform(0.15, 0.8) * size[0] / 2, 6))


def can(rng: Rng) -> Thing:
    r, h = rng.uniform(0.02, 0.045), rng.uniform(0.05, 0.16)
    rim, step = rng.uniform(0.001, 0.003), rng.uniform(0.0, 0.006)
    z = np.linspace(0.06, 0.94, 7) * h
    profile = [
        (0, rim),
        (r - 0.006 - step, rim),
        (r - 0.004 - step, 0),
        (r - step, 0.002),
        *((r, t) for t in z),
        (r - step, h - 0.002),
        (r - 0.002 - step, h),
        (r - 0.004 - step, h - rim - 0.001),
        (0, h - rim - 0.001),
    ]
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
    profile = [
        (0, 0),
        (r * 0.9, 0),
        *((r, t) for t in z),
        (lid * 0.9, h),
        (lid * 0.92, h + 0.002),
        (lid, h + 0.003),
        (lid, h + c),
        (lid * 0.96, h + c + 0.001),
        (0, h + c + 0.001),
    ]
    return Thing(lathe(np.array(profile), 36))


def _vessel(rng: Rng, rows: int = 9) -> tuple[Solid, np.ndarray, np.ndarray]:
    h, r0 = rng.uniform(0.06, 0.13), rng.uniform(0.022, 0.04)
    z = np.linspace(0, 1, rows)
    r = r0 * (1 + rng.uniform(-0.1, 0.45) * z ** rng.uniform(0.6, 2) + rng.uniform(-0.05, 0.2) * np.sin(np.pi * z))
    r[0] *= 0.93
    return lathe(hollow(r, z * h, rng.uniform(0.003, 0.005), 0.006), 30), r, z * h


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
    spine = np.stack(
        [x0 - 0.002 + reach * np.cos(a).clip(0) ** power, 0 * a, heights.mean() + np.sin(a) * np.ptp(heights) / 2], 1
    )
    return Thing(union(body, tube(spine, rng.uniform(0.0045, 0.007), 10, rng.uniform(0.9, 1.6))))


def bowl(rng: Rng) -> Thing:
    r, h = rng.uniform(0.04, 0.1), rng.uniform(0.015, 0.06)
    z = np.linspace(0, 1, 10)
    radius = r * (rng.uniform(0.4, 0.6) + 0.45 * z ** rng.uniform(0.35, 0.8))
    return Thing(lathe(hollow(radius, z * h, 0.004, 0.005), 36))


def glass(rng: Rng) -> Thing:
    r, h, stem = rng.uniform(0.025, 0.042), rng.uniform(0.06, 0.1), rng.uniform(0.04, 0.09)
    z = np.linspace(0.05, 1, 8)
    radius = r * np.sqrt(z) * (1 + 0.3 * np.sin(np.pi * z))
    foot = r * rng.uniform(0.8, 1.05)
    s = rng.uniform(0.0035, 0.006)
    bowl_ = hollow(radius, stem + z * h, 0.003, 0.005)[2:]
    return Thing(
        lathe(
            np.array([(0, 0), (foot, 0), (foot, 0.003), (s * 1.5, 0.008), (s, stem * 0.5), (s * 1.1, stem), *bowl_]), 28
        )
    )


def vase(rng: Rng) -> Thing:
    z = np.linspace(0, 1, 18)
    r, h = radii(rng, z, rng.uniform(0.008, 0.02), rng.uniform(0.025, 0.05), 6), rng.uniform(0.08, 0.22)
    return Thing(lathe(np.array([(0, 0), *np.stack([r, z * h], 1), (0, h)])))


def ring(rng: Rng) -> Thing:
    """Tape rolls, rings, bangles."""
    r, tube_, h = rng.uniform(0.02, 0.055), rng.uniform(0.006, 0.016), rng.uniform(0.012, 0.05)
    outline = round_rect(tube_, h, 0.3 * min(tube_, h), 3) + [r, 0]
    angle = np.linspace(0, 2 * np.pi, 33)
    v = np.stack(
        [outline[:, None, 0] * np.cos(angle), outline[:, None, 0] * np.sin(angle), np.repeat(outline[:, 1:], 33, 1)], -1
    )
    v = np.concatenate([v, v[:1]])
    v, f = weld(v.reshape(-1, 3), grid_faces(len(v), 33, True))
    return Thing(
        Solid(
            v.astype(np.float32),
            f,
            lambda p: polygon_distance(np.stack([np.hypot(p[:, 0], p[:, 1]), p[:, 2]], 1), outline),
        )
    )
