"""Dense signed-distance + colour grid on a cube: lookup with normals, ray march, NeuS rendering, regularisers, Adam.

Value and gradient of a trilinear grid are both linear in its entries, so one analytic backward serves losses on colour,
normals and positions together. Gradients to the grid are added to `SdfGrid.grad`, never returned as a dense tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _lib, grid_torch
from ._checks import once, version, written
from ._lib import _LO, pointer, threads


class SdfGrid:
    """Owns a grid, its gradient buffer and its Adam state.

    data, grad: (R,R,R,4): signed distance in metres, negative inside, and three raw colours (colour = sigmoid(raw)).
    The grid covers the cube [lo, lo + (R-1) h] per axis; voxel (i,j,k) lies at lo + h (i,j,k).
    Change `data` and `grad` through torch only: what the compiled path derives from them is made anew when torch counts
    a change. `sample`, `march` and `render` may run on several threads at once; backward and what changes the grid on
    one at a time. Everything here is differentiated once; a second derivative raises.
    """

    def __init__(self, data: Tensor, lo, h: float, backend: str | None = None):
        """data (R,R,R,4), or (R,R,R) with mid grey for colour, is copied; lo: 3 numbers; h: voxel size; in metres."""
        if data.ndim == 3:
            data = torch.stack([data, *(torch.zeros_like(data),) * 3], -1)
        if data.ndim != 4 or data.shape[3] != 4 or len(set(data.shape[:3])) != 1 or not 3 <= data.shape[0] <= 1024:
            raise ValueError(f"a grid is (R,R,R) or (R,R,R,4) with R from 3 to 1024, not {tuple(data.shape)}")
        if not data.is_floating_point():
            raise TypeError(f"the grid's data is {data.dtype}; it must be floating point")
        if not _lib.all_finite(data):
            raise ValueError("the grid's data must be finite")
        self.data = data.detach().clone(memory_format=torch.contiguous_format)
        self.grad = torch.zeros_like(self.data)
        self.h = float(h)
        self.lo = torch.as_tensor(lo, dtype=data.dtype, device=data.device).detach().reshape(-1).expand(3).clone()
        if not (0 < self.h < float("inf") and _lib.all_finite(self.lo)):
            raise ValueError(f"a grid needs a finite corner and a positive voxel size, not {self.lo.tolist()} and {h}")
        self.backend = _lib.resolve_backend(backend, self.data, triton=_triton)
        self.step = 0
        self._m: Tensor | None = None
        self._v: Tensor | None = None
        self._tmp: Tensor | None = None
        # For the compiled path: (R,R,R) channel 0 of `data`, kept up to date by `update`, and the version it is of
        self._field: tuple[Tensor, tuple[int, int] | None] | None = None
        self._rows = torch.zeros(self.R, self.R, dtype=torch.uint8)  # rows of `grad` that may hold something
        self._rows_of: tuple[int, int] | None = _version(self.grad)
        self._lo = _LO(*self.lo.tolist())
        # Gives autograd something to differentiate when x itself needs no gradient.
        self._anchor = torch.zeros((), dtype=data.dtype, device=data.device, requires_grad=True)

    @property
    def R(self) -> int:
        return self.data.shape[0]

    @property
    def hi(self) -> Tensor:
        """(3,) upper corner, metres."""
        return self.lo + (self.R - 1) * self.h

    def sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N,3) metres -> val (N,4), grad (N,3) of the distance. Outside the cube x is clamped to it.

        Backward adds to `self.grad` and returns dL/dx with the second-order terms of `grad`.
        """
        _check_points(self, x=x)
        return _Sample.apply(x, self, self._anchor)

    def sample_sdf(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `sample` for x of shape (...,3), the distance alone: (...), (...,3)."""
        val, grad = self.sample(x.reshape(-1, 3))
        return val[:, 0].reshape(x.shape[:-1]), grad.reshape(x.shape)

    @torch.no_grad()
    def march(self, o: Tensor, d: Tensor, min_step: float, band: float) -> tuple[Tensor, Tensor, Tensor]:
        """First passage of each ray through |sdf| < band.

        o, d: (N,3) origin and unit direction. Returns t0, t1 (N,): the interval to sample, and phi_min (N,): the least
        distance met. The passage ends where sdf < -band, or where sdf > band again after coming within 0.6 band. A ray
        that meets no band gets a window of +-min_step at its closest approach; one that misses the cube, phi_min = 1e9.
        """
        n = len(o)
        _check_points(self, o=o, d=d)
        for name, length in (("min_step", min_step), ("band", band)):
            if not 0 < length < math.inf:
                raise ValueError(f"{name} is {length}; it must be a positive length in metres")
        if self.backend == "torch":
            return grid_torch.march(self.data, self.lo, self.h, o.detach(), d.detach(), min_step, band)
        if self.backend == "triton":
            return _triton().march(self.data, self.lo, self.h, o, d, min_step, band)
        o, d = _flat(o), _flat(d)
        t0, t1, phi = torch.empty(3, n).unbind(0)
        _lib.lib().hh_grid_march(
            n, pointer(o), pointer(d), pointer(self._distance()), self.R, self._lo, self.h, min_step, band,
            pointer(t0), pointer(t1), pointer(phi), threads(),
        )  # fmt: skip
        return t0, t1, phi

    def render(self, o: Tensor, d: Tensor, t: Tensor, beta: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """NeuS volume rendering (NeurIPS 2021, eq. 13) of rays o + t d with S samples each.

        o, d: (N,3); t: (N,S) increasing, S <= 256, no gradient; beta: logistic width in metres, scalar.
        Returns rgb (N,3) premultiplied, acc (N,), depth (N,) = sum of weight * t (over acc: the expected depth).
        Backward adds to `self.grad` and gives gradients to o, d and beta.
        """
        _check_points(self, o=o, d=d)
        if t.shape[:-1] != o.shape[:1] or not 2 <= t.shape[1] <= 256 or not _lib.all_finite(t):
            raise ValueError(f"render takes 2 to 256 finite samples per ray, t (N,S), not {tuple(t.shape)}")
        _check_kind(self, t=t)
        beta = torch.as_tensor(beta, dtype=self.data.dtype, device=self.data.device)
        if beta.numel() != 1 or not (_lib.capturing(beta) or beta.item() > 0):
            raise ValueError(f"beta is one positive width in metres, not {beta.tolist()}")
        return _Render.apply(o, d, beta, t, self, self._anchor)

    @torch.no_grad()
    def reg(self, w_eik: float, w_lap: float, band: float) -> tuple[float, float]:
        """Adds the gradient of w_eik * eikonal + w_lap * smoothness to `self.grad`; returns both means, unweighted.

        Means over inner voxels with |sdf| <= band of (|grad| - 1)^2 and (h Laplacian)^2.
        """
        if self.backend != "cpu":
            with torch.inference_mode(False), torch.enable_grad():
                f = (self.data.clone() if self.data.is_inference() else self.data).detach().requires_grad_()
                eik, lap = grid_torch.regularizers(f, self.h, band)
                (g,) = torch.autograd.grad(w_eik * eik + w_lap * lap, f)
            self.grad += g
            return eik.item(), lap.item()
        loss = torch.zeros(2, dtype=torch.float64)
        self._rows_of = None
        failed = _lib.lib().hh_grid_reg(
            pointer(self.data), self.R, self._lo, self.h, w_eik, w_lap, band,
            pointer(self.grad), pointer(self._scratch()), pointer(loss), threads(),
        )  # fmt: skip
        _check_memory(failed)
        written(self.grad)
        return loss[0].item(), loss[1].item()

    @torch.no_grad()
    def blur(self, iterations: int = 2) -> None:
        """Smooth the distance channel of `self.grad` with [1 2 1]/4 per axis: a Sobolev preconditioner."""
        if iterations < 1:
            return
        if self.backend != "cpu":
            self.grad[..., 0] = grid_torch.blur(self.grad[..., 0], iterations)
        else:
            self._rows_of = None
            _lib.lib().hh_grid_blur(pointer(self.grad), self.R, pointer(self._scratch()), iterations, threads())
            written(self.grad)

    @torch.no_grad()
    def adam(
        self, lr_sdf: float, lr_color: float, betas: tuple[float, float] = (0.9, 0.99), rel_eps: float = 0.3
    ) -> None:
        """One Adam step on voxels with a gradient, then `self.grad` is zero again.

        rel_eps: epsilon of the distance channel, as a fraction of the grid's rms gradient: weakly seen voxels stay put.
        """
        if self.backend == "cpu":
            self.update(0.0, 0.0, -1.0, lr_sdf, lr_color, 0, betas, rel_eps)
            return
        self.step += 1
        if self._m is None:
            self._m, self._v = torch.zeros_like(self.data), torch.zeros_like(self.data)
        flat = [t.view(-1, 4) for t in (self.data, self.grad, self._m, self._v)]
        ops = _triton() if self.backend == "triton" else grid_torch
        ops.adam(*flat, lr_sdf, lr_color, *betas, self.step, rel_eps)

    @torch.no_grad()
    def update(
        self,
        w_eik: float,
        w_lap: float,
        band: float,
        lr_sdf: float,
        lr_color: float,
        blur: int = 2,
        betas: tuple[float, float] = (0.9, 0.99),
        rel_eps: float = 0.3,
    ) -> tuple[float, float]:
        """`reg`, `blur` and `adam` in one sweep over the voxels that have a gradient; returns what `reg` does."""
        if self.backend != "cpu":
            means = self.reg(w_eik, w_lap, band)
            self.blur(blur)
            self.adam(lr_sdf, lr_color, betas, rel_eps)
            return means
        R = self.R
        if self._m is None:
            self._m, self._v = torch.zeros(2, 4, R, R, R).unbind(0)  # moments, channel by channel
            self._ever = torch.zeros(R, R, 2, dtype=torch.int32)  # columns of each row where colour has moments
            self._ever[..., 0] = R
            self._rms = torch.zeros(R, 2, dtype=torch.float64)
        if not _same(self._rows_of, self.grad):
            self._rows.fill_(1)
        refresh = self._field is None or not _same(self._field[1], self.data)
        field = torch.empty(R, R, R) if self._field is None else self._field[0]
        loss = torch.zeros(2, dtype=torch.float64)
        failed = _lib.lib().hh_grid_update(
            pointer(self.data), R, self.h, w_eik, w_lap, band, blur, pointer(self.grad), pointer(self._rows),
            pointer(self._m), pointer(self._v), pointer(self._ever), pointer(field), refresh,
            lr_sdf, lr_color, *betas, self.step + 1, rel_eps, pointer(self._scratch()), pointer(self._rms),
            pointer(loss), threads(),
        )  # fmt: skip
        _check_memory(failed)
        self.step += 1
        written(self.data, self.grad)
        self._rows_of, self._field = _version(self.grad), (field, _version(self.data))
        return loss[0].item(), loss[1].item()

    def zero_grad(self) -> None:
        self.grad.zero_()

    @torch.no_grad()
    def upsampled(self, R: int) -> SdfGrid:
        """The same cube at resolution R, trilinear; Adam state starts anew."""
        f = self.data.permute(3, 0, 1, 2)[None]
        f = torch.nn.functional.interpolate(f, size=(R, R, R), mode="trilinear", align_corners=True)
        return SdfGrid(f[0].permute(1, 2, 3, 0), self.lo, self.h * (self.R - 1) / (R - 1), self.backend)

    def _distance(self) -> Tensor:
        known = self._field
        if known is None or not _same(known[1], self.data):
            # a tensor of its own, published with its version at once: another thread may read the old one
            known = torch.empty(self.R, self.R, self.R), _version(self.data)
            _lib.lib().hh_grid_extract(pointer(self.data), self.R, pointer(known[0]), threads())
            self._field = known
        return known[0]

    def _scratch(self) -> Tensor:
        if self._tmp is None:
            self._tmp = torch.empty(5 * self.R**3)
        return self._tmp


def _version(t: Tensor) -> tuple[int, int]:
    return t.data_ptr(), version(t)


def _same(known: tuple[int, int] | None, t: Tensor) -> bool:
    """Whether t is certain to be as it was at version `known`."""
    return known == _version(t) and not t.is_inference()


def _check_memory(failed: int) -> None:
    if failed:
        raise MemoryError("not enough memory for this operation on the grid")


def _check_kind(grid: SdfGrid, **tensors: Tensor) -> None:
    for name, p in tensors.items():
        if p.device != grid.data.device or not p.dtype.is_floating_point:
            raise TypeError(f"{name} is {p.dtype} on {p.device}; the grid is {grid.data.dtype} on {grid.data.device}")


def _check_points(grid: SdfGrid, **points: Tensor) -> None:
    n = len(next(iter(points.values())))
    for name, p in points.items():
        if p.shape != (n, 3):
            raise ValueError(f"{name} has shape (N,3), not {tuple(p.shape)}")
        _check_kind(grid, **{name: p})
        if not _lib.all_finite(p):
            raise ValueError(f"{name} must be finite; some are NaN or infinite")


def _triton():
    from . import grid_triton

    return grid_triton


def _flat(t: Tensor) -> Tensor:
    return t.detach().to(torch.float32).contiguous()


def _dense(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape) if grad is None else grad.contiguous()


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grid, anchor):
        ctx.grid = grid
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        if grid.backend == "torch":
            return grid_torch.sample(grid.data, grid.lo, grid.h, x)
        if grid.backend == "triton":
            return _triton().sample(grid.data, grid.lo, grid.h, x)
        p, n = _flat(x), len(x)
        val, grad = torch.empty(n, 4), torch.empty(n, 3)
        _lib.lib().hh_grid_sample(
            n, pointer(p), pointer(grid.data), grid.R, grid._lo, grid.h, pointer(val), pointer(grad), threads()
        )
        return val, grad

    @staticmethod
    @once
    def backward(ctx, v_val, v_grad):
        grid, (x,) = ctx.grid, ctx.saved_tensors
        if v_val is None and v_grad is None:
            return None, None, None
        wants_x = ctx.needs_input_grad[0]
        if grid.backend == "torch":
            with torch.enable_grad():
                f, p = grid.data.detach().requires_grad_(), x.detach().requires_grad_()
                val, grad = grid_torch.sample(f, grid.lo, grid.h, p)
                pairs = [(a, b) for a, b in ((val, v_val), (grad, v_grad)) if b is not None]
                gf, gx = torch.autograd.grad([a for a, _ in pairs], [f, p], [b for _, b in pairs], allow_unused=True)
            if gf is not None:
                grid.grad += gf
            return (gx if wants_x else None), None, torch.zeros_like(grid._anchor)
        p, n = _flat(x), len(x)
        v_val = x.new_zeros(n, 4) if v_val is None else v_val.contiguous()
        v_grad = None if v_grad is None else v_grad.contiguous()
        if grid.backend == "triton":
            v_x = _triton().sample_backward(grid.data, grid.lo, grid.h, x, v_val, v_grad, grid.grad, wants_x)
            return v_x, None, torch.zeros_like(grid._anchor)
        v_x = torch.empty(n, 3) if wants_x else None
        failed = _lib.lib().hh_grid_backward(
            n, pointer(p), pointer(grid.data), grid.R, grid._lo, grid.h, pointer(v_val), pointer(v_grad),
            pointer(grid.grad), pointer(grid._rows), pointer(v_x), threads(),
        )  # fmt: skip
        _check_memory(failed)
        return v_x, None, torch.zeros_like(grid._anchor)


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, d, beta, t, grid, anchor):
        ctx.grid = grid
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(o, d, beta, t)
        ctx.seen = None
        if grid.backend == "torch":
            return grid_torch.render(grid.data, grid.lo, grid.h, o, d, t, beta)
        if grid.backend == "triton":
            *out, ctx.seen = _triton().render(grid.data, grid.lo, grid.h, o, d, t, beta)
            return tuple(out)
        n, S = t.shape
        o, d, t = _flat(o), _flat(d), _flat(t)
        rgb, acc, depth = torch.empty(n, 3), torch.empty(n), torch.empty(n)
        ctx.seen = torch.empty(n, 4, S)  # what the samples saw, so that the backward need not look again
        _lib.lib().hh_render_forward(
            n, S, pointer(o), pointer(d), pointer(t), pointer(grid.data), grid.R, grid._lo, grid.h, float(beta),
            pointer(rgb), pointer(acc), pointer(depth), pointer(ctx.seen), threads(),
        )  # fmt: skip
        return rgb, acc, depth

    @staticmethod
    @once
    def backward(ctx, v_rgb, v_acc, v_depth):
        grid, (o, d, beta, t) = ctx.grid, ctx.saved_tensors
        wants_ray, wants_beta = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        n, S = t.shape
        v_rgb, v_acc, v_depth = _dense(v_rgb, o), _dense(v_acc, o[:, 0]), _dense(v_depth, o[:, 0])
        if grid.backend == "torch":
            with torch.enable_grad():
                inputs = [a.detach().requires_grad_() for a in (grid.data, o, d, beta)]
                f, oo, dd, bb = inputs
                out = grid_torch.render(f, grid.lo, grid.h, oo, dd, t, bb)
                gf, go, gd, gb = torch.autograd.grad(out, inputs, [v_rgb, v_acc, v_depth])
            grid.grad += gf
            return go, gd, gb if wants_beta else None, None, None, torch.zeros_like(grid._anchor)
        if grid.backend == "triton":
            v_o, v_d, gb = _triton().render_backward(
                grid.data, grid.lo, grid.h, o, d, t, beta, ctx.seen, v_rgb, v_acc, v_depth, grid.grad, wants_ray
            )
            return v_o, v_d, gb if wants_beta else None, None, None, torch.zeros_like(grid._anchor)
        o, d, t = _flat(o), _flat(d), _flat(t)
        v_o, v_d = (torch.empty_like(o), torch.empty_like(d)) if wants_ray else (None, None)
        v_beta = torch.empty(n) if wants_beta else None
        scratch = torch.empty(7 * n * S)
        failed = _lib.lib().hh_render_backward(
            n, S, pointer(o), pointer(d), pointer(t), pointer(grid.data), grid.R, grid._lo, grid.h, float(beta),
            pointer(ctx.seen), pointer(v_rgb), pointer(v_acc), pointer(v_depth),
            pointer(grid.grad), pointer(grid._rows), pointer(v_o), pointer(v_d), pointer(v_beta), pointer(scratch),
            threads(),
        )  # fmt: skip
        _check_memory(failed)
        gb = v_beta.sum(dtype=torch.float64).to(beta.dtype).reshape(beta.shape) if wants_beta else None
        return v_o, v_d, gb, None, None, torch.zeros_like(grid._anchor)
