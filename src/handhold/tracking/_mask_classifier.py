"""What a pixel looks like, and a small classifier that learns it for one clip."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np
import torch
from scipy import ndimage

from ._mask_cleaning import BACKGROUND, OBJECT

if TYPE_CHECKING:
    from .masks import Background

T = TypeVar("T")


class Features:
    """Per-pixel colour, local mean colour, local contrast, and difference from the background (0 where unknown)."""

    n_background = 5
    fine = np.r_[0:6, 14:19]  # the columns that look at one pixel (and its closest neighbours) alone

    def __init__(self, frames: np.ndarray, background: Background, known: np.ndarray) -> None:
        self.frames, self.background, self.known = frames, background, known
        self._foreground: dict[int, np.ndarray] = {}

    def foreground(self, i: int) -> np.ndarray:
        """(H,W) float32: difference from the background in noise units, 0 where the background is unknown."""
        if i not in self._foreground:
            d = cv2.absdiff(cv2.GaussianBlur(self.frames[i], (3, 3), 0).astype(np.float32), self.background.color)
            d = np.maximum(np.maximum(d[..., 0], d[..., 1]), d[..., 2]) / self.background.sigma
            self._foreground[i] = np.where(self.known, d, 0.0).astype(np.float32)
        return self._foreground[i]

    def __call__(self, i: int) -> np.ndarray:
        """(H,W,D) float32."""
        lab = cv2.cvtColor(self.frames[i].astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])
        b1, b2, b3 = (cv2.GaussianBlur(lab, (0, 0), s) for s in (1.0, 3.0, 7.0))
        contrast = [
            np.sqrt(np.maximum(cv2.GaussianBlur(lab * lab, (0, 0), s) - b * b, 0)).sum(-1, keepdims=True)
            for s, b in ((3.0, b2), (7.0, b3))
        ]
        d = self.foreground(i)
        k = self.known.astype(np.float32)
        diff = np.where(self.known[..., None], b1 - self._background_lab, 0)
        back = np.concatenate([k[..., None], np.minimum(d, 12.0)[..., None] / 6.0, diff], -1)
        return np.concatenate([lab, b1, b2, b3, *contrast, back], -1).astype(np.float32)

    @functools.cached_property
    def background_chromaticity(self) -> np.ndarray:
        """(H,W,2) log-chromaticity of the background."""
        return chromaticity(np.clip(self.background.color, 0, 255).astype(np.uint8))

    @functools.cached_property
    def _background_lab(self) -> np.ndarray:
        return cv2.cvtColor(np.clip(self.background.color / 255.0, 0, 1), cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])


def chromaticity(frame: np.ndarray) -> np.ndarray:
    linear = (cv2.GaussianBlur(frame, (0, 0), 1.0).astype(np.float32) / 255.0) ** 2.2 + 0.004
    log = np.log(linear)
    return np.stack([log[..., 0] - log[..., 1], log[..., 2] - log[..., 1]], -1)


@contextlib.contextmanager
def one_thread():
    """Tiny matrices: a second thread costs more than it brings, and its waiting costs more still."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def for_frames(job: Callable[[int], T], count: int) -> list[T]:
    """job(i) of every frame i, on all cores; it must depend on i alone."""
    with one_thread(), ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(job, range(count)))


def train(x, y, rng, n_background: int, epochs: int = 700, width: int = 40):
    """A three-layer perceptron on balanced classes; background features are dropped at random so that colour alone
    suffices.
    """
    x, y = torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))
    d = x.shape[1]
    net = torch.nn.Sequential(
        torch.nn.Linear(d, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 4),
    )
    groups = [torch.nonzero(y == c)[:, 0] for c in range(4)]
    opt = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-3, fused=True)
    for step in range(epochs):
        at = torch.cat([g[torch.from_numpy(rng.integers(0, len(g), 512))] for g in groups if len(g)])
        xb = x[at].clone()
        drop = torch.from_numpy(rng.random(len(at)) < 0.3)
        xb[drop, -n_background:] = 0
        xb[:, :-n_background] += torch.from_numpy(rng.normal(0, 0.03, (len(at), d - n_background)).astype(np.float32))
        loss = torch.nn.functional.cross_entropy(net(xb), y[at], label_smoothing=0.05)
        opt.zero_grad()
        loss.backward()
        opt.step()
        opt.param_groups[0]["lr"] = 4e-3 * (1 - step / epochs)
    return net.eval()


def label_all(model, features: Features, frames: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
    """(F,H,W,4) float16 class probabilities, smoothed along image edges; times those of `prior`, if given."""
    out = np.empty((*frames.shape[:3], 4), np.float16)

    @torch.no_grad()
    def label(i: int) -> None:
        f = features(i)
        clear = (features.foreground(i) < 1.2) & features.known  # plainly background: not worth asking
        clear = ndimage.binary_erosion(clear, iterations=2)
        p = np.zeros((*clear.shape, 4), np.float32)
        p[clear, BACKGROUND] = 1
        p[~clear] = torch.softmax(model(torch.from_numpy(f[~clear])), -1).numpy()
        if prior is not None:
            p = (p + 1e-3) * (prior[i].astype(np.float32) + 1e-3)
            p /= p.sum(-1, keepdims=True)
        guide = cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        p = np.stack([guided(guide, p[..., c], 4, 2e-3) for c in range(4)], -1)
        p = np.maximum(p, 1e-4)
        out[i] = p / p.sum(-1, keepdims=True)

    for_frames(label, len(frames))
    return out


def redecide_edges(probabilities: np.ndarray, model, features: Features, prior: np.ndarray | None = None) -> None:
    """In place: within a few pixels of an edge of the object the pixel's own colour decides, with `prior` (F,H,W,4), if
    given, to settle what looks alike.

    Context blurs labels across edges, and what leaks over one, between fingers above all, stays with the object in its
    own frame as a fin that no other view can carve.
    """
    reach = max(3, round(0.02 * probabilities.shape[2]))

    @torch.no_grad()
    def decide(i: int) -> None:
        inside = probabilities[i].argmax(-1) == OBJECT
        if not inside.any():
            return
        kernel = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
        band = (cv2.dilate(inside.astype(np.uint8), kernel) > 0) & (cv2.erode(inside.astype(np.uint8), kernel) == 0)
        f = features(i)[..., features.fine]
        p = probabilities[i].astype(np.float32)
        p[band] = torch.softmax(model(torch.from_numpy(f[band])), -1).numpy()
        if prior is not None:
            p[band] *= np.sqrt(prior[i][band].astype(np.float32) + 1e-3)
            p[band] /= p[band].sum(-1, keepdims=True)
        guide = cv2.cvtColor(features.frames[i], cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        smooth = np.stack([guided(guide, p[..., c], 2, 1e-3) for c in range(4)], -1)
        p = np.maximum(np.where(band[..., None], smooth, p), 1e-4)
        probabilities[i] = p / p.sum(-1, keepdims=True)

    for_frames(decide, len(probabilities))


def guided(guide: np.ndarray, x: np.ndarray, r: int, eps: float) -> np.ndarray:
    """Guided filter (He et al., TPAMI 2013, eq. 5-6 and 8)."""
    box = lambda a: cv2.blur(a, (2 * r + 1, 2 * r + 1))  # noqa: E731
    mg, mx = box(guide), box(x)
    a = (box(guide * x) - mg * mx) / (box(guide * guide) - mg * mg + eps)
    return box(a) * guide + box(mx - a * mg)


def samples(label: np.ndarray, f: np.ndarray, rng, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `per_class` pixels of each of the labels 0..3 in `label` (H,W): their features (N,D) of f (H,W,D), and
    labels (N,)."""
    xs, ys = [np.zeros((0, f.shape[-1]), np.float32)], [np.zeros(0, int)]
    for c in range(4):
        at = np.flatnonzero(label == c)
        if len(at):
            at = rng.choice(at, min(per_class, len(at)), replace=False)
            xs.append(f.reshape(-1, f.shape[-1])[at])
            ys.append(np.full(len(at), c))
    return np.concatenate(xs), np.concatenate(ys)


def sure_labels(p: np.ndarray, least: float = 0.85) -> np.ndarray:
    """(H,W) int8: the likeliest label of p (H,W,4) where it is likelier than `least` and no other is near, else -1."""
    best = p.argmax(-1)
    out = np.full(best.shape, -1, np.int8)
    for c in range(4):
        out[ndimage.binary_erosion(best == c, iterations=2) & (p[..., c] > least)] = c
    return out
