"""Settings of the training loop: what holds for every task. Each task adds its own slice (`tasks.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warmup, a cosine to zero, clipped gradients and an averaged copy of the weights."""

    lr: float = 5e-4
    """Peak learning rate; a task may scale it."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and convolutions; biases, norms and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moments."""
    warmup: float = 0.03
    """Share of the training during which the rate rises from zero."""
    floor: float = 0.0
    """The rate at the end, as a share of the peak."""
    trunk: float = 1.0
    """Factor on the rate of pretrained backbones (`trunk` in the network)."""
    clip: float = 1.0
    """Largest norm of a task's gradient; a larger one is scaled down. 0 does not clip."""
    ema: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is evaluated and exported."""


@dataclass(frozen=True)
class DataConfig:
    """How batches come, whatever makes them."""

    batch: int = 32
    """Pictures a batch, on each device."""
    repeats: int = 1
    """How often each generated batch is used, each time with another crop and augmentation."""
    spacing: int = 4
    """Uses of one batch lie this many batches apart, so that neighbouring steps see different pictures."""
    workers: int = 0
    """Processes that make batches ahead of time, on the same device; 0 makes them in the loop."""
    prefetch: int = 2
    """Batches that each worker process keeps ready."""


@dataclass(frozen=True)
class LoopConfig:
    """Length, rhythm and place of a training."""

    steps: int = 20_000
    """Optimizer steps; with a time budget, the most of them."""
    budget_seconds: float = 0.0
    """Wall time of the whole training, set-up included; the schedule follows the clock and reaches zero within it.
    0 trains for `steps`."""
    reserve_seconds: float = 15.0
    """Part of the budget kept for the last evaluation and export."""
    seed: int = 0
    """Seed of the weights, the augmentations and the stream."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    devices: int = 1
    """Processes, one device each; more than one needs lightning-fabric (`pip install 'handhold[train]'`)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the networks; `auto` is bf16 on CUDA and fp32 elsewhere. Losses are always fp32."""
    compile: bool = False
    """Compile the networks with torch.compile."""
    graphs: bool = False
    """On CUDA, run each task's forward and backward pass as one CUDA graph."""
    log_steps: int = 50
    """Steps between lines of metrics.jsonl."""
    val_steps: int = 1000
    """Steps between evaluations on held-out data."""
    val_batches: int = 4
    """Batches of an evaluation."""
    state_steps: int = 0
    """Steps between saved states; 0 saves by time alone."""
    state_seconds: float = 120.0
    """Seconds between saved states, from which an interrupted training goes on exactly."""
    export_seconds: float = 120.0
    """Seconds between exports of the averaged weights, so that a training cut off for good leaves some."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
