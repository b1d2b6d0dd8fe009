"""Gaussian splatting of one camera: the compiled op, the Triton op and their torch twin behind one function."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from . import _lib, splat_torch
from ._checks import check_size, once
from ._lib import pointer, threads

MAX_IDS, MAX_FEATURES = 12, 32
KINDS = ("3d", "2d")


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
    backend: str | None = None,
    features: Tensor | None = None,
    kind: str = "3d",
) -> tuple[Tensor, Tensor, Tensor]:
    """Depth-sorted alpha compositing on black (Kerbl et al. 2023), with the constants of gsplat's `rasterization`.

    means (N,3) world metres; quats (N,4) wxyz of any length; scales (N,3) metres; opacities (N,); colors (N,3), or
    (N,K,3) SH coefficients when sh_degree (0-3) is given; viewmat (4,4) camera-from-world; K (3,3) pixels; ids (N,)
    int64; features (N,F), F <= 32, composited like colours. kind "2d": disks in the plane of the first two axes (Huang
    et al. 2024), whose third scale is ignored.
    Returns out (H,W,4+F+n_ids): rgb, depth, features and the weight of each body, all premultiplied by alpha; alpha
    (H,W); median (H,W) int32: the Gaussian at which the transmittance falls to 1/2 or less, -1 where it never does.
    Gradients to all floats. Shapes are checked here; finite values are the caller's to check (`check_finite`).
    """
    check_shapes(means, quats, scales, opacities, colors, sh_degree, ids, n_ids, features, kind)
    check_size(width, height)
    if viewmat.shape != (4, 4) or K.shape != (3, 3):
        raise ValueError(f"viewmat is (4,4) and K (3,3), not {tuple(viewmat.shape)} and {tuple(K.shape)}")
    viewmat = like_means("viewmat", viewmat, means)
    if features is not None and not features.shape[1]:
        features = None
    tensors = (means, quats, scales, opacities, colors, viewmat, features)
    chosen = _lib.resolve_backend(backend, *tensors, triton=_triton)
    if chosen == "triton":
        rest = {"features": features, "kind": kind}
        return _triton().rasterize(*tensors[:6], K.to(means), width, height, sh_degree, ids, n_ids, **rest)
    if chosen == "torch":
        rest = (width, height, sh_degree, ids, n_ids, features, kind)
        return splat_torch.rasterize(*tensors[:6], K.to(means), *rest)
    ids = ids.to(torch.int64).contiguous() if n_ids else None
    return _Rasterize.apply(*tensors[:6], K, features, width, height, sh_degree, ids, n_ids, KINDS.index(kind))


def _triton():
    from . import splat_triton

    return splat_triton


def like_means(name: str, t: Tensor, means: Tensor) -> Tensor:
    """t in the dtype of means, differentiably; TypeError where it is not floating point or on another device."""
    if not t.is_floating_point() or t.device != means.device:
        raise TypeError(f"{name} is {t.dtype} on {t.device}; it must be floating point on {means.device}, like means")
    return t.to(means.dtype)


def check_shapes(means, quats, scales, opacities, colors, sh_degree, ids, n_ids, features, kind) -> None:
    """Raises ValueError or TypeError that names what is wrong."""
    n = len(means) if means.ndim else -1
    wanted = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
    for (name, shape), t in zip(wanted.items(), (means, quats, scales, opacities), strict=True):
        if t.shape != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}, not {shape}")
    if sh_degree is not None and (type(sh_degree) is not int or not 0 <= sh_degree <= 3):
        raise ValueError(f"sh_degree is {sh_degree!r}; it must be None or a whole number from 0 to 3")
    coefficients = 0 if sh_degree is None else (sh_degree + 1) ** 2
    if sh_degree is None and colors.ndim == 3 and colors.shape[1:] == (n, 3):
        raise ValueError(f"colors is {tuple(colors.shape)}: colours per camera are not supported; give ({n}, 3)")
    if sh_degree is None and colors.shape != (n, 3):
        raise ValueError(f"colors is {tuple(colors.shape)}, not {(n, 3)}; give sh_degree for coefficients")
    if sh_degree is not None and not (
        colors.ndim == 3 and len(colors) == n and colors.shape[1] >= coefficients and colors.shape[2] == 3
    ):
        raise ValueError(
            f"sh_degree {sh_degree} needs colors of shape ({n}, >={coefficients}, 3), not {tuple(colors.shape)}"
        )
    if features is not None and (features.ndim != 2 or len(features) != n or features.shape[1] > MAX_FEATURES):
        raise ValueError(f"features is {tuple(features.shape)}, not ({n}, <={MAX_FEATURES})")
    if n_ids and (ids is None or ids.shape != (n,)):
        raise ValueError(f"ids must be ({n},) when n_ids is given")
    if not 0 <= n_ids <= MAX_IDS:
        raise ValueError(f"at most {MAX_IDS} bodies in one pass, not {n_ids}")
    if ids is not None and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"ids is {ids.dtype}; it must be whole numbers")
    if ids is not None and ids.device != means.device:
        raise TypeError(f"ids is on {ids.device}, but means is on {means.device}")
    for name, t in (*zip(wanted, (means, quats, scales, opacities), strict=True), ("colors", colors)):
        if not t.is_floating_point():
            raise TypeError(f"{name} is {t.dtype}; it must be floating point")
        if t.dtype != means.dtype or t.device != means.device:
            raise TypeError(f"{name} is {t.dtype} on {t.device}, but means is {means.dtype} on {means.device}")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose from {KINDS}")


def check_finite(**tensors: Tensor | None) -> None:
    """ValueError that names the first tensor with a NaN or an infinity. One pass and one transfer for all.

    Skipped while a CUDA graph is captured, where nothing may be read back.
    """
    tensors = {k: t.detach() for k, t in tensors.items() if t is not None and t.numel()}
    if not tensors:
        return
    if _lib.capturing(*tensors.values()):
        return
    compact = all(t.is_contiguous() for t in tensors.values())
    if compact and _lib.resolve_backend(None, *tensors.values()) == "cpu":
        n, parts = len(tensors), tensors.values()
        arrays = (ctypes.c_void_p * n)(*map(pointer, parts)), (ctypes.c_int64 * n)(*(t.numel() for t in parts))
        if _lib.lib().hh_all_finite(n, *arrays, threads()):
            return
    # A sum of finite numbers is finite unless it overflows, which the exact test below sorts out.
    if math.isfinite(sum(t.sum(dtype=t.dtype) for t in tensors.values()).item()):
        return
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            where = torch.nonzero(~torch.isfinite(t))[0].tolist()
            raise ValueError(f"{name} is not finite, first at index {where}")


def compose(out: Tensor, alpha: Tensor, backgrounds: Tensor | None, backend: str | None = None) -> tuple[Tensor, ...]:
    """Images of what `rasterize` returns for C cameras.

    out (C,H,W,4+E), alpha (C,H,W), backgrounds (C,3) or None for black. Returns color (C,H,W,3) over the background;
    alpha (C,H,W,1); depth (C,H,W,1), 0 where alpha is 0; and the other channels (C,H,W,E).
    """
    if backend != "torch" and _lib.resolve_backend(None, out, alpha, backgrounds) == "cpu":
        return _Compose.apply(out, alpha, backgrounds)
    # one node in the graph, unlike slices
    alpha, (color, depth, rest) = alpha[..., None], out.split([3, 1, out.shape[-1] - 4], -1)
    if backgrounds is not None:
        color = color + (1 - alpha) * backgrounds[:, None, None, :]
    return color, alpha, depth / alpha.clamp(min=1e-10), rest


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, alpha, backgrounds):
        C, H, W, channels = out.shape
        out, alpha = out.detach().contiguous(), alpha.detach().contiguous()
        backgrounds = None if backgrounds is None else backgrounds.detach().contiguous()
        images = [torch.empty(C, H, W, c) for c in (3, 1, 1, channels - 4)]
        _lib.lib().hh_splat_image(
            C, H * W, channels, pointer(out), pointer(alpha), pointer(backgrounds), *map(pointer, images), threads()
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, alpha, backgrounds)
        return tuple(images)

    @staticmethod
    @once
    def backward(ctx, *v_images):
        out, alpha, backgrounds = ctx.saved_tensors
        C, H, W, channels = out.shape
        v_images = [None if v is None else v.contiguous() for v in v_images]
        v_out, v_alpha = torch.empty_like(out), torch.empty_like(alpha)
        v_backgrounds = torch.empty_like(backgrounds) if ctx.needs_input_grad[2] else None
        failed = _lib.lib().hh_splat_image_backward(
            C, H * W, channels, pointer(out), pointer(alpha), pointer(backgrounds), *map(pointer, v_images),
            pointer(v_out), pointer(v_alpha), pointer(v_backgrounds), threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory for the gradients of these images")
        return v_out, v_alpha, v_backgrounds


class _State:
    """Owns what the compiled forward keeps for backward."""

    def __init__(self, address: int):
        self.address, self._free = address, _lib.lib().hh_splat_free

    def __del__(self):
        if getattr(self, "address", None):
            self._free(self.address)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmat, K, features, W, H, sh_degree, ids, n_ids, kind):
        tensors = [t.detach().contiguous() for t in (means, quats, scales, opacities, colors)]
        features = None if features is None else features.detach().contiguous()
        n_features = 0 if features is None else features.shape[1]
        view, ctx.K = viewmat.detach().contiguous(), K.detach()
        intrinsics = ctx.K.to("cpu", torch.float32).contiguous()
        out, alpha = torch.empty(H, W, 4 + n_features + n_ids), torch.empty(H, W)
        median, pairs = torch.empty(H, W, dtype=torch.int32), ctypes.c_int64()
        degree = -1 if sh_degree is None else sh_degree
        address = _lib.lib().hh_splat_forward(
            kind, len(means), W, H, n_features, n_ids, degree, colors.shape[1], *map(pointer, tensors),
            pointer(features), pointer(ids), pointer(view), pointer(intrinsics), pointer(out), pointer(alpha),
            pointer(median), ctypes.byref(pairs), threads(),
        )  # fmt: skip
        if not address:
            raise MemoryError(
                f"{len(means)} Gaussians cover {pairs.value} tiles of 16x16 pixels, more than memory allows; "
                "make their scales smaller, or the image"
            )
        ctx.state = _State(address)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(median)
        ctx.save_for_backward(*tensors, features)
        ctx.shape = out.shape
        return out, alpha, median

    @staticmethod
    @once
    def backward(ctx, v_out, v_alpha, _):
        *tensors, features = ctx.saved_tensors
        if v_out is None and v_alpha is None:
            return (None,) * 14
        v_out = torch.zeros(ctx.shape) if v_out is None else v_out.contiguous()
        v_alpha = None if v_alpha is None else v_alpha.contiguous()
        grads = [torch.empty_like(t) for t in tensors]
        v_features = None if features is None else torch.empty_like(features)
        v_camera = torch.empty(16)
        failed = _lib.lib().hh_splat_backward(
            ctx.state.address, *map(pointer, tensors), pointer(features), pointer(v_out), pointer(v_alpha),
            *map(pointer, grads), pointer(v_features), pointer(v_camera), threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory for the gradients of these Gaussians")
        v_view = torch.zeros(4, 4)
        v_view[:3] = v_camera[:12].view(3, 4)
        v_K = None
        if ctx.needs_input_grad[6]:
            fx, fy, cx, cy = v_camera[12:].tolist()
            v_K = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 0]]).to(ctx.K)
        return (*grads, v_view, v_K, v_features, *(None,) * 6)
