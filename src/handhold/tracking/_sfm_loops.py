"""Loops closed by SIFT descriptors, but only where the model's own geometry agrees.

Matching far frames blindly bends a model (look-alike faces of a carton), so descriptors are used in two guarded ways:
`across` proposes matches between two sub-models that no track joins (a similarity must then explain many of them, and
time must allow it), and `close` joins tracks of one model only where a point projects near a key point like it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree


def across(inside: np.ndarray, piece: np.ndarray, X: np.ndarray, t, most: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Observations (M,) of a piece's frames (F,) bool and the points (M,) of the model's frames that look like them."""
    mine = np.flatnonzero(inside[t.frame[t.described]] & np.isfinite(X[t.track[t.described], 0]))
    theirs = np.flatnonzero(piece[t.frame[t.described]])
    none = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if len(mine) < 30 or len(theirs) < 30:
        return none
    mine = mine[:: len(mine) // 20000 + 1]
    D, id_ = t.descriptor[mine], t.track[t.described[mine]]
    frame = t.frame[t.described[theirs]]
    busy = np.argsort(-np.bincount(frame, minlength=t.frames), kind="stable")[:most]
    rows, ids = [], []
    for f in np.sort(busy):
        at = theirs[frame == f]
        if not len(at):
            continue
        s = t.descriptor[at] @ D.T
        top = np.argpartition(-s, min(7, s.shape[1] - 1), 1)[:, :8]
        order = np.take_along_axis(top, np.argsort(-np.take_along_axis(s, top, 1), 1, kind="stable"), 1)
        value, who = np.take_along_axis(s, order, 1), id_[order]
        rival = np.where(who != who[:, :1], value, -1).max(1)  # the best that is another point
        ok = (1 - value[:, 0]) < 0.75 * (1 - rival)
        rows.append(t.described[at[ok]])
        ids.append(who[ok, 0])
    return (np.concatenate(rows), np.concatenate(ids)) if rows else none


def close(poses: np.ndarray, X: np.ndarray, t, radius: float, apart: int = 7):
    """`t` with tracks joined where a point seen `apart` or more frames away projects near a key point like it."""
    here = np.isfinite(poses[:, 0, 0])
    rows = t.described[np.isfinite(X[t.track[t.described], 0])]
    if len(rows) < 30:
        return t, 0
    known = np.flatnonzero(np.isfinite(X[t.track[t.described], 0]))
    # one descriptor per point and observation; the direction it was seen from
    centre = -np.einsum("fji,fj->fi", poses[:, :3, :3], poses[:, :3, 3])
    usable = known[here[t.frame[t.described[known]]]]
    frame, id_ = t.frame[t.described[usable]], t.track[t.described[usable]]
    ray = centre[frame] - X[id_]
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    a, b = [], []
    for f in np.flatnonzero(here):
        at = np.flatnonzero(t.frame[t.described] == f)
        far = np.flatnonzero(np.abs(frame - f) >= apart)
        if not len(at) or not len(far):
            continue
        view = centre[f] - X[id_[far]]
        view /= np.linalg.norm(view, axis=1, keepdims=True)
        far = far[(view * ray[far]).sum(1) > np.cos(np.radians(35))]
        c = X[id_[far]] @ poses[f, :3, :3].T + poses[f, :3, 3]
        far, c = far[c[:, 2] > 0], c[c[:, 2] > 0]
        if not len(far):
            continue
        near = cKDTree(c[:, :2] / c[:, 2:]).query_ball_point(t.x[t.described[at]], radius / t.focal)
        for k, found in zip(at, near, strict=True):
            if not found:
                continue
            who = far[np.sort(found)]
            s = t.descriptor[usable[who]] @ t.descriptor[k]
            best = int(np.argmax(s))
            other = s[id_[who] != id_[who[best]]]
            mine = t.track[t.described[k]]
            if s[best] > 0.85 and (not len(other) or 1 - s[best] < 0.8 * (1 - other.max())) and id_[who[best]] != mine:
                a.append(mine)
                b.append(id_[who[best]])
    if not a:
        return t, 0
    graph = sparse.coo_matrix((np.ones(len(a)), (a, b)), shape=(t.count,) * 2)
    label = connected_components(graph, directed=False)[1]
    track = label[t.track]
    _, first = np.unique(np.stack([t.frame, track], 1), axis=0, return_index=True)
    first = np.sort(first)
    place = np.full(len(t.frame), -1)
    place[first] = np.arange(len(first))
    keep = place[t.described] >= 0
    joined = replace(
        t,
        frame=t.frame[first],
        track=track[first],
        x=t.x[first],
        described=place[t.described[keep]],
        descriptor=t.descriptor[keep],
    )
    return joined, len(a)
