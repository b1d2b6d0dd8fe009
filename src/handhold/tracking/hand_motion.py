"""One hand per frame, all frames together: least squares on a block-tridiagonal chain, smooth on SO(3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import rigid
from ..hand import HandModel
from .hand_solver import F64, N_HAND, SHAPE, Evidence, HandState, Terms, assemble, orthonormal


@dataclass(frozen=True, eq=False)
class Smoothness:
    """How a hand moves from frame to frame and away from a reference: standard deviations."""

    turn: Tensor  # (48,) radians per frame: the wrist's three, then flexion, abduction, twist of each joint
    shift: float  # metres per frame
    link: Tensor  # (F-1,) bool: False where the motion may jump (a regrasp)
    reference: HandState | None = None  # F states to stay close to
    pull: Tensor | None = None  # (F,51) standard deviations from the reference


def _difference(a: HandState, b: HandState, frames: Tensor) -> tuple[Tensor, Tensor]:
    """b minus a on the manifold, (S,51), and the derivative (S,16,3,3) of its rotation part by b's increments."""
    w = rigid.so3_log(a.rot.mT @ b.rot)
    w = torch.cat([w[:, :1], torch.einsum("kca,skc->ska", frames, w[:, 1:])], 1)
    return torch.cat([w.flatten(1), b.transl - a.transl], 1), torch.linalg.inv(rigid.right_jacobian(w))


def _blocks(j: Tensor) -> Tensor:
    """(S,16,3,3) rotation blocks and a unit translation block -> (S,51,51)."""
    out = torch.zeros(len(j), N_HAND, N_HAND, dtype=j.dtype)
    for k in range(16):
        out[:, 3 * k : 3 * k + 3, 3 * k : 3 * k + 3] = j[:, k]
    out[:, 48:, 48:] = torch.eye(3, dtype=j.dtype)
    return out


def _motion(state: HandState, smooth: Smoothness, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cost, diagonal blocks (F,51,51), lower blocks (F-1,51,51) and gradient (F,51) of the smoothness terms."""
    f = len(state.rot)
    inv = torch.cat([smooth.turn, torch.full((3,), smooth.shift, dtype=F64)]) ** -2
    d, jb = _difference(state[:-1], state[1:], frames)
    w = inv * smooth.link[:, None]
    cost = 0.5 * (w * d * d).sum()
    Jb = _blocks(jb)
    Ja = -_blocks(jb.mT)
    diag, grad = torch.zeros(f, N_HAND, N_HAND, dtype=F64), torch.zeros(f, N_HAND, dtype=F64)
    diag[:-1] += Ja.mT @ (w[..., None] * Ja)
    diag[1:] += Jb.mT @ (w[..., None] * Jb)
    lower = Jb.mT @ (w[..., None] * Ja)
    grad[:-1] += (Ja.mT @ (w * d)[..., None])[..., 0]
    grad[1:] += (Jb.mT @ (w * d)[..., None])[..., 0]
    if smooth.reference is not None:
        e, je = _difference(smooth.reference, state, frames)
        J, w = _blocks(je), smooth.pull**-2
        cost = cost + 0.5 * (w * e * e).sum()
        diag += J.mT @ (w[..., None] * J)
        grad += (J.mT @ (w * e)[..., None])[..., 0]
    return cost, diag, lower, grad


def _solve_chain(diag: Tensor, lower: Tensor, rhs: Tensor) -> Tensor:
    """Solve a block-tridiagonal symmetric positive system: (F,n,n), (F-1,n,n), (F,n) -> (F,n), by block Cholesky."""
    f = len(rhs)
    chol, left, y = [], [], []
    for i in range(f):
        d, b = diag[i], rhs[i, :, None]
        if i:
            w = torch.linalg.solve_triangular(chol[-1], lower[i - 1].mT, upper=False)  # L^-1 B^T
            left.append(w)
            d, b = d - w.mT @ w, b - w.mT @ y[-1]
        chol.append(torch.linalg.cholesky(d))
        y.append(torch.linalg.solve_triangular(chol[-1], b, upper=False))
    x = [torch.linalg.solve_triangular(chol[-1].mT, y[-1], upper=True)]
    for i in range(f - 2, -1, -1):
        x.append(torch.linalg.solve_triangular(chol[i].mT, y[i] - left[i] @ x[-1], upper=True))
    return torch.stack(x[::-1])[..., 0]


def minimise_track(
    model: HandModel,
    state: HandState,
    ev: Evidence,
    terms: Terms,
    smooth: Smoothness,
    iterations: int = 15,
    free_betas: bool = False,
) -> HandState:
    """One hand per frame, all frames together: `state` holds F hands with the same betas, `ev` one frame each (F,1).

    Levenberg-Marquardt on the block-tridiagonal system. Shape, when free, takes its own (half) step alongside; its
    prior counts once per frame, so pass terms.betas = 1 / F.
    """
    frames, f = model.joint_frames, len(state.rot)
    share = torch.ones(f, 1, dtype=F64)

    def system(x: HandState, jacobian: bool = True):
        a = assemble(model, x, ev, terms, share, None, jacobian)
        cost, diag, lower, grad = _motion(x, smooth, frames)
        total = a.cost.sum() + cost
        if not jacobian:
            return total, None, None, None, None
        return total, a.H[:, :N_HAND, :N_HAND] + diag, lower, a.g[:, :N_HAND] + grad, a

    lam, now = 1e-3, system(state)
    for _ in range(iterations):
        cost, D, lower, g, a = now
        d = D.diagonal(dim1=1, dim2=2)
        step = torch.zeros(f, 62, dtype=F64)
        step[:, :N_HAND] = _solve_chain(D + torch.diag_embed(lam * d + 1e-9), lower, -g).clamp(-0.5, 0.5)
        if free_betas:
            H, b = a.H[:, SHAPE, SHAPE].sum(0), a.g[:, SHAPE].sum(0)
            step[:, SHAPE] = torch.linalg.solve(H + lam * torch.diag(H.diagonal()), -0.5 * b)
        trial = state.retract(step, frames)
        new = system(trial)
        if new[0] < cost:
            small = (cost - new[0]) < 1e-5 * cost
            state, now, lam = trial, new, lam * 0.3
            if small:
                break
        else:
            lam *= 8
            if lam > 1e4:
                break
    return orthonormal(state)
