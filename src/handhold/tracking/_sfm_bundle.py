"""Tracks, robust triangulation and bundle adjustment, in numpy: small problems, one thread, the same numbers each time.

`x` is an observation's xy in normalised camera coordinates (z = 1): an error in pixels is a difference times the focal
length. Poses are cam_from_object (F,4,4), NaN if unregistered.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.transform import Rotation

from ..parallel import cores, each

PIXELS = 2.5  # an observation fits when it is this close
MIN_ANGLE = np.radians(2.0)  # smallest angle between rays that makes a point


@dataclass(frozen=True)
class Tracks:
    """Observations of one clip."""

    frame: np.ndarray  # (N,) int
    track: np.ndarray  # (N,) int
    x: np.ndarray  # (N,2) normalised
    focal: float
    frames: int
    described: np.ndarray  # (M,) rows of the observations that have a SIFT descriptor
    descriptor: np.ndarray  # (M,128) float32, unit length
    min_angle: float = MIN_ANGLE  # radians; see there

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
    a = np.ascontiguousarray((x[:, :, None] * P[:, 2:3, :] - P[:, :2, :]).transpose(1, 2, 0))  # (2,4,N)
    weight, n = np.ones(len(row)), t.count
    X = np.full((n, 3), np.nan)
    error = np.full(len(t.frame), np.inf)
    seen = np.bincount(id_, minlength=n) >= 2
    if not seen.any():
        return X, error
    sums = np.zeros((n, 4, 4))
    for _ in range(4):
        (b0, b1), (a0, a1) = a * weight, a
        for i in range(4):
            for j in range(i + 1):  # `eigh` looks at the lower half
                sums[:, i, j] = np.bincount(id_, b0[i] * a0[j] + b1[i] * a1[j], minlength=n)
        v = np.concatenate(each(lambda k: np.linalg.eigh(k)[1][..., 0], np.array_split(sums[seen], cores())))
        with np.errstate(divide="ignore", invalid="ignore"):
            X[seen] = v[:, :3] / v[:, 3:]
        e, depth = errors(P, X[id_], x, t.focal)
        weight = 1 / (1 + (np.minimum(e, 1e4) / PIXELS) ** 2) / np.maximum(depth, 1e-9) ** 2
        weight[~(depth > 0)] = 1e-12
    good = (e < 2 * PIXELS) & (depth > 0)
    # a point needs two frames that fit it under an angle
    centre = -np.einsum("nji,nj->ni", P[:, :3, :3], P[:, :3, 3])
    ray = X[id_] - centre
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    hits = np.bincount(id_[good], minlength=n)
    mean = np.stack([np.bincount(id_[good], ray[good, k], minlength=n) for k in range(3)], -1).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean /= np.linalg.norm(mean, axis=1, keepdims=True)
        off = np.arccos(np.clip((ray * mean[id_]).sum(1), -1, 1))
    widest = np.zeros(n)
    np.maximum.at(widest, id_[good], off[good])
    total = np.maximum(np.bincount(id_, minlength=n), 1)
    ok = (hits >= 2) & (2 * widest > t.min_angle) & (hits / total > 0.5)
    X[~ok] = np.nan
    error[row] = np.where(ok[id_] & (depth > 0), e, np.inf)
    return X, error


def errors(P: np.ndarray, X: np.ndarray, x: np.ndarray, focal: float) -> tuple[np.ndarray, np.ndarray]:
    """Reprojection error (N,) in pixels, huge behind the camera, and depth (N,), of points under poses P (N,4,4)."""
    c = np.einsum("nij,nj->ni", P[:, :3, :3], X) + P[:, :3, 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        e = np.linalg.norm(c[:, :2] / c[:, 2:] - x, axis=1) * focal
    return np.where(c[:, 2] > 0, e, 1e6), c[:, 2]


def select(t: Tracks, mine: np.ndarray) -> Tracks:
    """The observations `mine` (N,) bool alone, without descriptors."""
    none = np.zeros(0, np.int64)
    return Tracks(
        t.frame[mine], t.track[mine], t.x[mine], t.focal, t.frames, none, np.zeros((0, 128), np.float32),
        t.min_angle,
    )  # fmt: skip


def adjust(
    poses: np.ndarray,
    X: np.ndarray,
    t: Tracks,
    error: np.ndarray,
    rounds: int = 12,
    per_frame: int = 300,
    scale: float = 1.0,
) -> np.ndarray:
    """Bundle adjustment: Levenberg-Marquardt, Schur complement, Cauchy of `scale` pixels, rotations updated on SO(3).

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
        return np.log1p((r**2).sum(1) / scale**2).sum()

    q, z, r = residual(R, d, Y)
    now, damp = cost(r), 1e-3
    rows = np.repeat(np.arange(2 * n).reshape(n, 2, 1), 6, 2)
    cols_a = np.broadcast_to(6 * c[:, None, None] + np.arange(6), (n, 2, 6))
    cols_b = np.broadcast_to(3 * p[:, None, None] + np.arange(3), (n, 2, 3))
    halves = [slice(k[0], k[-1] + 1) for k in np.array_split(np.arange(6 * nc), min(cores(), nc))]
    for _ in range(rounds):
        w = np.sqrt(1 / (1 + (r**2).sum(1) / scale**2))[:, None]
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
            S = U - np.concatenate(each(lambda k, WV=WV, W=W: (WV[k] @ W.T).toarray(), halves))
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
