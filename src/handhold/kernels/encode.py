"""Multiresolution grids (dense and hashed) and triplanes: value and Jacobian together.

Both are linear in the parameters, so one analytic backward serves losses on features, normals, eikonal and position:
no double backward. The compiled path takes float32 on the CPU; everything else runs the torch twin.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import _lib, encode_torch
from ._lib import pointer, threads
from .encode_torch import GridLevels

FEATURES = (1, 2, 4, 8)
MAX_ENTRIES = 1 << 28  # of a table or of planes: 1 GiB in float32


def encode(
    table: Tensor,
    x: Tensor,
    levels: GridLevels,
    lo: Tensor,
    hi: Tensor,
    weights: Tensor,
    jacobian: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Trilinear lookup in every level of a multiresolution grid (Mueller et al., SIGGRAPH 2022, section 3).

    table (rows,F) with F in 1, 2, 4, 8; x (N,3); lo, hi (3,) the box, no gradient; weights (L,), no gradient: a level
    of weight 0 costs nothing. Returns value (N,D) and d value / d x (N,D,3), or None without `jacobian`; D = F if the
    levels are summed, else L F. Differentiable in table and x; on the torch path twice. Outside the box x is clamped to
    it, and the derivative along the clamped axis is zero.
    """
    if table.ndim != 2 or table.shape[0] != levels.rows or table.shape[1] not in FEATURES:
        raise ValueError(f"this grid takes a table ({levels.rows}, 1|2|4|8), not {tuple(table.shape)}")
    if table.numel() > MAX_ENTRIES:
        raise ValueError(f"the table has {table.numel()} entries, more than {MAX_ENTRIES}")
    if weights.shape != (len(levels.resolution),):
        raise ValueError(f"weights have shape ({len(levels.resolution)},), not {tuple(weights.shape)}")
    lo, hi = _check(table, x, lo, hi)
    if _lib.resolve_backend(backend, table, x) == "torch":
        return encode_torch.encode(table, x, levels, lo, hi, weights.detach(), jacobian)
    value, jac = _Encode.apply(table, x, levels, _box(lo, hi), tuple(weights.tolist()), jacobian)
    return value, jac


def triplane(
    planes: Tensor,
    x: Tensor,
    lo: Tensor,
    hi: Tensor,
    sum: bool = False,
    align_corners: bool = True,
    jacobian: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Bilinear lookup in three planes (Chan et al., CVPR 2022, section 3.1), x clamped to the box.

    planes (3,C,R,R) for the axes (columns, rows) = (x,y), (x,z), (y,z); memory format channels_last is fastest; x
    (N,3). align_corners: the box's faces go through the outer texel centres; without it, half a texel beyond them.
    Returns value (N,C) summed or (N,3C) concatenated, and d value / d x (N,D,3) or None. Gradients as `encode`.
    """
    check_planes(tuple(planes.shape))
    lo, hi = _check(planes, x, lo, hi)
    if _lib.resolve_backend(backend, planes, x) == "torch":
        return encode_torch.triplane(planes, x, lo, hi, sum, align_corners, jacobian)
    return _Triplane.apply(planes, x, _box(lo, hi), align_corners | sum << 1, jacobian)


def check_planes(shape: tuple[int, ...]) -> None:
    """Raises unless `shape` is a triplane's."""
    if len(shape) != 4 or shape[0] != 3 or shape[2] != shape[3] or not 2 <= shape[2] <= 1 << 14 or shape[1] < 1:
        raise ValueError(f"planes have shape (3,C,R,R) with 2 <= R <= 16384, not {shape}")
    if 3 * shape[1] * shape[2] ** 2 > MAX_ENTRIES:
        raise ValueError(f"planes {shape} have more than {MAX_ENTRIES} entries")


def fourier(
    x: Tensor,
    weights: Tensor,
    pi: bool = False,
    identity: bool = True,
    jacobian: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Fourier features (Mildenhall et al., ECCV 2020, eq. 4), one weight per band (B,), no gradient to the weights.

    x (N,d) -> value (N,D) and d value / d x (N,D,d) or None, D = d (identity + 2 B): x, then per band sin over the
    axes, then cos over the axes, at frequencies 2^k, times pi if asked. Differentiable in x; on the torch path twice.
    """
    if x.ndim != 2 or weights.ndim != 1:
        raise ValueError(f"fourier takes x (N,d) and weights (B,), not {tuple(x.shape)} and {tuple(weights.shape)}")
    _check_positions(x)
    if len(weights) > 64 or not _lib.all_finite(weights):
        raise ValueError("fourier takes at most 64 bands, of finite weight")
    if x.shape[1] != 3 and backend is None:
        backend = "torch"
    if _lib.resolve_backend(backend, x) == "torch":
        return encode_torch.fourier(x, weights.detach(), pi, identity, jacobian)
    if x.shape[1] != 3:
        raise ValueError(f"the compiled path takes x (N,3), not {tuple(x.shape)}")
    return _Fourier.apply(x, tuple(weights.tolist()), pi | identity << 1, jacobian)


def _check_positions(x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"positions must be floating point, not {x.dtype}")
    if not _lib.all_finite(x):
        raise ValueError("positions must be finite; some are NaN or infinite")


def _check(table: Tensor, x: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or x.shape[1] != 3:
        raise ValueError(f"positions have shape (N,3), not {tuple(x.shape)}")
    if x.dtype != table.dtype or x.device != table.device:
        raise TypeError(f"positions are {x.dtype} on {x.device}, the parameters {table.dtype} on {table.device}")
    _check_positions(x)
    lo, hi = (torch.as_tensor(a, dtype=x.dtype, device=x.device).detach() for a in (lo, hi))
    if lo.shape != (3,) or hi.shape != (3,) or not bool((torch.isfinite(lo) & torch.isfinite(hi) & (hi > lo)).all()):
        raise ValueError(f"the box needs 3 finite numbers lo < hi, not {lo.tolist()} and {hi.tolist()}")
    return lo, hi


def _box(lo: Tensor, hi: Tensor) -> tuple[float, ...]:
    return (*lo.tolist(), *(1 / (hi.double() - lo.double())).tolist())


def _floats(values: tuple[float, ...]):
    return (ctypes.c_float * len(values))(*values)


class _Once(torch.autograd.Function):
    """A compiled backward as an op of its own, so that a second derivative raises instead of being silently zero."""

    @staticmethod
    def forward(ctx, backward, *args):
        return backward(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "the compiled encodings are differentiated once: ask for `jacobian=True` instead of calling autograd.grad "
            "for the Jacobian, or pass backend='torch'"
        )


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, x, levels, box, weights, jacobian):
        ctx.save_for_backward(table, x)
        table, x = table.detach().contiguous(), x.detach().contiguous()
        n, D = len(x), levels.output_dim(table.shape[1])
        masks = ((1 << b) - 1 if b else 0 for b in levels.hash_bits)
        rows = [v for row in zip(levels.offsets, levels.resolution, masks, strict=True) for v in row]
        L = len(levels.resolution)
        ctx.grid = (table.shape[1], L, (ctypes.c_int64 * (3 * L))(*rows), _floats(weights), _floats(box))
        ctx.flags = levels.smoothstep | levels.sum << 1
        ctx.set_materialize_grads(False)
        value, jac = torch.empty(n, D), torch.empty(n, D, 3) if jacobian else None
        _lib.lib().hh_encode_forward(
            n, pointer(x), pointer(table), *ctx.grid, ctx.flags, pointer(value), pointer(jac), threads()
        )
        return value, jac

    @staticmethod
    def backward(ctx, v_value, v_jac):
        return *_Once.apply(_encode_backward, ctx, v_value, v_jac, *ctx.saved_tensors), None, None, None, None


def _encode_backward(ctx, v_value, v_jac, table, x):
    table, x = table.detach().contiguous(), x.detach().contiguous()
    v_table = torch.zeros_like(table) if ctx.needs_input_grad[0] else None
    v_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
    v_value, v_jac = (None if v is None else v.contiguous() for v in (v_value, v_jac))
    _lib.lib().hh_encode_backward(
        len(x), pointer(x), pointer(table), *ctx.grid, ctx.flags,
        pointer(v_value), pointer(v_jac), pointer(v_table), pointer(v_x), threads(),
    )  # fmt: skip
    return v_table, v_x


class _Fourier(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, flags, jacobian):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        ctx.bands, ctx.flags = (len(weights), _floats(weights)), flags
        x, D = x.detach().contiguous(), 3 * ((flags >> 1) + 2 * len(weights))
        value, jac = torch.empty(len(x), D), torch.empty(len(x), D, 3) if jacobian else None
        _lib.lib().hh_fourier_forward(len(x), pointer(x), *ctx.bands, flags, pointer(value), pointer(jac), threads())
        return value, jac

    @staticmethod
    def backward(ctx, v_value, v_jac):
        return _Once.apply(_fourier_backward, ctx, v_value, v_jac, *ctx.saved_tensors), None, None, None


def _fourier_backward(ctx, v_value, v_jac, x):
    x = x.detach().contiguous()
    v_x = torch.empty_like(x)
    v_value, v_jac = (None if v is None else v.contiguous() for v in (v_value, v_jac))
    _lib.lib().hh_fourier_backward(
        len(x), pointer(x), *ctx.bands, ctx.flags, pointer(v_value), pointer(v_jac), pointer(v_x), threads()
    )
    return v_x


def _texels(planes: Tensor) -> Tensor:
    return planes.detach().permute(0, 2, 3, 1).contiguous()


class _Triplane(torch.autograd.Function):
    @staticmethod
    def forward(ctx, planes, x, box, flags, jacobian):
        ctx.save_for_backward(planes, x)
        texels, x = _texels(planes), x.detach().contiguous()
        ctx.flags, ctx.box = flags, _floats(box)
        ctx.set_materialize_grads(False)
        R, C = texels.shape[2:]
        n, D = len(x), C if flags & 2 else 3 * C
        value, jac = torch.empty(n, D), torch.empty(n, D, 3) if jacobian else None
        _lib.lib().hh_triplane_forward(
            n, pointer(x), pointer(texels), R, C, ctx.box, flags, pointer(value), pointer(jac), threads()
        )
        return value, jac

    @staticmethod
    def backward(ctx, v_value, v_jac):
        return *_Once.apply(_triplane_backward, ctx, v_value, v_jac, *ctx.saved_tensors), None, None, None


def _triplane_backward(ctx, v_value, v_jac, planes, x):
    texels, x = _texels(planes), x.detach().contiguous()
    R, C = texels.shape[2:]
    v_texels = torch.zeros_like(texels) if ctx.needs_input_grad[0] else None
    v_x = torch.empty_like(x) if ctx.needs_input_grad[1] else None
    v_value, v_jac = (None if v is None else v.contiguous() for v in (v_value, v_jac))
    _lib.lib().hh_triplane_backward(
        len(x), pointer(x), pointer(texels), R, C, ctx.box, ctx.flags,
        pointer(v_value), pointer(v_jac), pointer(v_texels), pointer(v_x), threads(),
    )  # fmt: skip
    return None if v_texels is None else v_texels.permute(0, 3, 1, 2), v_x
