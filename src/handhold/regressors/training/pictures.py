"""Predictions to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...files import write_atomically
from ..parametric import HandOutput

COLORS = ((40, 40, 40), (230, 80, 60), (60, 130, 240), (70, 200, 90), (240, 200, 60))  # of LABELS
FINGERS = ((240, 240, 240), (240, 80, 80), (240, 180, 60), (90, 210, 90), (80, 150, 250), (220, 100, 230))


def paint_labels(image: Tensor, labels: Tensor) -> Tensor:
    """Labels (N,H,W) as colours over pictures (N,3,H,W) in [0,1]: (N,H,W,3) uint8."""
    colors = torch.tensor(COLORS, device=image.device, dtype=torch.float32)[labels.long()]
    mix = torch.where(labels > 0, 0.55, 0.0)[..., None]
    return torch.lerp(255 * image.permute(0, 2, 3, 1).float(), colors, mix).clamp(0, 255).to(torch.uint8)


def draw_hands(image: Tensor, out: HandOutput, truth: Tensor) -> Tensor:
    """Crops (N,3,h,w) with the projected skeleton, the vertices and, as white dots, the true joints (N,21,2): (N,h,w,3)
    uint8."""
    import cv2
    import numpy as np

    pictures = (255 * image.permute(0, 2, 3, 1)).clamp(0, 255).to(torch.uint8).cpu().numpy()
    points, true = out.projected.cpu().numpy(), truth.cpu().numpy()
    made = []
    for picture, p, t in zip(pictures, points, true, strict=True):
        picture = np.ascontiguousarray(picture)
        for finger in range(5):
            chain = [0, *range(1 + 4 * finger, 5 + 4 * finger)]
            for a, b in zip(chain, chain[1:], strict=False):
                ends = [tuple(int(v) for v in np.clip(p[i], -999, 9999)) for i in (a, b)]
                cv2.line(picture, *ends, FINGERS[finger + 1], 2, cv2.LINE_AA)
        for x in t:
            cv2.circle(picture, tuple(int(v) for v in np.clip(x, -999, 9999)), 2, (255, 255, 255), -1, cv2.LINE_AA)
        made.append(torch.from_numpy(picture))
    return torch.stack(made)


def write_sheet(path: Path, tiles: Tensor, columns: int = 8) -> None:
    """A contact sheet (PNG) of (N,H,W,3) uint8 pictures, `columns` a row."""
    import cv2

    n, h, w = tiles.shape[:3]
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = tiles.new_zeros(rows * columns, h, w, 3)
    sheet[:n] = tiles
    sheet = sheet.reshape(rows, columns, h, w, 3).transpose(1, 2).reshape(rows * h, columns * w, 3)
    ok, data = cv2.imencode(".png", sheet.flip(-1).cpu().numpy())
    if ok:
        write_atomically(path, data.tobytes())
