"""From the mapper's sub-models to one: split where neighbours disagree, merge in time order, register the rest, adjust.

Everything works on tracks: observations (frame, track, xy). `x` below is xy in normalised camera coordinates (z = 1),
so an error in pixels is a difference times the focal length. Poses are cam_from_object (F,4,4), NaN if unregistered.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from ._sfm_loops import across, close

PIXELS = 2.5  # an observation fits when it is this close
MIN_ANGLE = np.radians(2.0)  # smallest angle between rays that makes a point
MIN_PNP = 12


@dataclass(frozen=True)
class Tracks:
    """Observations of one clip."""

    frame: np.ndarray  # (N,) int
    track: np.ndarray  # (N,) int
    x: np.ndarray  # (N,2) normalised
    focal: float
    frames: int
    row: np.ndarray  # (N,) the observation's number in the caller's arrays
    described: np.ndarray  # (M,) rows of the observations that have a SIFT descriptor
    descriptor: np.ndarray  # (M,128) float32, unit length

    @property
    def count(self) -> int:
        return int(self.track.max()) + 1 if len(self.track) else 0

    def common(self, a: int, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the observations that frames a and b share."""
        i, j = np.flatnonzero(self.frame == a), np.flatnonzero(self.frame == b)
        _, k, l = np.intersect1d(self.track[i], self.track[j], return_indices=True)
        return i[k], j[l]


def is_registered(poses: np.ndarray) -> np.ndarray:
    return np.isfinite(poses[:, 0, 0])


def triangulate(poses: np.ndarray, t: Tracks) -> tuple[np.ndarray, np.ndarray]:
    """Robust multi-view points (P,3), NaN where there is none, and each observation's error (N,) in pixels, or inf.

    Linear triangulation, reweighted three times by a Cauchy weight: one wrong link does not carry its track away.
    """
    used = is_registered(poses)[t.frame]
    row = np.flatnonzero(used)
    P, id_, x = poses[t.frame[row]], t.track[row], t.x[row]
    a = x[:, :, None] * P[:, 2:3, :] - P[:, :2, :]  # (N,2,4)
    weight, n = np.ones(len(row)), t.count
    X = np.full((n, 3), np.nan)
    error = np.full(len(t.frame), np.inf)
    seen = np.bincount(id_, minlength=n) >= 2
    if not seen.any():
        return X, error
    for _ in range(4):
        ata = np.einsum("nij,nik->njk", a * weight[:, None, None], a)
        sums = np.stack([np.bincount(id_, ata[:, i, j], minlength=n) for i in range(4) for j in range(4)], -1).reshape(
            n, 4, 4
        )
        v = np.linalg.eigh(sums[seen])[1][..., 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            X[seen] = v[:, :3] / v[:, 3:]
        e, depth = _errors(P, X[id_], x, t.focal)
        weight = 1 / (1 + (np.minimum(e, 1e4) / PIXELS) ** 2) / np.maximum(depth, 1e-9) ** 2
        weight[~(depth > 0)] = 1e-12
    good = (e < 2 * PIXELS) & (depth > 0)
    # a point needs two frames that fit it under an angle
    centre = -np.einsum("nji,nj->ni", P[:, :3, :3], P[:, :3, 3])
    ray = X[id_] - centre
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    hits = np.bincount(id_[good], minlength=n)
    mean = np.stack([np.bincount(id_[good], ray[good, k], minlength=n) for k in range(3)], -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        off = np.arccos(np.clip((ray * mean[id_]).sum(1), -1, 1))
    widest = np.zeros(n)
    np.maximum.at(widest, id_[good], off[good])
    total = np.maximum(np.bincount(id_, minlength=n), 1)
    ok = (hits >= 2) & (2 * widest > MIN_ANGLE) & (hits / total > 0.5)
    X[~ok] = np.nan
    error[row] = np.where(ok[id_] & (depth > 0), e, np.inf)
    return X, error


def _errors(P: np.ndarray, X: np.ndarray, x: np.ndarray, focal: float) -> tuple[np.ndarray, np.ndarray]:
    c = np.einsum("nij,nj->ni", P[:, :3, :3], X) + P[:, :3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.linalg.norm(c[:, :2] / c[:, 2:] - x, axis=1) * focal
    return np.where(c[:, 2] > 0, e, 1e6), c[:, 2]


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
            out[a, b] = float((epipolar_error(T, t.x[i], t.x[j]) * t.focal < 1.5).sum() / essentials[a, b])
    return out


def split(poses: np.ndarray, t: Tracks, essentials: dict, bar: float = 0.6) -> list[np.ndarray]:
    """Pieces of a model whose near frames agree, most frames first; a single frame is no piece."""
    good = [k for k, v in link_agreement(poses, t, essentials).items() if v >= bar]
    if not good:
        return []
    i, j = np.array(good).T
    label = connected_components(sparse.coo_matrix((np.ones(len(i)), (i, j)), shape=(t.frames,) * 2), directed=False)[1]
    pieces = []
    for l in np.unique(label[np.unique([i, j])]):
        piece = np.where((label == l)[:, None, None], poses, np.nan)
        pieces.append(piece)
    return sorted(pieces, key=lambda p: -is_registered(p).sum())


def select(t: Tracks, mine: np.ndarray) -> Tracks:
    """The observations `mine` (N,) bool alone, without descriptors."""
    none = np.zeros(0, np.int64)
    return Tracks(
        t.frame[mine], t.track[mine], t.x[mine], t.focal, t.frames, t.row[mine], none, np.zeros((0, 128), np.float32)
    )


def resect(f: int, X: np.ndarray, t: Tracks, seed: int = 0) -> tuple[np.ndarray, int, float] | None:
    """Pose of frame f from points that other frames made: (4,4), inliers and their share; None when too few agree."""
    row = np.flatnonzero(t.frame == f)
    row = row[np.isfinite(X[t.track[row], 0])]
    return pnp(X[t.track[row]], t.x[row], t.focal, seed + f)


def pnp(obj: np.ndarray, img: np.ndarray, focal: float, seed: int) -> tuple[np.ndarray, int, float] | None:
    """Pose from points (N,3) and their normalised images (N,2): (4,4), inliers and their share; None when too few agree."""
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
    e, _ = _errors(np.broadcast_to(pose, (len(obj), 4, 4)), obj, img, focal)
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
    """Whether a hand could turn the object from one model to the other in the frames between: look-alike sides fail here."""
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
        at = at[_errors(np.broadcast_to(pose, (len(at), 4, 4)), X[point[at]], t.x[row[at]], t.focal)[0] < 2 * PIXELS]
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
        e1, _ = _errors(moved[t.frame[row[other]]], X[point[other]], t.x[row[other]], t.focal)
        e2, _ = _errors(base[t.frame[back]], Ym[t.track[back]], t.x[back], t.focal)
        e = np.concatenate([e1, e2])
        fits, share = (e < 2.5 * PIXELS).sum(), (e < 2.5 * PIXELS).mean() if len(e) else 0.0
        # descriptors alone are mostly wrong: count what fits, which chance does to one in a hundred, and ask time
        enough = share > 0.35 if not loop else share > 0.08 and fits >= 30 and joins(base, moved)
        if fits >= 2 * MIN_PNP and enough and fits > best:
            best, found = fits, moved
    return found


def adjust(
    poses: np.ndarray, X: np.ndarray, t: Tracks, error: np.ndarray, rounds: int = 12, per_frame: int = 150
) -> np.ndarray:
    """Bundle adjustment: Levenberg-Marquardt, Schur complement, Cauchy loss (1 pixel), rotations updated on SO(3).

    Only each frame's `per_frame` longest tracks take part: more adds time, not exactness. Returns the poses.
    """
    row = np.flatnonzero((error < 3 * PIXELS) & np.isfinite(X[t.track, 0]))
    if len(row) < 30:
        return poses
    length = np.bincount(t.track[row], minlength=t.count)
    order = np.lexsort((t.track[row], -length[t.track[row]], t.frame[row]))
    start = np.r_[0, np.cumsum(np.bincount(t.frame[row], minlength=t.frames))]
    rank = np.empty(len(row), int)
    rank[order] = np.arange(len(row)) - start[t.frame[row[order]]]
    chosen = np.zeros(t.count, bool)
    chosen[t.track[row[rank < per_frame]]] = True
    row = row[chosen[t.track[row]] & (length[t.track[row]] >= 2)]
    cams, c = np.unique(t.frame[row], return_inverse=True)
    pts, p = np.unique(t.track[row], return_inverse=True)
    R, d, Y, x = poses[cams, :3, :3].copy(), poses[cams, :3, 3].copy(), X[pts].copy(), t.x[row]
    nc, npt, n = len(cams), len(pts), len(row)

    def residual(R, d, Y):
        q = np.einsum("nij,nj->ni", R[c], Y[p])
        z = q + d[c]
        z[:, 2] = np.where(np.abs(z[:, 2]) < 1e-9, 1e-9, z[:, 2])
        return q, z, (z[:, :2] / z[:, 2:] - x) * t.focal

    def cost(r):
        return np.log1p((r**2).sum(1)).sum()

    q, z, r = residual(R, d, Y)
    now, damp = cost(r), 1e-3
    rows = np.repeat(np.arange(2 * n).reshape(n, 2, 1), 6, 2)
    cols_a = np.broadcast_to(6 * c[:, None, None] + np.arange(6), (n, 2, 6))
    cols_b = np.broadcast_to(3 * p[:, None, None] + np.arange(3), (n, 2, 3))
    for _ in range(rounds):
        w = np.sqrt(1 / (1 + (r**2).sum(1)))[:, None]
        iz = t.focal / z[:, 2]
        J = np.zeros((n, 2, 3))
        J[:, 0, 0] = J[:, 1, 1] = iz
        J[:, :, 2] = -z[:, :2] / z[:, 2:] * iz[:, None]
        J *= w[..., None]
        skew = np.zeros((n, 3, 3))
        skew[:, 0, 1], skew[:, 0, 2], skew[:, 1, 2] = q[:, 2], -q[:, 1], q[:, 0]
        skew -= skew.transpose(0, 2, 1)
        A = np.concatenate([J @ skew, J], 2)  # d(exp(w) R Y)/dw = -[R Y]x
        B = J @ R[c]
        Ja = sparse.csr_matrix((A.ravel(), (rows.ravel(), cols_a.ravel())), shape=(2 * n, 6 * nc))
        Jb = sparse.csr_matrix((B.ravel(), (rows[:, :, :3].ravel(), cols_b.ravel())), shape=(2 * n, 3 * npt))
        wr = (r * w).ravel()
        U, W = (Ja.T @ Ja).toarray(), (Ja.T @ Jb).tocsr()
        ga, gb = -Ja.T @ wr, -Jb.T @ wr
        BB = np.einsum("nij,nik->njk", B, B).reshape(n, 9)
        V = np.stack([np.bincount(p, BB[:, k], minlength=npt) for k in range(9)], -1).reshape(npt, 3, 3)
        done = True
        for _ in range(6):
            i3 = np.arange(3)
            Vd = V.copy()
            Vd[:, i3, i3] = Vd[:, i3, i3] * (1 + damp) + 1e-9
            Vi = sparse.bsr_matrix(
                (np.linalg.inv(Vd), np.arange(npt), np.arange(npt + 1)), shape=(3 * npt, 3 * npt)
            ).tocsr()
            WV = W @ Vi
            S = U - (WV @ W.T).toarray()
            S[np.diag_indices(6 * nc)] += damp * np.diag(U) + 1e-9
            try:
                da = cho_solve(cho_factor(S), ga - WV @ gb)
            except np.linalg.LinAlgError:
                damp *= 10
                continue
            db = Vi @ (gb - W.T @ da)
            step = da.reshape(nc, 6)
            R2, d2, Y2 = Rotation.from_rotvec(step[:, :3]).as_matrix() @ R, d + step[:, 3:], Y + db.reshape(npt, 3)
            q2, z2, r2 = residual(R2, d2, Y2)
            new = cost(r2)
            if new < now:
                done = (now - new) < 1e-4 * now
                R, d, Y, q, z, r, now, damp = R2, d2, Y2, q2, z2, r2, new, max(damp / 5, 1e-8)
                break
            damp *= 5
        if done:
            break
    out = poses.copy()
    out[cams, :3, :3], out[cams, :3, 3] = R, d
    return out


def assemble(
    models: np.ndarray, t: Tracks, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Tracks, tuple[str, ...]]:
    """Sub-models (M,F,4,4) -> poses (F,4,4), trust (F,) in [0,1], reason (F,) str, tracks with loops closed, notes."""
    essentials: dict = {}
    notes: list[str] = []
    pieces = [p for m in models for p in split(m, t, essentials)]
    pieces.sort(key=lambda p: -is_registered(p).sum())
    reason = np.full(t.frames, "not registered", dtype="<U64")
    if not pieces:
        return np.full((t.frames, 4, 4), np.nan), np.zeros(t.frames), reason, t, ()
    if len(pieces) > len(models):
        notes.append(f"{len(models)} sub-models cut into {len(pieces)} where neighbours disagree")
    poses = pieces.pop(0)
    reason[is_registered(poses)] = "sfm"
    poses, reason = grow(_polish(poses, t, 6), pieces, t, reason, seed)
    poses = _polish(poses, t, 12)
    for radius in (18.0, 8.0):
        t, joined = close(poses, triangulate(poses, t)[0], t, radius)
        poses = _polish(poses, t, 15)
        notes.append(f"{joined} loops closed within {radius:.0f} pixels")
    return _check(poses, t, essentials, reason, notes, seed)


def grow(
    poses: np.ndarray, pieces: list[np.ndarray], t: Tracks, reason: np.ndarray, seed: int = 0, keep: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Add pieces by similarity and single frames by PnP until nothing fits any more; returns poses and reasons.

    `keep` holds the poses that were there: then only new ones are found, and nothing is adjusted.
    """
    poses, reason, since = poses.copy(), reason.copy(), 0
    word = "sfm: hand's texture" if keep else "sfm: registered by flow"
    for _ in range(2 * t.frames):
        X, _ = triangulate(poses, t)
        here = is_registered(poses)
        pieces = [p for p in pieces if (is_registered(p) & ~here).any()]
        moved = next((m for m in (merge(poses, p, X, t) for p in pieces) if m is not None), None)
        if moved is not None:
            new = is_registered(moved) & ~here
            poses[new], reason[new] = moved[new], word if keep else "sfm: merged sub-model"
            poses, since = poses if keep else _polish(poses, t, 6), 0
            continue
        near = [f for f in np.flatnonzero(~here) if here[max(0, f - 4) : f + 5].any()]
        got = [(f, *r) for f in near if (r := resect(f, X, t, seed)) is not None and plausible(f, r[0], poses)]
        got = sorted((g for g in got if g[3] >= 0.3), key=lambda g: -g[2])
        if not got:
            break
        # sure ones together; an unsure one alone, so that the next starts from better points
        sure = [g for g in got if g[3] >= 0.6 and g[2] >= 30][:4] or got[:1]
        for f, pose, _, _ in sure:
            poses[f], reason[f] = pose, word
        since += len(sure)
        if since >= 6 and not keep:
            poses, since = _polish(poses, t, 5), 0
    return poses, reason


def _polish(poses: np.ndarray, t: Tracks, rounds: int) -> np.ndarray:
    X, error = triangulate(poses, t)
    return adjust(poses, X, t, error, rounds)


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


def _check(poses, t, essentials, reason, notes, seed):
    """Frames that the largest agreeing piece does not hold are registered again, or marked, or dropped."""
    pieces = split(poses, t, essentials)
    if not pieces:
        return (
            np.full_like(poses, np.nan),
            np.zeros(t.frames),
            np.full_like(reason, "disagrees with its neighbours"),
            t,
            tuple(notes),
        )
    core = pieces[0]
    X, _ = triangulate(core, t)
    out = core.copy()
    for f in np.flatnonzero(~is_registered(core)):
        got = resect(f, X, t, seed)
        if got is not None and got[2] >= 0.4 and plausible(f, got[0], core):
            out[f], reason[f] = got[0], "sfm: registered by flow"
    for p in pieces[1:]:
        left = is_registered(p) & ~is_registered(out)
        out[left], reason[left] = p[left], "sfm: its link to the rest disagrees"
    lost = is_registered(poses) & ~is_registered(out)
    reason[lost] = "disagrees with its neighbours"
    out = _mend_jumps(_polish(out, t, 8), t, seed)
    out = _polish(out, t, 5)
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
