"""The segmenter over a whole clip: forwards and backwards in time, each frame given the masks of the one before.

Masks travel along dense optical flow (DIS: Kroeger et al., ECCV 2016, as OpenCV has it); where the flow there and the
flow back disagree nothing travels, and the network, which learned this case, finds out by itself. The two directions
(and, if wanted, the mirrored picture) are averaged. Which hand is which is then decided over time, not per frame: the
evidence for "right" rides along the same flow.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from ..datasets.synthetic.sample import BACKGROUND, LABELS, LEFT, OBJECT, RIGHT
from ..parallel import each
from .segmenter import Segmenter

_MIRRORED = [0, LEFT, RIGHT, 3, 4]  # channels of a mirrored picture


@dataclass(frozen=True)
class Flows:
    """Dense flow between neighbours, pixels: `to_next[i]` from frame i to i+1, `to_last[i]` from frame i+1 to i, both
    (F-1,H,W,2) float16, and whether the one undoes the other, (F-1,H,W) bool each."""

    to_next: np.ndarray
    to_last: np.ndarray
    next_sure: np.ndarray
    last_sure: np.ndarray

    def carried(self, field: np.ndarray, i: int, forward: bool) -> np.ndarray:
        """`field` (H,W,C) of the frame before i (after i, unless `forward`) moved into frame i, 0 where unsure."""
        flow, sure, j = (self.to_last, self.last_sure, i - 1) if forward else (self.to_next, self.next_sure, i)
        return pulled(field, flow[j]) * sure[j, ..., None]


def dense_flows(frames: np.ndarray, slack: float = 1.0) -> Flows:
    """DIS flow both ways between the frames (F,H,W,3) uint8. A pixel is sure where going there and back ends within
    `slack` pixels and 5 % of the way."""
    gray = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    n, (h, w) = len(frames) - 1, frames.shape[1:3]
    there, back = (np.empty((max(n, 0), h, w, 2), np.float16) for _ in range(2))
    sure = np.empty((2, max(n, 0), h, w), bool)
    for i in range(n):
        a, b = dis.calc(gray[i], gray[i + 1], None), dis.calc(gray[i + 1], gray[i], None)
        there[i], back[i] = a, b
        for k, (x, y) in enumerate(((a, b), (b, a))):
            error = np.linalg.norm(x + pulled(y, x), axis=-1)
            sure[k, i] = error < slack + 0.05 * np.linalg.norm(x, axis=-1)
    return Flows(there, back, *sure)


def pulled(field: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """`field` (H,W[,C]) float32 read where `flow` (H,W,2) leads: out(x) = field(x + flow(x)), 0 outside."""
    h, w = flow.shape[:2]
    at = flow.astype(np.float32) + np.stack(np.meshgrid(np.arange(w), np.arange(h)), -1).astype(np.float32)
    out = cv2.remap(field, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0)
    return out.reshape(h, w, *field.shape[2:])


def segment_clip(
    model: Segmenter,
    frames: np.ndarray,
    progress: Callable[[float, str], None] | None = None,
    mirror: bool = True,
    side: int = 384,
    settle: bool = True,
) -> np.ndarray:
    """Label probabilities of a clip.

    frames (F,H,W,3) uint8 sRGB, at least one. Returns (F,5,h,w) float16 in the order of `LABELS`, adding up to 1; h, w
    are H, W unless the longer is over `side`, then everything is computed on frames shrunk to it. mirror: average with
    the mirrored pictures, which takes twice as long. settle: see `settle_sides`. Runs on the model's device.
    """
    say = progress or (lambda share, what: None)
    h, w = frames.shape[1:3]
    scale = min(1.0, side / max(h, w))
    if scale < 1:
        size = (round(w * scale), round(h * scale))
        frames = np.stack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames])
    say(0.0, "flow")
    flows = dense_flows(frames)
    net = model.folded()
    n = len(frames)
    out = np.zeros((n, len(LABELS), *frames.shape[1:3]), np.float16)
    told, stop = queue.SimpleQueue(), threading.Event()
    halved = [threading.Event() for _ in range(n)]

    def one_way(forward: bool, threads: int) -> None:
        torch.set_num_threads(threads)
        last, finished = None, False
        try:
            for i in range(n) if forward else range(n - 1, -1, -1):
                if stop.is_set():
                    return
                p = _one(net, frames[i], None if last is None else flows.carried(last, i, forward), mirror)
                # The sum is rounded, so its order counts: first the way that has come the shorter way.
                if forward != (2 * i <= n):
                    halved[i].wait()
                if stop.is_set():
                    return
                out[i] += p / 2
                halved[i].set()
                last = np.ascontiguousarray(p.transpose(1, 2, 0))
                told.put(1)
            finished = True
        finally:
            told.put(None)
            if not finished:
                stop.set()
                for event in halved:
                    event.set()

    # Both ways at once, each on half of the cores: less waiting than with all cores for each layer. The threads' own
    # setting goes with them.
    with ThreadPoolExecutor(2) as pool:
        ways = [pool.submit(one_way, f, max(1, torch.get_num_threads() // 2)) for f in (True, False)]
        try:
            done = ended = 0
            while ended < 2:
                if told.get() is None:
                    ended += 1
                else:
                    done += 1
                    say(0.1 + 0.85 * done / (2 * n), "segmenting")
        finally:
            stop.set()
            for event in halved:
                event.set()
    for way in ways:
        way.result()
    if settle:
        say(0.95, "right and left")
        settle_sides(out, flows)
    say(1.0, "segmented")
    return out


@torch.inference_mode()
def _one(net: Segmenter, frame: np.ndarray, previous: np.ndarray | None, mirror: bool) -> np.ndarray:
    """(5,H,W) float32 probabilities of one frame (H,W,3) uint8, previous (H,W,5) probabilities."""
    device = net.mean.device
    x = torch.from_numpy(np.ascontiguousarray(frame)).to(device).permute(2, 0, 1)[None].float() / 255
    before = None if previous is None else torch.from_numpy(previous).to(device).permute(2, 0, 1)[None]
    if not mirror:
        return net(x, before).softmax(1)[0].cpu().numpy()
    x = torch.cat([x, x.flip(-1)])
    if before is not None:
        before = torch.cat([before, before[:, _MIRRORED].flip(-1)])
    p: Tensor = net(x, before).softmax(1)
    return ((p[0] + p[1].flip(-1)[_MIRRORED]) / 2).cpu().numpy()


def settle_sides(probabilities: np.ndarray, flows: Flows, memory: float = 0.95) -> None:
    """Handedness that does not flicker: in probabilities (F,5,H,W) the hands' share is divided anew between the sides,
    in place.

    The evidence p(right) - p(left) and its weight p(right) + p(left) are carried along the flow from both ends of the
    clip, fading by `memory` per frame; where hands were not seen before, the neighbourhood tells. A connected hand
    that is of one side for the most part is of that side.
    """
    n, _, h, w = probabilities.shape
    evidence = np.empty((n, h, w, 2), np.float16)  # difference and weight, summed over time
    for forward in (True, False):
        total = None
        for i in range(n) if forward else range(n - 1, -1, -1):
            own = _side_evidence(probabilities[i])
            total = own if total is None else own + memory * flows.carried(total, i, forward)
            evidence[i] = total if forward else evidence[i] + total - own
    reach = 0.02 * max(h, w)

    def settle(i: int) -> None:
        e = evidence[i].astype(np.float32)
        near = cv2.GaussianBlur(e, (0, 0), reach)
        share = 0.5 + 0.5 * (e[..., 0] + near[..., 0]) / np.maximum(e[..., 1] + near[..., 1], 1e-4)
        share = np.clip(share, 0, 1)
        hand = probabilities[i, RIGHT].astype(np.float32) + probabilities[i, LEFT]
        rest = np.maximum(probabilities[i, BACKGROUND], probabilities[i, OBJECT:].max(0))
        parts, count = ndimage.label(hand > rest)
        if count:
            mean = ndimage.mean(share, parts, np.arange(count + 1))
            mean[0] = 0.5
            decided = np.where(mean > 0.75, 1.0, np.where(mean < 0.25, 0.0, np.nan))
            share = np.where(np.isfinite(decided[parts]), decided[parts], share)
        share = share * share / (share * share + (1 - share) ** 2)  # towards a decision
        probabilities[i, RIGHT], probabilities[i, LEFT] = hand * share, hand * (1 - share)

    each(settle, range(n))


def _side_evidence(p: np.ndarray) -> np.ndarray:
    right, left = p[RIGHT].astype(np.float32), p[LEFT].astype(np.float32)
    return np.stack([right - left, right + left], -1)


def confidence(probabilities: np.ndarray) -> np.ndarray:
    """(F,5) how sure each frame is of each label, 0..1: mean margin over the pixels that have it, 0 where none has.
    probabilities (F,5,H,W)."""
    out = np.zeros(probabilities.shape[:2], np.float32)
    for i, p in enumerate(probabilities):
        label, top = p.argmax(0), p.max(0).astype(np.float32)
        size = np.bincount(label.ravel(), minlength=len(LABELS))
        mean = np.bincount(label.ravel(), top.ravel(), len(LABELS)) / np.maximum(size, 1)
        out[i] = np.where(size > 20, np.clip(2 * mean - 1, 0, 1), 0)
    return out
