"""What a pixel looks like, and a small classifier that learns it for one clip."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.optim.adamw import adamw

from ..parallel import each, together
from ._mask_cleaning import BACKGROUND, OBJECT

if TYPE_CHECKING:
    from .masks import Background


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
        lab, b1 = self._colors(i)
        b2, b3 = (cv2.GaussianBlur(lab, (0, 0), s) for s in (3.0, 7.0))
        square = lab * lab
        contrast = [
            np.sqrt(np.maximum(cv2.GaussianBlur(square, (0, 0), s) - b * b, 0)).sum(-1, keepdims=True)
            for s, b in ((3.0, b2), (7.0, b3))
        ]
        return np.concatenate([lab, b1, b2, b3, *contrast, *self._back(i, b1)], -1)

    def close(self, i: int) -> np.ndarray:
        """(H,W,len(fine)) float32: the columns `fine`."""
        lab, b1 = self._colors(i)
        return np.concatenate([lab, b1, *self._back(i, b1)], -1)

    def _colors(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """CIELAB (H,W,3), each channel in units of its usual size, and the same a little blurred."""
        lab = cv2.cvtColor(self.frames[i].astype(np.float32) / 255.0, cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])
        return lab, cv2.GaussianBlur(lab, (0, 0), 1.0)

    def _back(self, i: int, blurred: np.ndarray) -> list[np.ndarray]:
        known = self.known[..., None]
        away = np.minimum(self.foreground(i), 12.0)[..., None] / 6.0
        return [known.astype(np.float32), away, np.where(known, blurred - self._background_lab, np.float32(0))]

    @functools.cached_property
    def background_chromaticity(self) -> np.ndarray:
        """(H,W,2) log-chromaticity of the background."""
        return chromaticity(np.clip(self.background.color, 0, 255).astype(np.uint8))

    @functools.cached_property
    def _background_lab(self) -> np.ndarray:
        return cv2.cvtColor(np.clip(self.background.color / 255.0, 0, 1), cv2.COLOR_RGB2LAB) / np.float32([50, 30, 30])


def chromaticity(frame: np.ndarray) -> np.ndarray:
    """(H,W,2) log-chromaticity, red and blue against green, of (H,W,3) uint8 sRGB, a little blurred."""
    log = _LOG_LIGHT[cv2.GaussianBlur(frame, (0, 0), 1.0)]
    return np.stack([log[..., 0] - log[..., 1], log[..., 2] - log[..., 1]], -1)


_LOG_LIGHT = np.log((np.arange(256, dtype=np.float32) / 255.0) ** 2.2 + 0.004)


@dataclass(frozen=True)
class Draw:
    """What chance decides of one step of training."""

    at: Tensor  # (B,) rows of the samples, as many of each class
    hidden: Tensor  # (B,) bool: without the background's features
    noise: Tensor  # (B,D - n_background) of the others


def draws(y: Tensor, d: int, n_background: int, rng: np.random.Generator, epochs: int) -> Iterator[Draw]:
    """The steps of `train` on labels y (N,) of samples with d features, from `rng`."""
    groups = [g for c in range(4) if len(g := torch.nonzero(y == c)[:, 0])]
    for _ in range(epochs):
        at = torch.cat([g[torch.from_numpy(rng.integers(0, len(g), 512))] for g in groups])
        hidden = torch.from_numpy(rng.random(len(at)) < 0.3)
        yield Draw(at, hidden, torch.from_numpy(rng.normal(0, 0.03, (len(at), d - n_background)).astype(np.float32)))


def train(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, n_background: int, columns: Sequence, epochs: int = 700
) -> list[torch.nn.Module]:
    """Classifiers of samples x (N,D) with labels y (N,), one for each choice of columns of x; all at once. The last
    n_background columns are the background's.

    The random numbers of all but the last are drawn beforehand, so that all get those they would get one by one.
    """
    labels = torch.from_numpy(y.astype(np.int64))
    seen = [torch.from_numpy(np.ascontiguousarray(x[:, c])) for c in columns]
    nets = [network(k.shape[1]) for k in seen]
    chance = [draws(labels, k.shape[1], n_background, rng, epochs) for k in seen]
    chance[:-1] = [list(c) for c in chance[:-1]]
    jobs = (partial(descend, *job, labels, n_background, epochs) for job in zip(nets, chance, seen, strict=True))
    return together(*jobs)


def network(inputs: int, width: int = 40) -> torch.nn.Module:
    """A three-layer perceptron."""
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, 4),
    )


def descend(net, chance: Iterable[Draw], x: Tensor, y: Tensor, n_background: int, epochs: int) -> torch.nn.Module:
    """Train `net` on balanced classes; background features are dropped at random so that colour alone suffices.

    AdamW as a function: the optimisers' class loads torch's compiler, which takes seconds.
    """
    weights = list(net.parameters())
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    steps = [torch.zeros(()) for _ in weights]
    for step, draw in enumerate(chance):
        xb = x[draw.at]
        xb[draw.hidden, -n_background:] = 0
        xb[:, :-n_background] += draw.noise
        loss = torch.nn.functional.cross_entropy(net(xb), y[draw.at], label_smoothing=0.05)
        slopes = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            adamw(
                weights, list(slopes), first, second, [], steps, foreach=False, fused=True, amsgrad=False, beta1=0.9,
                beta2=0.999, lr=4e-3 * (1 - max(step - 1, 0) / epochs), weight_decay=1e-3, eps=1e-8, maximize=False,
            )  # fmt: skip
    return net.eval()


def label_all(model, features: Features, frames: np.ndarray, prior: np.ndarray | None = None) -> np.ndarray:
    """(F,H,W,4) float16 class probabilities, smoothed along image edges; times those of `prior`, if given."""
    out = np.empty((*frames.shape[:3], 4), np.float16)

    @torch.no_grad()
    def label(i: int) -> None:
        clear = (features.foreground(i) < 1.2) & features.known  # plainly background: not worth asking
        clear = ndimage.binary_erosion(clear, iterations=2)
        p = np.zeros((4, *clear.shape), np.float32)
        p[BACKGROUND, clear] = 1
        p[:, ~clear] = torch.softmax(model(torch.from_numpy(features(i)[~clear])), -1).numpy().T
        if prior is not None:
            p = (p + 1e-3) * (prior[i].transpose(2, 0, 1).astype(np.float32) + 1e-3)
            p /= p.sum(0)
        guide = cv2.cvtColor(frames[i], cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        p = np.maximum(guided(guide, p, 4, 2e-3), 1e-4)
        out[i] = (p / p.sum(0)).transpose(1, 2, 0)

    each(label, range(len(frames)))
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
        own = torch.softmax(model(torch.from_numpy(features.close(i)[band])), -1).numpy().T
        if prior is not None:
            own = own * np.sqrt(prior[i][band].astype(np.float32) + 1e-3).T
            own /= own.sum(0)
        p = np.ascontiguousarray(probabilities[i].transpose(2, 0, 1), np.float32)
        p[:, band] = own
        guide = cv2.cvtColor(features.frames[i], cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        p = np.maximum(np.where(band, guided(guide, p, 2, 1e-3), p), 1e-4)
        probabilities[i] = (p / p.sum(0)).transpose(1, 2, 0)

    each(decide, range(len(probabilities)))


def guided(guide: np.ndarray, planes: np.ndarray, r: int, eps: float) -> np.ndarray:
    """Guided filter (He et al., TPAMI 2013, eq. 5-6 and 8) of each plane (C,H,W) along the edges of `guide` (H,W)."""
    box = lambda a: cv2.blur(a, (2 * r + 1, 2 * r + 1))  # noqa: E731
    mean = box(guide)
    scatter = box(guide * guide) - mean * mean + eps
    out = np.empty_like(planes)
    for x, y in zip(planes, out, strict=True):
        mx = box(x)
        a = (box(guide * x) - mean * mx) / scatter
        y[:] = box(a) * guide + box(mx - a * mean)
    return out


def sampled(
    labels: list[np.ndarray], features: Features, rng: np.random.Generator, per_class: int
) -> tuple[np.ndarray, np.ndarray]:
    """At most `per_class` pixels of each of the labels 0..3 in each frame's (H,W): their features (N,D), and labels
    (N,)."""
    rows, found = [], []
    for label in labels:
        flat = label.ravel()
        at = [np.flatnonzero(flat == c) for c in range(4)]
        at = [rng.choice(a, min(per_class, len(a)), replace=False) if len(a) else a for a in at]
        rows.append(np.concatenate(at))
        found.append(flat[rows[-1]])

    def look(i: int) -> np.ndarray:
        f = features(i)
        return f.reshape(-1, f.shape[-1])[rows[i]]

    return np.concatenate(each(look, range(len(labels)))), np.concatenate(found)


def sure_labels(p: np.ndarray, least: float = 0.85) -> np.ndarray:
    """(H,W) int8: the likeliest label of p (H,W,4) where it is likelier than `least` and no other is near, else -1."""
    best = p.argmax(-1)
    out = np.full(best.shape, -1, np.int8)
    for c in range(4):
        out[ndimage.binary_erosion(best == c, iterations=2) & (p[..., c] > least)] = c
    return out
