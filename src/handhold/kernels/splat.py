"""3D Gaussian splatting of one camera: the compiled op and its torch twin behind one function."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _lib, splat_torch
from ._lib import pointer, threads

MAX_IDS = 12


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
) -> tuple[Tensor, Tensor]:
    """Depth-sorted alpha compositing on black (Kerbl et al. 2023), with the constants of gsplat's `rasterization`.

    means (N,3) world metres; quats (N,4) wxyz of any length; scales (N,3) metres; opacities (N,); colors (N,3), or
    (N,K,3) SH coefficients when sh_degree (0-3) is given; viewmat (4,4) camera-from-world; K (3,3) pixels, no gradient;
    ids (N,) int64.
    Returns out (H,W,4+n_ids): rgb, depth and the weight of each body, all premultiplied by alpha; and alpha (H,W).
    """
    n = len(means)
    wanted = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
    for (name, shape), t in zip(wanted.items(), (means, quats, scales, opacities), strict=True):
        if t.shape != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}, not {shape}")
    coefficients = 0 if sh_degree is None else (sh_degree + 1) ** 2
    if sh_degree is None and colors.shape != (n, 3):
        raise ValueError(f"colors is {tuple(colors.shape)}, not {(n, 3)}; give sh_degree for coefficients")
    if sh_degree is not None and not (
        0 <= sh_degree <= 3
        and colors.ndim == 3
        and len(colors) == n
        and colors.shape[1] >= coefficients
        and colors.shape[2] == 3
    ):
        raise ValueError(
            f"sh_degree {sh_degree} needs colors of shape ({n}, >={coefficients}, 3), not {tuple(colors.shape)}"
        )
    if n_ids and (ids is None or ids.shape != (n,)):
        raise ValueError(f"ids must be ({n},) when n_ids is given")
    if n_ids > MAX_IDS:
        raise ValueError(f"at most {MAX_IDS} bodies in one pass, not {n_ids}")
    K = K.detach()
    if _lib.resolve_backend(backend, means, quats, scales, opacities, colors, viewmat) == "torch":
        return splat_torch.rasterize(
            means, quats, scales, opacities, colors, viewmat, K.to(means), width, height, sh_degree, ids, n_ids
        )
    ids = ids.to(torch.int64).contiguous() if n_ids else None
    return _Rasterize.apply(means, quats, scales, opacities, colors, viewmat, K, width, height, sh_degree, ids, n_ids)


class _State:
    """Owns what the compiled forward keeps for backward."""

    def __init__(self, address: int | None):
        if not address:
            raise MemoryError("not enough memory to rasterise these Gaussians")
        self.address, self._free = address, _lib.lib().hh_splat_free

    def __del__(self):
        if getattr(self, "address", None):
            self._free(self.address)


class _Rasterize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, means, quats, scales, opacities, colors, viewmat, K, width, height, sh_degree, ids, n_ids):
        tensors = [t.detach().contiguous() for t in (means, quats, scales, opacities, colors)]
        view, K = viewmat.detach().contiguous(), K.to("cpu", torch.float32).contiguous()
        out, alpha = torch.empty(height, width, 4 + n_ids), torch.empty(height, width)
        degree = -1 if sh_degree is None else sh_degree
        ctx.state = _State(
            _lib.lib().hh_splat_forward(
                len(means), width, height, n_ids, degree, colors.shape[1], *map(pointer, tensors), pointer(ids),
                pointer(view), pointer(K), pointer(out), pointer(alpha), threads(),
            )
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.shape = out.shape
        return out, alpha

    @staticmethod
    def backward(ctx, v_out, v_alpha):
        tensors = ctx.saved_tensors
        if v_out is None and v_alpha is None:
            return (None,) * 12
        v_out = torch.zeros(ctx.shape) if v_out is None else v_out.contiguous()
        v_alpha = None if v_alpha is None else v_alpha.contiguous()
        grads = [torch.empty_like(t) for t in tensors]
        v_view = torch.zeros(4, 4)
        failed = _lib.lib().hh_splat_backward(
            ctx.state.address, *map(pointer, tensors), pointer(v_out), pointer(v_alpha), *map(pointer, grads),
            pointer(v_view), threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory for the gradients of these Gaussians")
        return (*grads, v_view, *(None,) * 6)
