"""Checks and marks that the compiled ops share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _lib

MAX_SIDE = 16384  # pixels


def check_size(width: int, height: int) -> None:
    """ValueError unless both are whole numbers from 1 to `MAX_SIDE`."""
    for name, side in (("width", width), ("height", height)):
        if not (hasattr(side, "__index__") and 1 <= side <= MAX_SIDE):
            raise ValueError(f"{name} is {side!r}; it must be a whole number from 1 to {MAX_SIDE}")


def check_intrinsics(Ks: Tensor) -> None:
    """ValueError unless focal lengths of Ks (...,3,3) are positive and there is no skew."""
    if _lib.capturing(Ks):
        return
    # one transfer, where tensor tests take several
    for (fx, skew, _), (other, fy, _), _ in Ks.detach().reshape(-1, 3, 3).tolist():
        if not (fx > 0 and fy > 0):
            raise ValueError("focal lengths Ks[:, 0, 0] and Ks[:, 1, 1] must be positive")
        if skew or other:
            raise ValueError("Ks has skew; undistort the images to square axes first")


def check_indices(name: str, t: Tensor, low: int, high: int) -> None:
    """ValueError unless low <= t < high."""
    if t.numel():
        a, b = (int(v) for v in torch.aminmax(t))
        if a < low or b >= high:
            raise ValueError(f"{name} runs from {a} to {b}; it must stay within {low} to {high - 1}")


def version(t: Tensor) -> int:
    """How often t was changed in place; -1 for tensors of inference mode, which do not count."""
    return -1 if t.is_inference() else t._version


def written(*tensors: Tensor) -> None:
    """Counts a kernel's writing as a change in place."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, anchor, *gradients):
        return gradients

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the compiled operations are differentiated once; pass backend='torch' where there is a twin"
        )


def once(backward):
    """For the backward of an autograd.Function without a derivative of its own: a second one raises.

    torch's `once_differentiable` raises only where the incoming gradient needs one, and is silently zero elsewhere.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        twice = torch.is_grad_enabled()  # create_graph=True
        with torch.no_grad():
            out = backward(ctx, *gradients)
        if not twice:
            return out
        single = not isinstance(out, tuple)
        out = _Refuse.apply(torch.zeros((), requires_grad=True), *((out,) if single else out))
        return out[0] if single else out

    return wrapped
