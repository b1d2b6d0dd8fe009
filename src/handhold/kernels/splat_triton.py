"""Gaussian splatting on CUDA in Triton: the host side of `splat_triton_project` and `splat_triton_raster`.

Same semantics as `splat_torch`, float32. Importing this module needs Triton (`handhold[gpu]`); `_triton.available()`
says whether it can run here. The result does not depend on the order in which programs run: no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import splat_triton_disk as disk
from . import splat_triton_pose as pose
from . import splat_triton_project as project
from . import splat_triton_raster as raster
from ._lib import capturing
from ._triton import interpreted, on

MAX_FEATURES = 32  # more would spill registers
# Floats of a record and of a gradient slot beside the features, for 3D and for 2D Gaussians.
RECORD, SUMS = {False: 12, True: 17}, {False: 10, True: 17}
MAX_SLOTS = 2**31 - 2**16


@dataclass(frozen=True)
class Launch:
    """How the pixels are cut up. Not a matter of the result, only of speed.

    One warp per tile of 8x8 keeps the ten sums of the backward pass inside the warp; small Gaussians reach few tiles.
    """

    tile: tuple[int, int] = (8, 8)  # pixels across, down; their product is a power of 2
    warps: int = 1
    unroll: int = 4  # Gaussians whose records are read together


DEFAULT = Launch()


@dataclass(frozen=True)
class _Options:
    width: int
    height: int
    degree: int  # -1: plain colours
    n_ids: int
    capacity: int | None
    disk: bool
    launch: Launch

    @property
    def tiles(self) -> tuple[int, int]:
        return triton.cdiv(self.width, self.launch.tile[0]), triton.cdiv(self.height, self.launch.tile[1])


def rasterize(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmat: Tensor,
    K: Tensor,
    width: int,
    height: int,
    sh_degree: int | None = None,
    ids: Tensor | None = None,
    n_ids: int = 0,
    features: Tensor | None = None,
    kind: str = "3d",
    capacity: int | None = None,
    launch: Launch = DEFAULT,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `handhold.kernels.splat.rasterize`, which checks the shapes; here all tensors are float32 on one CUDA device.

    Returns out (H,W,4+F+n_ids), alpha (H,W), median (H,W) int32. Gradients to all float inputs, viewmat and K included.
    capacity: the most (Gaussian, tile) pairs to make room for. None reads the number back from the device once a call,
    the only host synchronisation, or, while a CUDA graph is captured, takes 1.5 times the most that the calls before
    needed for an image of this size. When it is too small the images are NaN. `intersections` gives what is needed.
    """
    n_features = 0 if features is None else features.shape[1]
    if n_features > MAX_FEATURES:
        raise ValueError(f"the triton backend takes at most {MAX_FEATURES} feature channels")
    floats = [means, quats, scales, opacities, colors, viewmat, K, *([] if features is None else [features])]
    if any(t.dtype != torch.float32 for t in floats):
        raise TypeError("the triton backend takes float32 tensors; use backend='torch' for other types")
    devices = {t.device for t in floats} | ({ids.device} if n_ids else set())
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, not on {sorted(map(str, devices))}")
    if not means.is_cuda and not interpreted():
        raise ValueError("the triton backend takes CUDA tensors; use backend='cpu' or 'torch' for others")
    if capacity is not None and not 1 <= capacity <= MAX_SLOTS:
        raise ValueError(f"capacity is {capacity}; choose 1 to {MAX_SLOTS}")
    degree = -1 if sh_degree is None else sh_degree
    options = _Options(width, height, degree, n_ids, capacity, kind == "2d", launch)
    if capacity is None and capturing(means):
        options = replace(options, capacity=_remembered_capacity(means, options))
    ids = ids.to(torch.int64).contiguous() if n_ids else None
    return _Rasterize.apply(means, quats, scales, opacities, colors, viewmat, K, features, ids, options)


def intersections(
    means, quats, scales, opacities, viewmat, K, width: int, height: int, kind: str = "3d", launch: Launch = DEFAULT
) -> int:
    """Number of (Gaussian, tile) pairs of this view. Synchronises with the device."""
    options = _Options(width, height, -1, 0, None, kind == "2d", launch)
    tensors = [t.detach().contiguous() for t in (means, quats, scales, opacities, means, viewmat, K)]
    with on(means):
        return int(_project(tensors, None, None, options)[3].sum()) if len(means) else 0


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


_most_pairs: dict[tuple, int] = {}  # per device and kind of image, so that a graph can be captured after warming up


def _pairs_key(t: Tensor, options: _Options) -> tuple:
    return t.device, options.width, options.height, options.disk, options.launch.tile


def _remembered_capacity(t: Tensor, options: _Options) -> int:
    most = _most_pairs.get(_pairs_key(t, options))
    if most is None:
        raise ValueError(
            "to capture splatting in a CUDA graph, run it once before, uncaptured, for an image of this size"
        )
    return min(most + most // 2 + 1024, MAX_SLOTS)


def _unroll(options: _Options, n_features: int) -> int:
    """One record at a time where the channels fill the registers."""
    return options.launch.unroll if n_features + options.n_ids <= 8 else 1


def _project(tensors: list[Tensor], features: Tensor | None, ids: Tensor | None, options: _Options):
    """record (N,ROW), box (N,4), key (N,), tiles (N,)."""
    means, quats, scales, opacities, colors, viewmat, K = tensors
    n, n_features = len(means), 0 if features is None else features.shape[1]
    record = means.new_empty(n, _power_of_2(RECORD[options.disk] + n_features))
    box = torch.empty(n, 4, dtype=torch.int32, device=means.device)
    key, tiles = means.new_empty(n), torch.empty(n, dtype=torch.int32, device=means.device)
    kernel = disk.disk_forward if options.disk else project.project_forward
    kernel[(triton.cdiv(n, 64),)](
        means, quats, scales, opacities, colors, features, ids, viewmat, K, record, box, key, tiles,
        n, options.n_ids, options.width, options.height,
        DEGREE=options.degree, COEFFICIENTS=colors.shape[1] if options.degree >= 0 else 1, F=n_features,
        IDS=options.n_ids, ROW=record.shape[1], TX=options.launch.tile[0], TY=options.launch.tile[1],
        BLOCK=64, num_warps=2,
    )  # fmt: skip
    return record, box, key, tiles


@dataclass(frozen=True)
class _Lists:
    """Which Gaussians each tile draws, in depth order. Slot j belongs to one (Gaussian, tile) pair."""

    order: Tensor  # (N,) int64, Gaussians by depth
    ends: Tensor  # (N,) int64, end of each one's run of slots, in that order
    slot: Tensor  # (capacity,) int64, the slot of the k-th record
    drawn: Tensor  # (capacity,ROW) records, tile by tile
    owner: Tensor  # (capacity,) int32, the Gaussian of the k-th record
    start: Tensor  # (tiles+1,) int32, the tiles' parts of drawn

    @property
    def capacity(self) -> int:
        return len(self.slot)


def _bin(record: Tensor, box: Tensor, key: Tensor, tiles: Tensor, options: _Options):
    """_Lists. Sort by depth, then stably by tile: no 64-bit keys, and slots come out in Gaussian order."""
    n, device, tile, capacity = len(key), key.device, options.launch.tile, options.capacity
    tiles_x, tiles_y = options.tiles
    n_tiles = tiles_x * tiles_y
    order = torch.sort(key, stable=True)[1]
    ends = tiles[order].cumsum(0)
    if capacity is None:
        capacity = max(int(ends[-1]), 1)  # the one host synchronisation
        if capacity > MAX_SLOTS:
            raise ValueError(f"{capacity} (Gaussian, tile) pairs are too many; are the scales in metres?")
        at = _pairs_key(key, options)
        _most_pairs[at] = max(capacity, _most_pairs.get(at, 0))
    narrow = torch.int16 if n_tiles < 2**15 else torch.int32  # half the sorting passes
    slot_tile = torch.empty(capacity, dtype=narrow, device=device)
    slot_owner = torch.empty(capacity, dtype=torch.int32, device=device)
    raster.emit[(triton.cdiv(capacity, 256),)](
        order, ends, box, record, slot_tile, slot_owner, n, capacity, n.bit_length(), n_tiles, tiles_x,
        ROW=record.shape[1], TX=tile[0], TY=tile[1], DISK=options.disk, BLOCK=256, num_warps=4,
    )  # fmt: skip
    sorted_tile, slot = torch.sort(slot_tile, stable=True)
    drawn, owner = record.new_empty(capacity, record.shape[1]), torch.empty_like(slot_owner)
    start = torch.empty(n_tiles + 1, dtype=torch.int32, device=device)
    raster.gather[(triton.cdiv(max(capacity, n_tiles + 1), 64),)](
        sorted_tile, slot, slot_owner, record, drawn, owner, start, capacity, capacity.bit_length(), n_tiles,
        ROW=record.shape[1], BLOCK=64, num_warps=2,
    )  # fmt: skip
    return _Lists(order, ends, slot, drawn, owner, start)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmat, K, features, ids, options):
        tensors = [t.detach().contiguous() for t in (means, quats, scales, opacities, colors, viewmat, K)]
        features = None if features is None else features.detach().contiguous()
        n, n_features = len(means), 0 if features is None else features.shape[1]
        h, w, (tx, ty) = options.height, options.width, options.launch.tile
        ctx.options, ctx.shape = options, (n, n_features)
        if n == 0:
            ctx.save_for_backward(*tensors, features)
            out, alpha = means.new_zeros(h, w, 4 + n_features + options.n_ids), means.new_zeros(h, w)
            median = torch.full((h, w), -1, dtype=torch.int32, device=means.device)
            ctx.mark_non_differentiable(median)
            return out, alpha, median
        tiles_x, tiles_y = options.tiles
        with on(means):
            record, box, key, tiles = _project(tensors, features, ids, options)
            lists = _bin(record, box, key, tiles, options)
            out = means.new_empty(h, w, 4 + n_features + options.n_ids)
            unroll = _unroll(options, n_features)
            alpha, final_T = means.new_empty(h, w), means.new_empty(h, w)
            last, median = torch.empty(2, h, w, dtype=torch.int32, device=means.device).unbind(0)
            raster.raster_forward[(tiles_x * tiles_y,)](
                lists.drawn, lists.owner, lists.start, lists.ends, out, alpha, final_T, last, median,
                n, lists.capacity, w, h, tiles_x,
                F=n_features, IDS=options.n_ids, ROW=record.shape[1], TX=tx, TY=ty, UNROLL=unroll, DISK=options.disk,
                num_warps=options.launch.warps,
            )  # fmt: skip
        ctx.save_for_backward(
            *tensors,
            features,
            record,
            tiles,
            lists.order,
            lists.ends,
            lists.slot,
            lists.drawn,
            lists.start,
            final_T,
            last,
        )
        ctx.mark_non_differentiable(median)
        return out, alpha, median

    @staticmethod
    @once_differentiable
    def backward(ctx, v_out, v_alpha, _):
        means, quats, scales, opacities, colors, viewmat, K, features, *state = ctx.saved_tensors
        if ctx.shape[0] == 0:
            leaves = (means, quats, scales, opacities, colors, viewmat, K)
            return (
                *map(torch.zeros_like, leaves),
                None if features is None else torch.zeros_like(features),
                None,
                None,
            )
        record, tiles, order, ends, slot, drawn, start, final_T, last = state
        (n, n_features), options = ctx.shape, ctx.options
        w, h, (tx, ty), row = options.width, options.height, options.launch.tile, record.shape[1]
        tiles_x, tiles_y = options.tiles
        unroll = _unroll(options, n_features)
        columns, blocks = _power_of_2(SUMS[options.disk] + n_features), triton.cdiv(n, 64)
        with on(means):
            slots = means.new_zeros(len(slot), columns)
            raster.raster_backward[(tiles_x * tiles_y,)](
                drawn, slot, start, v_out.contiguous(), v_alpha.contiguous(), final_T, last, slots, w, h, tiles_x,
                F=n_features, IDS=options.n_ids, ROW=row, SLOT=columns, TX=tx, TY=ty, UNROLL=unroll, DISK=options.disk,
                num_warps=options.launch.warps,
            )  # fmt: skip
            sums = means.new_empty(n, columns)
            raster.slot_sum[(triton.cdiv(n, 4),)](
                order, ends, slots, sums, n, len(slot), SLOT=columns, ROWS=8, MANY=4, num_warps=1
            )
            v = [torch.empty_like(t) for t in (means, quats, scales, opacities, colors)]
            v_features = None if features is None else torch.empty_like(features)
            partial = means.new_zeros(blocks, pose.CAMERA)
            kernel = disk.disk_backward if options.disk else project.project_backward
            kernel[(blocks,)](
                means, quats, scales, colors, viewmat, K, record, tiles, sums, *v, v_features, partial, n, w, h,
                DEGREE=options.degree, COEFFICIENTS=colors.shape[1] if options.degree >= 0 else 1, F=n_features,
                ROW=row, SLOT=columns, BLOCK=64, num_warps=2,
            )  # fmt: skip
            camera = means.new_empty(pose.CAMERA)
            pose.camera_sum[(1,)](partial, camera, blocks, ROWS=32, num_warps=4)
        return *v, camera[:16].view(4, 4), camera[16:25].view(3, 3), v_features, None, None
