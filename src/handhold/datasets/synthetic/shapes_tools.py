"""Recipes for things that hands hold: devices, books, cutlery and tools. In metres, z up."""

from __future__ import annotations

import numpy as np

from .shapes_outlines import Rng, Thing, cylinder, hollow, radii, round_rect, smooth, strip
from .shapes_solids import (
    Solid,
    box,
    ellipsoid,
    extrusion,
    lathe,
    superquadric,
    tube,
    turn,
    union,
)
from .shapes_vessels import bottle


def phone(rng: Rng) -> Thing:
    w = rng.uniform(0.058, 0.082)
    h, t = w * rng.uniform(1.85, 2.2), rng.uniform(0.007, 0.011)
    body = extrusion(round_rect(w, h, rng.uniform(0.004, 0.014)), t, bevel=0.0015)
    if rng.random() < 0.6:
        bump = extrusion(round_rect(w * 0.4, w * 0.42, 0.006, 3), 0.003, bevel=0.0006)
        body = union(body, bump.moved((w * 0.24, h / 2 - w * 0.28, -t / 2 - 0.0008)))
    return Thing(body)


def tablet(rng: Rng) -> Thing:
    return Thing(
        extrusion(
            round_rect(rng.uniform(0.1, 0.17), rng.uniform(0.15, 0.24), 0.01), rng.uniform(0.006, 0.012), bevel=0.0015
        )
    )


def remote(rng: Rng) -> Thing:
    w, h, t = rng.uniform(0.035, 0.055), rng.uniform(0.12, 0.21), rng.uniform(0.012, 0.026)
    return Thing(
        extrusion(round_rect(w, h, rng.uniform(0.2, 0.49) * w), t, 2, bevel=0.004, scale=rng.uniform(0.85, 1.0))
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
    profile = [
        (0, 0),
        (0.001, 0.001),
        (r * 0.55, tip * 0.6),
        (grip, tip),
        (grip, tip + 0.035),
        (r, tip + 0.036),
        (r, h * 0.5),
        (r, h * 0.8),
        (r * 0.97, h - 0.01),
        (r * 0.5, h - 0.009),
        (r * 0.45, h),
        (0, h),
    ]
    body = lathe(np.array(profile), int(rng.choice([6, 14, 16])))
    if rng.random() < 0.5:
        body = union(body, box([0.004, 0.0015, 0.04], 0, 2).moved((0, r + 0.002, h * 0.8)))
    return Thing(body)


def spoon(rng: Rng) -> Thing:
    length, head = rng.uniform(0.12, 0.2), rng.uniform(0.015, 0.025)
    x = np.linspace(0, 1, 26)
    bowl_ = np.sqrt(np.clip(1 - ((x - 0.86) / 0.14) ** 2, 0, 1)) * head
    handle = 0.004 + 0.003 * (1 - x) ** 2
    outline = strip(x * length, np.maximum(bowl_, np.where(x < 0.8, handle, 0.0012)))
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
    outline = smooth(points * [1, rng.uniform(0.5, 1)], 40)
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
    profile = [
        (0, 0),
        (body[0] * 0.7, 0),
        *np.stack([body, 0.004 + z * grip], 1),
        (s * 1.3, grip + 0.01),
        (s, grip + 0.012),
        (s, grip + shaft / 2),
        (s, grip + shaft),
        (0, grip + shaft),
    ]
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
    body = lathe(hollow(r * (0.85 + 0.15 * z), z * h, 0.003, 0.004), 30)
    x = np.linspace(r * 0.97, r + rng.uniform(0.09, 0.14), 10)
    spine = np.stack([x, 0 * x, h * 0.8 + (x - r) * rng.uniform(0.0, 0.3)], 1)
    return Thing(union(body, tube(spine, np.linspace(0.006, 0.011, 10), 10)))


def kettle(rng: Rng) -> Thing:
    """Jugs and kettles: a body with a large handle, sometimes a spout."""
    z = np.linspace(0, 1, 10)
    r, h = radii(rng, z, 0.03, rng.uniform(0.04, 0.06), 4), rng.uniform(0.09, 0.15)
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
