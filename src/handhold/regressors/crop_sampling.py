"""Reading crops out of pictures: antialiased, batched, on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def inverse(m: Tensor) -> Tensor:
    """Inverse of regular (N,3,3), through float64 and without waiting for the device."""
    return torch.linalg.inv_ex(m.double())[0].to(m.dtype)


def apply(homography: Tensor, points: Tensor) -> Tensor:
    """Homographies (N,3,3) on points (N,P,2)."""
    out = points @ homography[:, :, :2].mT + homography[:, None, :, 2]
    return out[..., :2] / out[..., 2:]


def sample_crops(pictures: Tensor, picture: Tensor, crop_from_image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops (N,3,h,w) of pictures (B,3,H,W), zero outside; antialiased.

    picture (N,) int64 row of each crop; crop_from_image (N,3,3). Where a crop is coarser than the picture, it is read
    at four places per pixel, from a picture halved (area mean) until it is at most twice too fine. No synchronisation
    with the device while pictures are less than twice as large as crops.
    """
    h, w = size
    height, width = pictures.shape[-2:]
    image_from_crop = inverse(crop_from_image)
    at = image_from_crop @ image_from_crop.new_tensor([w / 2, h / 2, 1.0])  # the crop's middle
    jacobian = image_from_crop[:, :2, :2] - at[:, :2, None] / at[:, 2:, None] * image_from_crop[:, 2:, :2]
    area = jacobian[:, 0, 0] * jacobian[:, 1, 1] - jacobian[:, 0, 1] * jacobian[:, 1, 0]
    step = area.abs().sqrt() / at[:, 2].abs()  # picture pixels per crop pixel
    most = max(0, math.floor(math.log2(max(1.0, max(height / h, width / w)))))
    level = step.clamp_min(1e-6).log2().floor().clamp(0, most)
    passes = [(k, 2, level == k) for k in range(most + 1)]
    if pictures.device.type == "cpu":  # one place is enough where the crop is finer than the picture
        passes = [(0, 1, step <= 1.1), (0, 2, (level == 0) & (step > 1.1)), *passes[1:]]
    elif most == 0:
        passes = [(0, 2, None)]
    out = pictures.new_zeros(len(picture), 3, h, w)
    for k, places, chosen in passes:
        rows = slice(None) if chosen is None else chosen.nonzero()[:, 0]
        if chosen is not None and len(rows) == 0:
            continue
        ys = (torch.arange(h * places, device=pictures.device) + 0.5) / places
        xs = (torch.arange(w * places, device=pictures.device) + 0.5) / places
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        where = torch.stack([x, y, torch.ones_like(x)], -1).reshape(-1, 3) @ image_from_crop[rows].mT
        where = (where[..., :2] / where[..., 2:].clamp_min(1e-6)).unflatten(1, y.shape)
        source, n = pictures, 2**k
        if k:  # what the halves leave over at the far edges is padded
            source = F.pad(pictures, (0, -width % n, 0, -height % n), mode="replicate")
            source = F.avg_pool2d(source.float(), n).to(pictures.dtype)
        grid = where * where.new_tensor([2 / (n * source.shape[-1]), 2 / (n * source.shape[-2])]) - 1
        source = source.expand(len(grid), -1, -1, -1) if len(source) == 1 else source[picture[rows]]
        read = F.grid_sample(source, grid.to(pictures.dtype), align_corners=False)
        if places > 1:  # the mean of four; quicker than a pooling
            read = read[..., 0::2, :] + read[..., 1::2, :]
            read = (read[..., 0::2] + read[..., 1::2]) / 4
        out[rows] = read
    return out


def planes(image: Tensor, homography: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The part of an (H,W,3) picture that crops show, as (1,3,h,w) floats, and the homographies from it."""
    h, w = size
    x0, y0, x1, y1 = 0, 0, image.shape[1], image.shape[0]
    if image.device.type == "cpu" and len(homography):
        corners = homography.new_tensor([[0, 0], [w, 0], [0, h], [w, h]]).expand(len(homography), 4, 2)
        seen = apply(inverse(homography), corners).flatten(0, 1)
        low, high = seen.amin(0).floor().tolist(), seen.amax(0).ceil().tolist()
        rim = 16  # halved pictures and bilinear reading look a little beyond
        x0, y0 = (min(max(int(v) - rim, 0), n - 1) for v, n in zip(low, (x1, y1), strict=True))
        x1, y1 = (max(min(int(v) + rim, n), o + 1) for v, n, o in zip(high, (x1, y1), (x0, y0), strict=True))
        x0, y0 = x0 - x0 % 32, y0 - y0 % 32  # halving pairs up the same pixels as it would in the whole picture
    part = image[y0:y1, x0:x1].permute(2, 0, 1)[None].contiguous()
    part = part.float() / 255 if part.dtype == torch.uint8 else part
    shift = torch.eye(3, device=image.device)
    shift[0, 2], shift[1, 2] = x0, y0
    return part, homography @ shift
