"""Recipes for things that hands hold: fruit, toys, soft things and hinged ones. In metres, z up."""

from __future__ import annotations

import numpy as np

from .shapes_outlines import Rng, Thing, cylinder, strip
from .shapes_solids import (
    Solid,
    blob,
    box,
    ellipsoid,
    extrusion,
    lathe,
    superquadric,
    tube,
    turn,
    union,
)


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
    wheels = [
        cylinder(w * 0.22, w * 0.2, 0.001, 14, 2).moved((x * length * 0.3, y * w * 0.46, -w * 0.25), turn(0, 90))
        for x in (-1, 1)
        for y in (-1, 1)
    ]
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
    blade = extrusion(strip(x, 0.001 + 0.007 * np.clip(1 - (x / (0.6 * length)).clip(0) ** 2, 0, 1)), t)
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
