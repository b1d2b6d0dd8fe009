"""A stream and a task small enough to train in a second; run as a script it trains them, for tests that kill it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from handhold.regressors.training.config import DataConfig, LoopConfig, OptimConfig
from handhold.regressors.training.loop import Trained, train
from handhold.regressors.training.streams import seed_of


@dataclass(frozen=True)
class Points:
    """A batch: inputs and what they map to."""

    x: Tensor
    y: Tensor

    def to(self, device) -> Points:
        return Points(self.x.to(device), self.y.to(device))


class PointStream:
    """Noisy values of a fixed function."""

    def __init__(self, device):
        self.device = device
        self.asked: list[tuple[int, str]] = []

    def batch(self, step: int, n: int, split: str = "train") -> Points:
        self.asked.append((step, split))
        g = torch.Generator().manual_seed(seed_of("points", step, split))
        x = torch.rand(n, 4, generator=g)
        return Points(x, torch.stack([x.sum(1), (x * x).sum(1)], 1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 32), nn.Dropout(0.1), nn.Linear(32, 2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen += 1
        return {"y": self.b(self.drop(torch.tanh(self.a(x))))}


@dataclass(frozen=True)
class PointTask:
    name: str = "points"
    lr: float = 1.0

    def build(self) -> nn.Module:
        return Net()

    def inputs(self, batch, seed):
        noise = 0.01 * torch.randn(batch.x.shape, generator=torch.Generator().manual_seed(seed))
        return batch.x + noise, batch.y, noise

    def loss(self, model, inputs):
        x, y, noise = inputs
        return (model(x)["y"] - y).square().mean(), {"noise": noise.std()}

    def evaluate(self, model, batch):
        error = (model(batch.x)["y"] - batch.y).abs()
        return {"error": torch.stack([error.sum(), torch.tensor(float(error.numel()))])}

    def pictures(self, model, batch):
        return (model(batch.x)["y"][:, :, None, None].clamp(0, 1) * 255).expand(-1, 2, 3, 3).to(torch.uint8)

    def save(self, path, model, extra):
        tensors = {k: v.clone() for k, v in model.state_dict().items()}
        save_file(tensors, path, {k: json.dumps(v) for k, v in extra.items()})


SMALL = LoopConfig(
    steps=120,
    log_steps=20,
    val_steps=60,
    val_batches=2,
    state_steps=10,
    optim=OptimConfig(lr=1e-2, ema=0.9),
    data=DataConfig(batch=16, repeats=3, spacing=2),
)
TASKS = (PointTask(), PointTask("again", 0.5))


def run(out: Path, config: LoopConfig = SMALL, **kwargs) -> Trained:
    torch.set_num_threads(1)
    return train(TASKS, PointStream, config, out, settings={"lr": config.optim.lr}, **kwargs)


if __name__ == "__main__":
    run(Path(sys.argv[1]), report=lambda fraction, text="", **m: print(text, flush=True))
