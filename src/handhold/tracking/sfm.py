"""Structure from motion on a handled object: the camera-from-object pose of every frame, up to one global scale.

1. Flow tracks (`_sfm_flow`) and SIFT (`_sfm_worker`, pycolmap in its own process) match neighbours in time, at once;
   learned features too, where asked for (`_sfm_learned`).
2. pycolmap maps them into one or several sub-models, once with the object's pixels alone and once with the hand's too:
   during a stable grasp the hand is rigid with the object and its pixels are texture.
3. `_sfm_refine` cuts sub-models where neighbours disagree, merges them in time order, registers the remaining frames by
   PnP, and adjusts all of it together.
4. What disagrees with the two-view geometry of its neighbours is marked, never silently kept.
The same input and seed give the same output.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from ..scene import load_npz, save_npz
from . import _sfm_bundle as bundle
from . import _sfm_gaps as gaps
from . import _sfm_refine as refine
from ._sfm_far import close_by_flow
from ._sfm_flow import UPSAMPLE, flow_tracks, pair_flow
from ._sfm_learned import Features, learned_matches

MIN_PIXELS = 60
MIN_MATCHES = 10
OVERLAP = 6  # frames
ASSUMED = 0.4  # of the confidence that is left where an even motion over missing frames is assumed
NAMES = {"object": "the object", "both": "the object and the hand"}


@dataclass(frozen=True)
class SfmResult:
    """Camera-from-object poses and sparse points, in one arbitrary scale."""

    cam_from_object: np.ndarray  # (F,4,4) float64, NaN where unregistered
    registered: np.ndarray  # (F,) bool
    confidence: np.ndarray  # (F,) float32 in [0,1], 0 where unregistered
    reason: np.ndarray  # (F,) str
    points: np.ndarray  # (P,3) float64, object frame
    point_colors: np.ndarray  # (P,3) uint8
    tracks: np.ndarray  # (N,2) int: (frame, point) of each observation that fits
    track_xy: np.ndarray  # (N,2) float64 pixels
    inliers: np.ndarray  # (F,) int, observations per frame that fit
    fragments: tuple[tuple[int, ...], ...]  # frames of each sub-model the mapper made, largest first
    notes: tuple[str, ...]
    halts: tuple[int, ...] = ()  # frames before missing ones over which the object would have halted


@dataclass(frozen=True)
class TwoFramePose:
    """Relative motion of the masked thing between two frames."""

    rotation: np.ndarray  # (3,3) b_from_a
    direction: np.ndarray  # (3,) unit translation of b_from_a; its length is unknown
    inliers: int
    xy_a: np.ndarray  # (N,2) matches that fit, pixels
    xy_b: np.ndarray


def two_frame_pose(
    frame_a: np.ndarray, frame_b: np.ndarray, mask_a: np.ndarray, mask_b: np.ndarray, K: np.ndarray, seed: int = 0
) -> TwoFramePose | None:
    """Relative pose of a rigid thing between two near frames (H,W,3) uint8 from dense flow and the essential matrix.

    Neighbours on real footage: 3.9 degrees off at the median; over two frames apart it fails. None when flow fails.
    """
    grey = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (frame_a, frame_b)]
    flow = pair_flow(*grey, mask_a, mask_b)
    if flow is None:
        return None
    y, x = np.nonzero(cv2.erode(mask_a.astype(np.uint8), np.ones((3, 3), np.uint8)))
    p = (np.stack([x, y], 1) + 0.5)[:: max(1, len(x) // 2000)]
    q, error = flow(p)
    h, w = mask_b.shape
    ij = np.clip(np.nan_to_num(q).astype(int), 0, [w - 1, h - 1])
    ok = (error < 0.6) & mask_b[ij[:, 1], ij[:, 0]]
    found = refine.best_essential(_normalise(p[ok], K), _normalise(q[ok], K), float(K[0, 0]), seed)
    if found is None:
        return None
    R, d, inlier = found
    return TwoFramePose(R, d, int(inlier.sum()), p[ok][inlier], q[ok][inlier])


def flow_rotation(frame_a, frame_b, mask_a, mask_b, K, seed: int = 0) -> tuple[np.ndarray, int] | None:
    """Rotation b_from_a (3,3) and its inliers; see `two_frame_pose`."""
    pose = two_frame_pose(frame_a, frame_b, mask_a, mask_b, K, seed)
    return None if pose is None else (pose.rotation, pose.inliers)


def structure_from_motion(
    frames: np.ndarray,
    masks: np.ndarray,
    K: np.ndarray,
    workdir: str | os.PathLike,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    hand_masks: np.ndarray | None = None,
    timeout: float = 900.0,
    loops: bool = True,
    merging: bool = True,
    times: np.ndarray | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    features: Features | None = None,
) -> SfmResult:
    """Poses of the object in `masks` over a clip; frames that cannot be placed are marked, never guessed.

    frames (F,H,W,3) uint8; masks (F,H,W) bool, the object's pixels; hand_masks (F,H,W) bool, the hands' pixels, tried
    as extra texture and kept when more frames agree; K (3,3) pixels, held fixed; times (F,) of the frames, evenly by
    default. `workdir` holds what passes to and
    from pycolmap. loops: let descriptors close loops and join sub-models that no track joins; merging: join sub-models
    and place single frames against them (the largest sub-model alone otherwise). meanwhile: called while pycolmap maps,
    for which it has one core. features: learned ones, matched beside SIFT and flow. When nothing registers everything
    is unregistered, with reasons, and no error is raised.
    """
    tell = progress or (lambda share, text: None)
    workdir, count = Path(workdir), len(frames)
    workdir.mkdir(parents=True, exist_ok=True)
    masks = masks.astype(bool)
    region = masks if hand_masks is None else masks | hand_masks
    tell(0.0, "following flow")
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in frames])
    regions = ["object"] if hand_masks is None else ["object", "both"]
    job = _write_job(workdir, grey, masks, region, K, regions, seed)
    with _worker(workdir) as worker:
        rows, xy = flow_tracks(grey, region, tick=lambda s: tell(0.25 * s, "following flow"))
        tracks = {"track": rows, "track_xy": xy}
        if features is not None:
            what = "matching learned features"
            tracks |= learned_matches(
                features, job, UPSAMPLE, OVERLAP, MIN_MATCHES, lambda s: tell(0.25 + 0.1 * s, what)
            )
        tell(0.25 if features is None else 0.35, "matching and mapping")
        note = _finish(worker, workdir, tracks, meanwhile, timeout)
    path = workdir / "models.npz"
    if note or not path.is_file():
        return nothing(count, note or "structure from motion left no result", ())
    z = load_npz(path)
    if not loops:  # no observation has a descriptor
        z |= {k: v[:0] for k, v in z.items() if k.endswith(("_described", "_descriptor"))}
    regions = [name for name in regions if f"{name}_poses" in z]  # the second is not tried when the first is complete
    cuts = _turned_on(z, regions, count, K, times) if times is not None else []
    made = {}
    for k, name in enumerate(regions):
        tell(0.7 + 0.3 * k / len(regions), f"joining sub-models ({name})")
        far = partial(close_by_flow, grey, masks if name == "object" else region, K) if loops else None
        made[name] = _solve(z, name, frames, K, seed, merging, cuts, far)
    chosen = "object"
    if len(regions) > 1:
        # the object is what is asked for: the hand's pixels must place clearly more frames to be believed over it
        if _agreeing(made["object"]) < 0.9 * _agreeing(made["both"]):
            chosen = "both"
        elif merging:
            made["object"] = _extend(made["object"], z, K, seed, cuts)
    tell(1.0, "poses done")
    result = made[chosen]
    notes = [f"features from: {NAMES[chosen]}", *result.notes]
    notes += [f"the object would halt at the missing frames after frame {a}: taken to turn on evenly" for a in cuts]
    return replace(result, notes=tuple(notes), halts=tuple(cuts))


def _turned_on(z: dict, regions: list[str], count: int, K: np.ndarray, times: np.ndarray) -> list[int]:
    """Mends in place the models of `z` that halt at missing frames; the last frames before those."""
    cuts: set[int] = set()
    for name in regions:
        for m in z[f"{name}_poses"]:
            bridges = gaps.false_bridges(m, np.asarray(times))
            if bridges:
                X = bundle.triangulate(m, _tracks(z, name, K, count))[0]
                m[:] = gaps.turn_on(m, bridges, np.nanmedian(X, axis=0))
            cuts |= set(bridges)
    return sorted(cuts)


def _agreeing(r: SfmResult) -> int:
    """Frames that agree with their neighbours: what speaks for a result without truth."""
    return int((r.confidence >= 0.3).sum())


def _tracks(z: dict, name: str, K: np.ndarray, count: int) -> bundle.Tracks:
    track, xy = z[f"{name}_track"], z[f"{name}_xy"]
    d = z[f"{name}_descriptor"].astype(np.float32)
    d /= np.maximum(np.linalg.norm(d, axis=1, keepdims=True), 1e-9)
    x = _normalise(xy, K)
    return bundle.Tracks(track[:, 0], track[:, 1], x, float(K[0, 0]), count, z[f"{name}_described"], d)


def _extend(r: SfmResult, z: dict, K: np.ndarray, seed: int, cuts: list[int]) -> SfmResult:
    """Place frames the object's own texture could not with the hand's as well; the others stay as they are."""
    if r.registered.all() or not r.registered.any() or not len(z["both_track"]):
        return r
    t = gaps.cut_tracks(_tracks(z, "both", K, len(r.registered)), cuts)
    essentials: dict = {}
    pieces = [p for m in z["both_poses"] for p in refine.split(m, t, essentials)]
    poses, reason = refine.grow(r.cam_from_object, pieces, t, r.reason, seed, keep=True)
    new = bundle.is_registered(poses) & ~r.registered
    trust = np.zeros(len(new))
    for (a, b), v in refine.link_agreement(poses, t, essentials).items():
        trust[a], trust[b] = max(trust[a], v), max(trust[b], v)
    _, error = bundle.triangulate(poses, t)
    n = np.bincount(t.frame[error < bundle.PIXELS], minlength=len(new))
    confidence = np.where(new, 0.7 * np.clip(trust, 0, 1) * n / (n + 20.0), r.confidence).astype(np.float32)
    inliers = np.where(new, n, r.inliers)
    return replace(
        r, cam_from_object=poses, registered=r.registered | new, confidence=confidence, reason=reason, inliers=inliers
    )


def _write_job(workdir, grey, masks, region, K, regions, seed) -> dict[str, np.ndarray]:
    """Write what pycolmap is to do; the arrays of it: per frame `corner`, and of its crop image, mask and object."""
    job: dict[str, np.ndarray] = {"corner": np.zeros((len(grey), 2), np.int64)}
    for f, g in enumerate(grey):
        y, x = np.nonzero(region[f])
        if len(x) < MIN_PIXELS:
            continue
        x0, y0 = max(x.min() - 12, 0), max(y.min() - 12, 0)
        box = np.s_[y0 : y.max() + 13, x0 : x.max() + 13]
        job[f"image{f}"] = cv2.resize(g[box], None, fx=UPSAMPLE, fy=UPSAMPLE, interpolation=cv2.INTER_CUBIC)
        job[f"mask{f}"], job[f"object{f}"] = region[f][box], masks[f][box]
        job["corner"][f] = x0, y0
    h, w = grey.shape[1:]
    cfg = {
        "seed": seed,
        "regions": regions,
        "upsample": UPSAMPLE,
        "peak_threshold": 0.003,
        "max_features": 1500,
        "overlap": OVERLAP,
        "min_matches": MIN_MATCHES,
        "size": [w * UPSAMPLE, h * UPSAMPLE],
        "camera": [float(v) * UPSAMPLE for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])],
    }
    for name in ("tracks.npz", "models.npz"):
        (workdir / name).unlink(missing_ok=True)
    save_npz(workdir / "job.npz", job)
    (workdir / "job.json").write_text(json.dumps(cfg, indent=1))
    return job


@contextlib.contextmanager
def _worker(workdir: Path) -> Iterator[subprocess.Popen]:
    """pycolmap at work on the job in `workdir`; killed at the end, if it still runs."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (source, os.environ.get("PYTHONPATH")) if p)
    # one thread: a sum whose order changes between runs changes the poses
    env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "handhold.tracking._sfm_worker", str(workdir)]
    with (workdir / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
        with worker:
            try:
                yield worker
            finally:
                worker.kill()


def _finish(worker: subprocess.Popen, workdir: Path, tracks: dict[str, np.ndarray], meanwhile, timeout: float) -> str:
    """Hand the tracks to the worker and wait; returns an empty text, or what went wrong."""
    save_npz(workdir / "tracks.npz", tracks)
    with contextlib.suppress(BrokenPipeError):  # of a worker that has failed; its code tells
        worker.stdin.write("tracks\n")
        worker.stdin.flush()
    meanwhile()
    try:
        worker.wait(timeout)
    except subprocess.TimeoutExpired:
        return f"structure from motion took more than {timeout:.0f} s"
    code = worker.returncode
    return f"structure from motion stopped with code {code}; see {workdir / 'worker.log'}" if code else ""


def _solve(
    z: dict, name: str, frames: np.ndarray, K: np.ndarray, seed: int, merging: bool, cuts: list[int], far=None
) -> SfmResult:
    """From the mapper's models of one region to one result."""
    count, models, xy = len(frames), z[f"{name}_poses"], z[f"{name}_xy"]
    fragments = tuple(tuple(int(i) for i in np.flatnonzero(bundle.is_registered(m))) for m in models)
    if not len(models) or not len(xy):
        return nothing(count, "no two frames share enough features", fragments)
    try:
        poses, trust, reason, t, notes = refine.assemble(
            models, gaps.cut_tracks(_tracks(z, name, K, count), cuts), seed, merging, cuts, far
        )
    except np.linalg.LinAlgError:
        return nothing(count, "the sub-models are degenerate: too little depth or turning", fragments)
    registered = bundle.is_registered(poses)
    if not registered.any():
        return nothing(count, "no sub-model agrees with the motion between its frames", fragments)
    X, error = bundle.triangulate(poses, t)
    fit = error < bundle.PIXELS
    xy = t.x * K[[0, 1], [0, 1]] + K[:2, 2]
    point, index = np.unique(t.track[fit], return_inverse=True)
    inliers = np.bincount(t.frame[fit], minlength=count)
    h, w = frames.shape[1:3]
    ij = np.clip(xy[fit].astype(int), 0, [w - 1, h - 1])
    color = frames[t.frame[fit], ij[:, 1], ij[:, 0]].astype(float)
    n = np.maximum(np.bincount(index, minlength=len(point)), 1)
    colors = (
        np.stack([np.bincount(index, color[:, k], minlength=len(point)) / n for k in range(3)], -1)
        .round()
        .astype(np.uint8)
    )
    confidence = np.where(registered, trust * inliers / (inliers + 20.0), 0).astype(np.float32)
    assumed = [a for a in cuts if not gaps.confirmed(t, fit, a)]
    part = np.searchsorted(assumed, np.arange(count), side="left")
    confidence[part != np.bincount(part[registered]).argmax()] *= ASSUMED
    return SfmResult(
        poses,
        registered,
        confidence,
        reason,
        X[point],
        colors,
        np.stack([t.frame[fit], index], 1),
        xy[fit],
        inliers,
        fragments,
        notes,
    )


def nothing(count: int, why: str, fragments: tuple) -> SfmResult:
    """The result of `count` frames in which nothing was placed, and why."""
    return SfmResult(
        np.full((count, 4, 4), np.nan),
        np.zeros(count, bool),
        np.zeros(count, np.float32),
        np.full(count, why),
        np.zeros((0, 3)),
        np.zeros((0, 3), np.uint8),
        np.zeros((0, 2), np.int64),
        np.zeros((0, 2)),
        np.zeros(count, np.int64),
        fragments,
        (why,),
    )


def _normalise(xy: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Pixels (N,2) -> camera coordinates at depth 1."""
    return (xy - K[:2, 2]) / np.array([K[0, 0], K[1, 1]])
