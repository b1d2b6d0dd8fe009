"""Differentiable splatting: Gaussians on a sheet in front of the camera learn to look like one video frame.

python examples/03_splat.py [OUT.png]
"""

import sys
from importlib import resources
from pathlib import Path

import torch

from handhold import read_video
from handhold.datasets.masks import write_png
from handhold.losses import photometric, psnr
from handhold.render import splat


def main(out: str | None = None, steps: int = 60, count: int = 600) -> float:
    clip = Path(str(resources.files("handhold"))) / "data" / "demo" / "video.mp4"
    sequence = read_video(clip, end=1.0, max_side=96)
    width, height = sequence.size
    target = torch.from_numpy(sequence.frames[0]).float() / 255
    K = torch.from_numpy(sequence.K).float()

    # half a metre away, as wide as the picture; what is optimised lives in logarithms and logits, so it stays in range
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
    means = torch.cat([(pixels - K[:2, 2]) / K[[0, 1], [0, 1]] * 0.5, torch.full((count, 1), 0.5)], 1)
    spacing = 0.5 * (width * height / count) ** 0.5 / float(K[0, 0])
    parameters = {
        "means": means,
        "quats": torch.tensor([1.0, 0, 0, 0]).repeat(count, 1),
        "scales": torch.full((count, 3), 0.6 * spacing).log(),
        "opacities": torch.zeros(count),
        "colors": torch.zeros(count, 3),
    }
    rates = {"means": 0.1 * spacing, "quats": 0.02, "scales": 0.05, "opacities": 0.1, "colors": 0.15}
    parameters = {k: v.clone().requires_grad_() for k, v in parameters.items()}
    optimiser = torch.optim.Adam([{"params": [v], "lr": rates[k]} for k, v in parameters.items()], fused=True)

    def picture() -> torch.Tensor:
        p = parameters
        values = (p["means"], p["quats"], p["scales"].exp(), p["opacities"].sigmoid(), p["colors"].sigmoid())
        return splat(*values, torch.eye(4)[None], K[None], width, height).color[0]

    with torch.no_grad():
        print(f"{count} Gaussians, {width}x{height}: {psnr(picture(), target):.1f} dB at the start")
    for step in range(steps):
        loss = photometric(picture(), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    with torch.no_grad():
        made = picture()
    quality = float(psnr(made, target))
    print(f"{quality:.1f} dB")
    if out:
        both = torch.cat([target, made], 1).clamp(0, 1).mul(255).round().byte()
        write_png(out, both.numpy())
        print("wrote", out)
    return quality


if __name__ == "__main__":
    main(*sys.argv[1:2])
