"""Synthetic data: pictures of hands and objects with exact truth, kept on disk, and spoilt by a stated amount.

python examples/06_synthetic.py [FOLDER]
"""

import sys
from pathlib import Path

import numpy as np
import torch

from handhold.datasets.masks import write_png
from handhold.datasets.synthetic.corrupt import MaskCorruption, corrupt_masks
from handhold.datasets.synthetic.sample import LABELS, OBJECT
from handhold.datasets.synthetic.scenes import Synth, SynthConfig
from handhold.datasets.synthetic.shards import Shards, write_shards
from handhold.hand import HandModel

COLORS = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.4, 0.3], [0.3, 0.6, 0.9], [0.4, 0.8, 0.4], [0.8, 0.7, 0.3]])


def main(folder: str = "runs/synthetic", samples: int = 16, size: int = 160) -> dict[str, float]:
    # The generator is a function of settings, step and n; "val" and "test" share nothing with "train".
    stream = Synth(SynthConfig(size=size, objects=12, empty=0.1))
    batch = stream.batch(step=0, n=4)
    print(f"{len(batch)} pictures of {size} pixels; labels {', '.join(LABELS)}")

    # The truth is what the hand model gives for the parameters.
    hand = batch.right
    posed = HandModel.open("right").with_shape(hand.betas).with_pose(hand.rotations, hand.transl)
    error = (posed.vertices - hand.vertices)[hand.present].abs().max() if hand.present.any() else torch.zeros(())
    held = 1e3 * (batch.depth[(batch.labels == OBJECT) & (batch.depth > 0)]).median()
    print(
        f"right hands: {int(hand.present.sum())}, posed again within {1e3 * error:.3f} mm; objects {held:.0f} mm away"
    )

    # On disk, and back: the same stream, shuffled anew every epoch.
    write_shards(stream, folder, samples, shard_size=16)
    shards = Shards(folder)
    again = shards.batch(step=3, n=8)
    print(f"{folder}: {shards.size()} pictures; batch 3 has objects {again.object.index.tolist()}")

    # Spoilt masks, as a segmenter might give them.
    masks = (batch.labels == OBJECT).numpy()
    spoilt, _ = corrupt_masks(masks, MaskCorruption(iou=0.75), seed=0)
    seen = masks.any((1, 2))
    iou = ((masks & spoilt).sum((1, 2)) / np.maximum((masks | spoilt).sum((1, 2)), 1))[seen]
    print(f"spoilt object masks: IoU {iou.min():.3f} to {iou.max():.3f}")

    picture = batch.image.permute(0, 2, 3, 1)
    truth = 0.4 * picture + 0.6 * COLORS[batch.labels.long()]
    bad = torch.where(torch.from_numpy(spoilt)[..., None], COLORS[OBJECT], 0.4 * picture)
    sheet = torch.cat([torch.cat(list(x), 1) for x in (picture, truth, bad)])
    write_png(Path(folder) / "sheet.png", (255 * sheet).round().to(torch.uint8).numpy())
    return {"vertices": float(error), "iou": float(iou.mean()), "pictures": shards.size()}


if __name__ == "__main__":
    main(*sys.argv[1:])
