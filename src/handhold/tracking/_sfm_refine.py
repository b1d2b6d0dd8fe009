"""From the mapper's sub-models to one: split where neighbours disagree, merge in time order, register the rest, adjust.

Poses are cam_from_object (F,4,4), NaN if unregistered; tracks and points are those of `_sfm_bundle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from ._sfm_bundle import PIXELS, Tracks, adjust, errors, is_registered, select, triangulate
from ._sfm_loops import across, close

MIN_PNP = 12
FINE = (
    0.3  # pixels, Cauchy scale of the last adjustments: flow has long tails (nearly symmetric tin: 1.8 to 1.1 degrees)
)


def epipolar_error(b_from_a: np.ndarray, xa: np.ndarray, xb: np.ndarray) -> np.ndarray:
    """Sampson distance (N,) of normalised points under a relative pose (Hartley & Zisserman 11.9); units of x."""
    tx, ty, tz = b_from_a[:3, 3]
    E = np.array([[0, -tz, ty], [tz, 0, -tx], [-ty, tx, 0]]) @ b_from_a[:3, :3]
    a, b = np.c_[xa, np.ones(len(xa))], np.c_[xb, np.ones(len(xb))]
    ea, eb = a @ E.T, b @ E
    return np.abs((b * ea).sum(1)) / np.sqrt((ea[:, :2] ** 2).sum(1) + (eb[:, :2] ** 2).sum(1) + 1e-18)


def best_essential(xa: np.ndarray, xb: np.ndarray, focal: float, seed: int = 0, pixels: float = 0.7):
    """MAGSAC essential matrix on normalised points: (R, t direction, inliers (N,) bool), or None when there is none."""
    if len(xa) < 8:
        return None
    cv2.setRNGSeed(seed)
    a, b = np.ascontiguousarray(xa), np.ascontiguousarray(xb)
    try:
        E, inlier = cv2.findEssentialMat(a, b, np.eye(3), method=cv2.USAC_MAGSAC, prob=0.999, threshold=pixels / focal)
        if E is None or E.shape != (3, 3):
            return None
        _, R, d, _ = cv2.recoverPose(E, a, b, np.eye(3), mask=inlier.copy())
    except cv2.error:
        return None
    return R, d[:, 0], inlier[:, 0] > 0


def link_agreement(poses: np.ndarray, t: Tracks, essentials: dict, reach: int = 3) -> dict[tuple[int, int], float]:
    """For near registered frames: matches that fit the model's relative pose / those that fit the best two-view pose.

    A bent or look-alike model breaks somewhere in time, and there this ratio falls: the test needs no truth.
    """
    return {k: v for k, (v, _) in _links(poses, t, essentials, reach).items()}


def _links(poses: np.ndarray, t: Tracks, essentials: dict, reach: int = 3) -> dict[tuple[int, int], tuple[float, int]]:
    """`link_agreement`, and how many matches each pair of frames has."""
    ok, out = is_registered(poses), {}
    for a in range(t.frames):
        for b in range(a + 1, min(a + reach, t.frames - 1) + 1):
            if not (ok[a] and ok[b]):
                continue
            i, j = t.common(a, b)
            if len(i) < 15:
                continue
            if (a, b) not in essentials:
                found = best_essential(t.x[i], t.x[j], t.focal)
                if found is not None:
                    R, d, _ = found
                    T = np.eye(4)
                    T[:3, :3], T[:3, 3] = R, d
                    found = int((epipolar_error(T, t.x[i], t.x[j]) * t.focal < 1.5).sum())
                essentials[a, b] = found
            if not essentials[a, b]:
                continue
            T = poses[b] @ np.linalg.inv(poses[a])
            fit = (epipolar_error(T, t.x[i], t.x[j]) * t.focal < 1.5).sum()
            out[a, b] = float(fit / essentials[a, b]), len(i)
    return out


def split(
    poses: np.ndarray, t: Tracks, essentials: dict, bar: float = 0.6, broken: float = 0.35, bridges: Sequence[int] = ()
) -> list[np.ndarray]:
    """Pieces of a model whose near frames agree, most frames first; a single frame is no piece.

    Between two frames in time where most matches contradict the model (their mean agreement is under `broken`) there is
    a cut, even if a pair around it agrees: look-alike faces can fit a few matches. The model goes on over the gaps
    after frames `bridges` without any match.
    """
    links = _links(poses, t, essentials)
    fit, matches = np.zeros(t.frames), np.zeros(t.frames)
    for (i, j), (v, n) in links.items():
        fit[i:j] += n * min(v, 1.0)
        matches[i:j] += n
    cut = fit < broken * matches
    good = [(i, j) for (i, j), (v, _) in links.items() if v >= bar and not cut[i:j].any()]
    good += [(a, a + 1) for a in bridges if is_registered(poses)[[a, a + 1]].all()]
    if not good:
        return []
    i, j = np.array(good).T
    label = connected_components(sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(t.frames,) * 2), directed=False)[1]
    pieces = []
    for l in np.unique(label[np.unique([i, j])]):
        piece = np.where((label == l)[:, None, None], poses, np.nan)
        pieces.append(piece)
    return sorted(pieces, key=lambda p: -is_registered(p).sum())


def resect(f: int, X: np.ndarray, t: Tracks, seed: int = 0) -> tuple[np.ndarray, int, float] | None:
    """Pose of frame f from points that other frames made: (4,4), inliers and their share; None when too few agree."""
    row = np.flatnonzero(t.frame == f)
    row = row[np.isfinite(X[t.track[row], 0])]
    return pnp(X[t.track[row]], t.x[row], t.focal, seed + f)


def pnp(obj: np.ndarray, img: np.ndarray, focal: float, seed: int) -> tuple[np.ndarray, int, float] | None:
    """Pose from points (N,3) and their normalised images (N,2): (4,4), inliers, share; None when too few agree."""
    if len(obj) < MIN_PNP:
        return None
    img = np.ascontiguousarray(img)
    cv2.setRNGSeed(seed)
    try:
        found, r, d, inlier = cv2.solvePnPRansac(
            obj,
            img,
            np.eye(3),
            None,
            iterationsCount=500,
            reprojectionError=PIXELS / focal,
            confidence=0.9999,
            flags=cv2.SOLVEPNP_EPNP,
        )
        if not found or inlier is None or len(inlier) < MIN_PNP:
            return None
        r, d = cv2.solvePnPRefineLM(obj[inlier[:, 0]], img[inlier[:, 0]], np.eye(3), None, r, d)
    except cv2.error:
        return None
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = cv2.Rodrigues(r)[0], d[:, 0]
    e, _ = errors(np.broadcast_to(pose, (len(obj), 4, 4)), obj, img, focal)
    n = int((e < PIXELS).sum())
    return (pose, n, n / len(obj)) if n >= MIN_PNP and pose[2, 3] > 0 else None


def plausible(f: int, pose: np.ndarray, poses: np.ndarray, degrees_per_frame: float = 40.0) -> bool:
    """No jump against the nearest registered frame: a hand turns a thing by less, and depth changes less."""
    near = np.flatnonzero(is_registered(poses))
    near = near[near != f]
    if not len(near):
        return True
    g = near[np.argmin(np.abs(near - f))]
    if abs(g - f) > 4:
        return True
    turn = Rotation.from_matrix(pose[:3, :3] @ poses[g, :3, :3].T).magnitude()
    return np.degrees(turn) < degrees_per_frame * abs(g - f) and 0.6 < pose[2, 3] / poses[g, 2, 3] < 1.6


def joins(base: np.ndarray, moved: np.ndarray, degrees_per_frame: float = 30.0) -> bool:
    """Whether a hand could turn the object from one model to the other in between: look-alike sides fail here."""
    a, b = np.flatnonzero(is_registered(base)), np.flatnonzero(is_registered(moved))
    gap = np.abs(a[:, None] - b[None])
    i, j = np.unravel_index(np.argmin(gap), gap.shape)
    turn = Rotation.from_matrix(base[a[i], :3, :3] @ moved[b[j], :3, :3].T).magnitude()
    near = 0.5 < base[a[i], 2, 3] / moved[b[j], 2, 3] < 2
    return near and np.degrees(turn) < min(degrees_per_frame * max(gap[i, j], 1), 150)


def merge(base: np.ndarray, piece: np.ndarray, X: np.ndarray, t: Tracks) -> np.ndarray | None:
    """`piece` moved into `base` by the similarity of one shared (or resected) frame, the one most agree on; or None."""
    Y, _ = triangulate(piece, t)
    best, found = 0.0, None
    in_base, in_piece = is_registered(base), is_registered(piece)
    reach = np.flatnonzero(in_piece)
    row = np.flatnonzero(in_piece[t.frame] & np.isfinite(X[t.track, 0]))
    back = np.flatnonzero(in_base[t.frame] & np.isfinite(Y[t.track, 0]))
    point, loop = t.track[row], 0
    if len(row) + len(back) < 2 * MIN_PNP:
        back = back[:0]
        row, point = across(in_base, in_piece, X, t)
        loop = len(row)
        if loop < 2 * MIN_PNP:
            return None
    for f in reach:
        pose = base[f] if in_base[f] else None
        if pose is None:
            at = t.frame[row] == f
            got = pnp(X[point[at]], t.x[row[at]], t.focal, int(f))
            if got is None:
                continue
            pose = got[0]
        mine = t.track[t.frame == f]
        mine = mine[np.isfinite(Y[mine, 0])]
        at = np.flatnonzero((t.frame[row] == f) & np.isfinite(Y[t.track[row], 0]))
        at = at[errors(np.broadcast_to(pose, (len(at), 4, 4)), X[point[at]], t.x[row[at]], t.focal)[0] < 2 * PIXELS]
        if len(at) >= 5:
            za = X[point[at]] @ pose[2, :3] + pose[2, 3]
            s = np.median(za / (Y[t.track[row[at]]] @ piece[f, 2, :3] + piece[f, 2, 3]))
        elif len(mine) >= 5 and not loop:
            s = pose[2, 3] / np.median(Y[mine] @ piece[f, 2, :3] + piece[f, 2, 3])
        else:
            continue
        if not np.isfinite(s) or s <= 0:
            continue
        moved = piece.copy()
        rel = piece[reach, :3, :3] @ piece[f, :3, :3].T
        moved[reach, :3, :3] = rel @ pose[:3, :3]
        moved[reach, :3, 3] = np.einsum("nij,j->ni", rel, pose[:3, 3] - s * piece[f, :3, 3]) + s * piece[reach, :3, 3]
        Ym = ((s * (Y @ piece[f, :3, :3].T + piece[f, :3, 3])) - pose[:3, 3]) @ pose[:3, :3]
        other = t.frame[row] != f
        e1, _ = errors(moved[t.frame[row[other]]], X[point[other]], t.x[row[other]], t.focal)
        e2, _ = errors(base[t.frame[back]], Ym[t.track[back]], t.x[back], t.focal)
        e = np.concatenate([e1, e2])
        fits, share = (e < 2.5 * PIXELS).sum(), (e < 2.5 * PIXELS).mean() if len(e) else 0.0
        # descriptors alone are mostly wrong: count what fits, which chance does to one in a hundred, and ask time
        enough = share > 0.35 if not loop else share > 0.08 and fits >= 30 and joins(base, moved)
        if fits >= 2 * MIN_PNP and enough and fits > best:
            best, found = fits, moved
    return found


def assemble(
    models: np.ndarray,
    t: Tracks,
    seed: int = 0,
    merging: bool = True,
    bridges: Sequence[int] = (),
    far: Callable[[np.ndarray, np.ndarray, Tracks], tuple[Tracks, int]] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tracks, tuple[str, ...]]:
    """Sub-models (M,F,4,4) -> poses (F,4,4), trust (F,) in [0,1], reason (F,) str, tracks with loops closed, notes.

    merging: join sub-models and place single frames; False keeps the largest piece alone; bridges: see `split`; far:
    `_sfm_far.close_by_flow` of the clip.
    """
    essentials: dict = {}
    notes: list[str] = []
    pieces = [p for m in models for p in split(m, t, essentials, bridges=bridges)]
    pieces.sort(key=lambda p: -is_registered(p).sum())
    reason = np.full(t.frames, "not registered", dtype="<U64")
    if not pieces:
        return np.full((t.frames, 4, 4), np.nan), np.zeros(t.frames), reason, t, ()
    if len(pieces) > len(models):
        notes.append(f"{len(models)} sub-models cut into {len(pieces)} where neighbours disagree")
    poses = pieces.pop(0)
    reason[is_registered(poses)] = "sfm"
    poses = _polish(poses, t, 6)
    if merging:
        poses, reason = grow(poses, pieces, t, reason, seed)
    poses = _polish(poses, t, 12)
    for radius in (18.0, 8.0):
        t, joined = close(poses, triangulate(poses, t)[0], t, radius)
        poses = _polish(poses, t, 15, FINE)
        notes.append(f"{joined} loops closed within {radius:.0f} pixels")
    if far is not None:
        t, joined = far(poses, triangulate(poses, t)[0], t)
        if joined:
            poses = _polish(poses, t, 15, FINE)
            notes.append(f"{joined} points found in frames far apart by flow")
    return _check(poses, t, essentials, reason, notes, seed, merging, bridges)


def grow(
    poses: np.ndarray, pieces: list[np.ndarray], t: Tracks, reason: np.ndarray, seed: int = 0, keep: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Add pieces by similarity and single frames by PnP until nothing fits any more; returns poses and reasons.

    `keep` holds the poses that were there: then only new ones are found, and nothing is adjusted.
    """
    poses, reason, since = poses.copy(), reason.copy(), 0
    retry, tried = 0.0, 0
    word = "sfm: hand's texture" if keep else "sfm: registered by flow"
    for _ in range(2 * t.frames):
        X, _ = triangulate(poses, t)
        here = is_registered(poses)
        pieces = [p for p in pieces if (is_registered(p) & ~here).any()]
        moved = None
        if here.sum() >= retry:
            moved = next((m for m in (merge(poses, p, X, t) for p in pieces) if m is not None), None)
            tried = here.sum()
            retry = tried if moved is not None else 1.1 * tried + 1  # what did not fit needs a larger model first
        if moved is not None:
            new = is_registered(moved) & ~here
            poses[new], reason[new] = moved[new], word if keep else "sfm: merged sub-model"
            poses, since = poses if keep else _polish(poses, t, 6), 0
            continue
        near = [f for f in np.flatnonzero(~here) if here[max(0, f - 4) : f + 5].any()]
        got = [(f, *r) for f in near if (r := resect(f, X, t, seed)) is not None and plausible(f, r[0], poses)]
        got = sorted((g for g in got if g[3] >= 0.3), key=lambda g: -g[2])
        if not got and tried == here.sum():
            break
        if not got:
            retry = 0
            continue
        # sure ones together; an unsure one alone, so that the next starts from better points
        sure = [g for g in got if g[3] >= 0.6 and g[2] >= 30][:4] or got[:1]
        for f, pose, _, _ in sure:
            poses[f], reason[f] = pose, word
        since += len(sure)
        if since >= 6 and not keep:
            poses, since = _polish(poses, t, 5), 0
    return poses, reason


def _polish(poses: np.ndarray, t: Tracks, rounds: int, scale: float = 1.0) -> np.ndarray:
    X, error = triangulate(poses, t)
    return adjust(poses, X, t, error, rounds, scale=scale)


def motion_surprise(poses: np.ndarray) -> np.ndarray:
    """Degrees (F,) between each rotation and what constant turning predicts from the frames around it; 0 if unknown.

    The least of three predictions counts: from either side, and from both. Two views of one flat face allow a
    second, wrong motion that fits them nearly as well (Longuet-Higgins 1986); time tells the two apart.
    """
    at = np.flatnonzero(is_registered(poses))
    out = np.zeros(len(poses))
    R = poses[:, :3, :3]
    for k, f in enumerate(at):
        near = at[max(0, k - 2) : k + 3]
        near = near[(near != f) & (np.abs(near - f) <= 3)]
        guesses = []
        for a, b in (
            (near[near < f][-1:], near[near > f][:1]),
            (near[near < f][-2:], None),
            (near[near > f][:2], None),
        ):
            pair = np.concatenate([a, b]) if b is not None else a
            if len(pair) == 2:
                a, b = pair
                turn = Rotation.from_matrix(R[b] @ R[a].T).as_rotvec() * (f - a) / (b - a)
                guesses.append(Rotation.from_rotvec(turn).as_matrix() @ R[a])
        if guesses:
            out[f] = min(np.degrees(Rotation.from_matrix(g @ R[f].T).magnitude()) for g in guesses)
    return out


def _mend_jumps(poses: np.ndarray, t: Tracks, seed: int) -> np.ndarray:
    """Frames that turn suddenly are resected from the other frames' points, and changed when that is calmer."""
    surprise = motion_surprise(poses)
    here = is_registered(poses)
    bar = max(12.0, 5 * np.median(surprise[here])) if here.any() else 12.0
    out = poses.copy()
    for f in np.flatnonzero(surprise > bar):
        rest = poses.copy()
        rest[f] = np.nan
        mine = np.isin(t.track, t.track[t.frame == f])
        part = select(t, mine)
        got = resect(f, triangulate(rest, part)[0], part, seed)
        if got is not None:
            rest[f] = got[0]
            if motion_surprise(rest)[f] < 0.6 * surprise[f]:
                out[f] = got[0]
    return out


def _joined_by_loops(pieces: list, poses: np.ndarray, t: Tracks, essentials: dict, bar: float = 0.6) -> np.ndarray:
    """The largest piece, with those that share enough points with it and that no near frames contradict."""
    links = link_agreement(poses, t, essentials)
    _, error = triangulate(poses, t)
    fit = error < PIXELS
    core, rest = pieces[0], list(pieces[1:])
    while rest:
        here = is_registered(core)
        seen = np.unique(t.track[fit & here[t.frame]])
        for k, p in enumerate(rest):
            mine = is_registered(p)
            near = [v for (a, b), v in links.items() if (here[a] and mine[b]) or (mine[a] and here[b])]
            shared = np.intersect1d(seen, t.track[fit & mine[t.frame]])
            if len(shared) >= 20 and (not near or np.median(near) >= bar):
                core = np.where(mine[:, None, None], p, core)
                rest.pop(k)
                break
        else:
            break
    return core


def _check(poses, t, essentials, reason, notes, seed, merging=True, bridges=()):
    """Frames that the largest agreeing piece does not hold are registered again, or marked, or dropped."""
    pieces = split(poses, t, essentials, bridges=bridges)
    if not pieces:
        return (
            np.full_like(poses, np.nan),
            np.zeros(t.frames),
            np.full_like(reason, "disagrees with its neighbours"),
            t,
            tuple(notes),
        )
    core = _joined_by_loops(pieces, poses, t, essentials)
    X, _ = triangulate(core, t)
    out = core.copy()
    for f in np.flatnonzero(~is_registered(core) & merging):
        got = resect(f, X, t, seed)
        if got is not None and got[2] >= 0.4 and plausible(f, got[0], core):
            out[f], reason[f] = got[0], "sfm: registered by flow"
    for p in pieces:
        left = is_registered(p) & ~is_registered(out)
        out[left], reason[left] = p[left], "sfm: its link to the rest disagrees"
    lost = is_registered(poses) & ~is_registered(out)
    reason[lost] = "disagrees with its neighbours"
    out = _mend_jumps(_polish(out, t, 8, FINE), t, seed)
    out = _polish(out, t, 8, FINE)
    jumps = motion_surprise(out)
    here = is_registered(out)
    jumps = jumps > max(12.0, 5 * np.median(jumps[here]))
    links = link_agreement(out, t, essentials)
    trust = np.zeros(t.frames)
    for (a, b), v in links.items():  # a frame is as good as its best two links
        trust[a], trust[b] = max(trust[a], v), max(trust[b], v)
    trust = np.clip(trust, 0, 1)
    apart = is_registered(out) & ~is_registered(core) & (reason == "sfm: its link to the rest disagrees")
    trust[apart] *= 0.25
    trust[jumps] *= 0.4
    reason[jumps] = "sfm: turns suddenly"
    alone = is_registered(out) & (trust == 0)
    trust[alone] = 0.3
    reason[alone] = "sfm: few features shared with neighbours"
    trust[~is_registered(out)] = 0
    if lost.any():
        notes.append(f"{int(lost.sum())} frames were dropped because they disagree with their neighbours")
    return out, trust, reason, t, tuple(notes)
