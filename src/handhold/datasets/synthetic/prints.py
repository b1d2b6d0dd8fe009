"""Drawn pictures that surfaces and backgrounds wear: labels of made-up products, and rooms with clutter.

They are drawn once, from a seed, and sampled at render time. Words are random letters.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

PANELS = 3  # pictures of one product: one for each axis of a box
_FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX, cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX, cv2.FONT_HERSHEY_PLAIN,
)  # fmt: skip


@lru_cache(maxsize=4)
def product_panels(n: int, size: int, seed: int) -> np.ndarray:
    """(n * PANELS, size, size, 3) uint8 sRGB: the panels of n products."""
    rng = np.random.default_rng([seed, 11])
    return np.stack([panel for _ in range(n) for panel in _product(rng, size)])


@lru_cache(maxsize=4)
def room_pictures(n: int, size: int, seed: int) -> np.ndarray:
    """(n, size, size, 3) uint8 sRGB: walls, tables, shelves, textures and heaps of things."""
    rng = np.random.default_rng([seed, 12])
    panels = product_panels(48, 128, seed + 1)
    return np.stack([_room(rng, size, panels) for _ in range(n)])


def colour(rng: np.random.Generator, strength: float = 0.5) -> tuple[int, int, int]:
    """An sRGB colour as things have it: greys, browns and skin colours are more frequent than pure ones."""
    kind = rng.random()
    if kind < 0.25:
        g = rng.uniform(0, 255)
        c = g + rng.normal(0, 6, 3)
    elif kind < 0.45:
        c = np.array([205, 165, 130]) * rng.uniform(0.25, 1.2) + rng.normal(0, 14, 3)
    elif kind < 0.6:
        c = rng.uniform(205, 255) + rng.normal(0, 8, 3)
    else:
        strong = rng.random() < strength
        hue, s = rng.integers(0, 180), rng.beta(2.5, 1.5) if strong else rng.beta(1.5, 4)
        c = cv2.cvtColor(np.uint8([[[hue, 255 * s, 255 * rng.beta(2.5, 1.3)]]]), cv2.COLOR_HSV2RGB)[0, 0].astype(float)
    return tuple(int(x) for x in np.clip(c, 0, 255))


def word(rng: np.random.Generator, low: int = 2, high: int = 10) -> str:
    n = int(rng.integers(low, high + 1))
    upper = rng.random() < 0.5
    letters = "".join(
        ("bcdfghklmnprstvwz" if i % 2 else "aeiou")[rng.integers(0, 5 if i % 2 == 0 else 17)] for i in range(n)
    )
    return letters.upper() if upper else letters.capitalize()


def _text(img: np.ndarray, rng: np.random.Generator, text: str, x: int, y: int, width: float, ink) -> int:
    """Writes a word that is `width` pixels wide with its top left at (x, y); returns its height."""
    font = _FONTS[rng.integers(len(_FONTS))]
    (w, _), _ = cv2.getTextSize(text, font, 1.0, 1)
    scale = width / max(w, 1)
    bold = max(1, int(round(scale * rng.uniform(0.8, 3.0))))
    (_, h), base = cv2.getTextSize(text, font, scale, bold)
    cv2.putText(img, text, (int(x), int(y + h)), font, scale, ink, bold, cv2.LINE_AA)
    return h + base


def _gradient(rng: np.random.Generator, size: int, a, b) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    g = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    t = np.float32(np.cos(angle)) * g[None] + np.float32(np.sin(angle)) * g[:, None]
    t = np.clip(t * np.float32(rng.uniform(0.6, 3)) + np.float32(0.5), 0, 1)[..., None]
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return (a + (b - a) * t).astype(np.uint8)


def _field(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(size,size) smooth noise in [0,1]."""
    small = rng.random((cells, max(2, int(cells * rng.uniform(0.3, 1.7))))).astype(np.float32)
    return np.clip(cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC), 0, 1)


def _shape(img: np.ndarray, rng: np.random.Generator, c, x: float, y: float, r: float) -> None:
    kind = rng.integers(5)
    p, r = (int(x), int(y)), max(1, int(r))
    fill = -1 if rng.random() < 0.75 else max(1, r // 8)
    if kind == 0:
        cv2.circle(img, p, r, c, fill, cv2.LINE_AA)
    elif kind == 1:
        cv2.ellipse(
            img, p, (r, max(1, int(r * rng.uniform(0.3, 0.9)))), rng.uniform(0, 180), 0, 360, c, fill, cv2.LINE_AA
        )
    elif kind == 2:
        h = max(1, int(r * rng.uniform(0.3, 1)))
        cv2.rectangle(img, (p[0] - r, p[1] - h), (p[0] + r, p[1] + h), c, fill, cv2.LINE_AA)
    else:
        n = int(rng.integers(3, 12))
        a = np.sort(rng.uniform(0, 2 * np.pi, n)) if kind == 3 else np.arange(n) * 2 * np.pi / n + rng.uniform(0, 6)
        radius = r * (rng.uniform(0.5, 1, n) if kind == 3 else np.where(np.arange(n) % 2, rng.uniform(0.3, 1), 1))
        pts = np.stack([x + radius * np.cos(a), y + radius * np.sin(a)], 1).astype(np.int32)
        cv2.fillPoly(img, [pts], c, cv2.LINE_AA)


def _picture(img: np.ndarray, rng: np.random.Generator, x0: int, y0: int, x1: int, y1: int) -> None:
    """A patch that looks like a photograph: smooth colour noise with a few blobs."""
    s = max(4, min(x1 - x0, y1 - y0))
    small = rng.integers(0, 256, (int(rng.integers(2, 7)), int(rng.integers(2, 7)), 3)).astype(np.uint8)
    patch = cv2.resize(small, (max(1, x1 - x0), max(1, y1 - y0)), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(1, 8))):
        _shape(patch, rng, colour(rng), rng.uniform(0, x1 - x0), rng.uniform(0, y1 - y0), s * rng.uniform(0.08, 0.4))
    img[y0:y1, x0:x1] = cv2.GaussianBlur(patch, (0, 0), rng.uniform(0.4, 2.5))


def _paste(img: np.ndarray, patch: np.ndarray, x: int, y: int) -> None:
    """Puts the patch with its top left at (x, y), what lies outside left out."""
    x0, y0 = max(0, x), max(0, y)
    patch = patch[y0 - y :, x0 - x :][: max(0, len(img) - y0), : max(0, img.shape[1] - x0)]
    img[y0 : y0 + patch.shape[0], x0 : x0 + patch.shape[1]] = patch


def _any(rng: np.random.Generator, panels: np.ndarray) -> np.ndarray:
    return panels[rng.integers(len(panels))]


def _product(rng: np.random.Generator, size: int) -> list[np.ndarray]:
    palette = [colour(rng, 0.8) for _ in range(4)]
    name, base_b = word(rng), palette[0] if rng.random() < 0.5 else palette[1]
    style = rng.random()
    panels = []
    for k in range(PANELS):
        img = _gradient(rng, size, palette[0], base_b if rng.random() < 0.5 else palette[0])
        if style > 0.9:  # an even pattern
            n = int(rng.integers(2, 14))
            step = size / n
            for i in range(n):
                for j in range(n):
                    if style > 0.95 or (i + j) % 2 == 0:
                        _shape(img, rng, palette[1 + (i + j) % 3], (i + 0.5) * step, (j + 0.5) * step, step * 0.4)
            panels.append(img)
            continue
        for _ in range(int(rng.integers(0, 4))):  # bands
            a, b = sorted(rng.uniform(0, size, 2).astype(int))
            ink = palette[rng.integers(1, 4)]
            if rng.random() < 0.7:
                img[a : max(a + 3, min(b, a + size // 3))] = ink
            else:
                img[:, a : max(a + 3, min(b, a + size // 4))] = ink
        for _ in range(int(rng.integers(0, 5))):
            _shape(img, rng, palette[rng.integers(1, 4)], *rng.uniform(0, size, 2), size * rng.uniform(0.04, 0.35))
        if rng.random() < 0.4:
            x0, y0 = rng.uniform(0, size * 0.6, 2).astype(int)
            _picture(img, rng, x0, y0, int(x0 + size * rng.uniform(0.2, 0.4)), int(y0 + size * rng.uniform(0.2, 0.4)))
        ink = palette[3] if rng.random() < 0.6 else ((250, 250, 250) if rng.random() < 0.5 else (10, 10, 10))
        if k < 2 or rng.random() < 0.4:
            w = size * rng.uniform(0.4, 0.9)
            _text(img, rng, name, rng.uniform(0.03, 0.3) * size, rng.uniform(0.05, 0.5) * size, w, ink)
            if rng.random() < 0.6:
                _text(img, rng, word(rng), rng.uniform(0.05, 0.4) * size, rng.uniform(0.4, 0.85) * size, w * 0.5, ink)
        if rng.random() < 0.6:  # small print
            x, y, w = rng.uniform(0.05, 0.5) * size, rng.uniform(0.5, 0.7) * size, size * rng.uniform(0.3, 0.45)
            if rng.random() < 0.4:
                cv2.rectangle(img, (int(x - 4), int(y - 4)), (int(x + w + 4), int(y + w * 0.6)), (245, 245, 245), -1)
                ink = (20, 20, 20)
            for _ in range(int(rng.integers(2, 7))):
                y += max(5, _text(img, rng, " ".join(word(rng) for _ in range(3)), x, y, w, ink)) + 1
        if rng.random() < 0.25:  # bar code
            x, y = rng.uniform(0.05, 0.7, 2) * size
            w, h = int(size * 0.25), int(size * 0.15)
            bars = np.repeat(rng.random(max(2, w // 2)) < 0.5, 2)[:w]
            patch = img[int(y) : int(y) + h, int(x) : int(x) + len(bars)]
            patch[:] = np.where(bars[None, : patch.shape[1], None], 15, 245)
        panels.append(img)
    return panels


def _wood(rng: np.random.Generator, size: int) -> np.ndarray:
    a, b = np.array(colour(rng)) * 0.5 + np.array([85, 58, 35]) * rng.uniform(0.3, 1.2), rng.uniform(0.5, 0.95)
    y = np.linspace(0, rng.uniform(4, 30), size)[:, None] + 3 * _field(rng, size, 4)
    t = (0.5 + 0.5 * np.sin(2 * np.pi * y)) * 0.6 + 0.4 * cv2.resize(
        rng.random((size, 8)).astype(np.float32), (size, size), interpolation=cv2.INTER_LINEAR
    )
    img = a * (b + (1 - b) * t[..., None])
    for x in range(0, size, int(rng.integers(40, 160))):
        img[x : x + 2] *= rng.uniform(0.4, 0.9)
    return np.clip(img, 0, 255).astype(np.uint8)


def _surface(rng: np.random.Generator, size: int, panels: np.ndarray) -> np.ndarray:
    """A texture that fills a wall, table or floor."""
    kind = rng.random()
    a, b = colour(rng, 0.2), colour(rng, 0.2)
    if rng.random() < 0.2:  # white walls and tables are common
        a = tuple(int(x) for x in np.clip(rng.uniform(190, 250) + rng.normal(0, 5, 3), 0, 255))
    if kind < 0.35:
        return _gradient(rng, size, a, np.clip(np.array(a) * rng.uniform(0.6, 1.3), 0, 255))
    if kind < 0.55:
        img = _wood(rng, size)
        return img if rng.random() < 0.5 else np.ascontiguousarray(img.transpose(1, 0, 2))
    if kind < 0.7:
        t = sum(_field(rng, size, 3 * 2**k) * 0.6**k for k in range(int(rng.integers(2, 6))))[..., None]
        t = (t - t.min()) / max(np.ptp(t), 1e-6) * rng.uniform(0.2, 1)
        return (np.array(a) * (1 - t) + np.array(b) * t).astype(np.uint8)
    img = _gradient(rng, size, a, a)
    step = int(rng.integers(6, 60))
    if kind < 0.8:  # stripes, checks, tiles
        for x in range(0, size, step):
            if kind < 0.76:
                img[x : x + max(1, int(step * rng.uniform(0.03, 0.5)))] = b
            if kind > 0.73:
                img[:, x : x + max(1, step // 2 if kind < 0.77 else 2)] = b
        return img
    if kind < 0.9:  # cloth with folds
        weave = rng.normal(0, rng.uniform(2, 14), (size, size, 1))
        fold = _field(rng, size, int(rng.integers(3, 9)))[..., None]
        return np.clip(img * (0.55 + 0.6 * fold) + weave, 0, 255).astype(np.uint8)
    panel = _any(rng, panels)
    return cv2.resize(panel, (size, size), interpolation=cv2.INTER_CUBIC)


def _thing(img: np.ndarray, rng: np.random.Generator, panels: np.ndarray, x: float, y: float, s: float) -> None:
    """Something that stands or lies about: a box with print, a can, a shape, a bundle of sticks, a blob."""
    kind = rng.random()
    if kind < 0.4:
        w, h = s * rng.uniform(0.4, 1.2), s * rng.uniform(0.4, 1.5)
        a = rng.normal(0, 0.5)
        corner = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2 * rng.uniform(0.85, 1.15, (4, 1))
        turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
        to = (corner @ turn + [x, y]).astype(np.float32)
        panel = _any(rng, panels) if rng.random() < 0.7 else np.full((128, 128, 3), colour(rng), np.uint8)
        panel = (panel * np.linspace(rng.uniform(0.5, 1), 1, 128)[None, :, None]).astype(np.uint8)
        pad = int(s * 0.25) + 2
        low = np.maximum(np.floor(to.min(0)).astype(int) - pad, 0)
        high = np.minimum(np.ceil(to.max(0)).astype(int) + pad, [img.shape[1], img.shape[0]])
        if (high <= low).any():
            return
        to, view = (to - low).astype(np.float32), img[low[1] : high[1], low[0] : high[0]]
        m = cv2.getPerspectiveTransform(np.float32([[0, 0], [128, 0], [128, 128], [0, 128]]), to)
        warped = cv2.warpPerspective(panel, m, view.shape[1::-1], flags=cv2.INTER_AREA)
        mask = np.zeros(view.shape[:2], np.uint8)
        cv2.fillConvexPoly(mask, to.astype(np.int32), 255, cv2.LINE_AA)
        shadow = cv2.blur(np.roll(mask, (int(s * 0.06), int(s * 0.06)), (0, 1)), (2 * int(s * 0.06) + 1,) * 2)
        view[:] = (view * (1 - rng.uniform(0.2, 0.7) / 255 * shadow[..., None])).astype(np.uint8)
        np.copyto(view, warped, where=(mask > 127)[..., None])
    elif kind < 0.6:  # a can or bottle: a shaded upright bar
        w, h = max(3, int(s * rng.uniform(0.3, 0.6))), max(4, int(s * rng.uniform(0.6, 1.5)))
        u = np.linspace(-0.95, 0.95, w)
        shade = (0.35 + 0.65 * np.sqrt(1 - (u - rng.uniform(-0.3, 0.3)).clip(-0.99, 0.99) ** 2))[None, :, None]
        body = cv2.resize(_any(rng, panels), (w, h)) if rng.random() < 0.6 else np.full((h, w, 3), colour(rng))
        _paste(img, (body * shade).astype(np.uint8), int(x), int(y - h / 2))
    elif kind < 0.75:
        for _ in range(int(rng.integers(1, 6))):  # pens, cables, edges
            a, r = rng.uniform(0, np.pi), s * rng.uniform(0.5, 2)
            p = (int(x - r * np.cos(a)), int(y - r * np.sin(a)))
            q = (int(x + r * np.cos(a)), int(y + r * np.sin(a)))
            cv2.line(img, p, q, colour(rng), max(1, int(s * rng.uniform(0.02, 0.15))), cv2.LINE_AA)
    elif kind < 0.9:
        _shape(img, rng, colour(rng), x, y, s * rng.uniform(0.2, 0.7))
    else:  # something of the colour of skin, with rounded ends
        c = tuple(
            int(v) for v in np.clip(np.array([215, 165, 135]) * rng.uniform(0.25, 1.15) + rng.normal(0, 8, 3), 0, 255)
        )
        for _ in range(int(rng.integers(1, 6))):
            a = rng.uniform(0, 2 * np.pi)
            q = (int(x + s * np.cos(a)), int(y + s * np.sin(a)))
            cv2.line(img, (int(x), int(y)), q, c, max(2, int(s * rng.uniform(0.12, 0.4))), cv2.LINE_AA)


def _room(rng: np.random.Generator, size: int, panels: np.ndarray) -> np.ndarray:
    img = _surface(rng, size, panels)
    kind = rng.random()
    if kind < 0.4:  # a table before a wall, or a floor
        h = int(size * rng.uniform(0.1, 0.9))
        table = _surface(rng, size, panels)
        d = size * rng.uniform(0, 0.9)
        to = np.float32([[0, h], [size, h + rng.normal(0, size * 0.06)], [size + d, size * 1.3], [-d, size * 1.3]])
        m = cv2.getPerspectiveTransform(np.float32([[0, 0], [size, 0], [size, size], [0, size]]), to)
        warped = cv2.warpPerspective(table, m, (size, size), flags=cv2.INTER_AREA)
        mask = np.zeros((size, size), np.uint8)
        cv2.fillConvexPoly(mask, to.astype(np.int32), 255)
        if rng.random() < 0.4:  # the table's edge
            mask_edge = np.roll(mask, -int(rng.integers(2, 10)), 0)
            img[mask_edge > 0] = np.clip(np.array(colour(rng)) * rng.uniform(0.3, 1), 0, 255).astype(np.uint8)
        np.copyto(img, warped, where=(mask > 127)[..., None])
    elif kind < 0.55:  # shelves
        rows = int(rng.integers(1, 5))
        for k in range(rows):
            y, x = size * (k + 1) / (rows + 0.3), 0.0
            while x < size:
                w = size * rng.uniform(0.02, 0.12)
                h = size / rows * rng.uniform(0.3, 0.85)
                body = np.full((8, 8, 3), colour(rng), np.uint8) if rng.random() < 0.5 else _any(rng, panels)
                body = cv2.resize(body, (max(2, int(w)), max(2, int(h))), interpolation=cv2.INTER_AREA)
                _paste(img, body, int(x), int(y) - len(body))
                x += w * rng.uniform(1, 1.5)
            cv2.rectangle(img, (0, int(y)), (size, int(y + size * rng.uniform(0.01, 0.06))), colour(rng), -1)
    elif kind < 0.7:  # a room far off: verticals, windows, doors
        for _ in range(int(rng.integers(3, 14))):
            x0, y0 = rng.uniform(-0.2, 0.9, 2) * size
            w, h = size * rng.uniform(0.03, 0.5), size * rng.uniform(0.1, 0.9)
            c = (250, 250, 245) if rng.random() < 0.15 else colour(rng)
            cv2.rectangle(img, (int(x0), int(y0)), (int(x0 + w), int(y0 + h)), c, -1)
    n = rng.poisson(rng.choice([0.5, 4, 14]))
    for _ in range(n):
        _thing(img, rng, panels, *rng.uniform(-0.05, 1.05, 2) * size, size * rng.uniform(0.05, 0.4))
    light = 0.6 + 0.5 * _field(rng, size, 2)[..., None] if rng.random() < 0.6 else 1.0
    img = np.clip(img * light, 0, 255).astype(np.uint8)
    if rng.random() < 0.12:  # lamps out of focus
        for _ in range(int(rng.integers(2, 14))):
            p = tuple(int(v) for v in rng.uniform(0, size, 2))
            cv2.circle(
                img,
                p,
                int(size * rng.uniform(0.01, 0.06)),
                tuple(int(v) for v in rng.uniform(170, 255, 3)),
                -1,
                cv2.LINE_AA,
            )
    return img
