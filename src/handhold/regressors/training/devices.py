"""How a network runs: in mixed precision, as a CUDA graph, on several devices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...datasets.synthetic.sample import map_tensors
from ...errors import UnusableInput
from .config import LoopConfig

_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Mixed:
    """A network called under autocast, whose outputs are fp32; everything else is the network's own.

    Attention does not go through cuDNN: its backward pass gives NaN for queries whose logits are all far below zero,
    where the number of keys is 64 more than a multiple of 128 (PyTorch issue 196678).
    """

    def __init__(self, model: nn.Module, device: torch.device, bf16: bool):
        self.model, self._device, self._bf16 = model, device.type, bf16

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kernels = sdpa_kernel(_ATTENTION) if self._device == "cuda" else nullcontext()
        with kernels, torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            out = self.model(*args, **kwargs)
        return _fp32(out) if self._bf16 else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def _fp32(x: Any) -> Any:
    """Every half-precision tensor in a nest of containers as fp32."""
    if isinstance(x, Tensor):
        return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    if isinstance(x, dict):
        return {k: _fp32(v) for k, v in x.items()}
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(_fp32, x))
    if isinstance(x, (list, tuple)):
        return type(x)(map(_fp32, x))
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _fp32(getattr(x, f.name)) for f in fields(x) if f.init})
    return x


class StepGraph:
    """Forward and backward pass of one task as a CUDA graph: one launch instead of thousands.

    Gradients stay in the parameters' `grad`, which must not be replaced. Inputs of every call have the shapes of the
    first. The global generator's seed is read at each replay.
    """

    def __init__(self, loss: Callable[[Any], tuple[Tensor, dict[str, Tensor]]], inputs: Any, params: list[Tensor]):
        inputs = map_tensors(inputs, torch.clone)
        self.static = _tensors(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their algorithms
                for p in params:
                    p.grad = None
                loss(inputs)[0].backward()
        torch.cuda.current_stream().wait_stream(side)
        for p in params:
            p.grad = None
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss, self.metrics = loss(inputs)
            self.loss.backward()

    def __call__(self, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        for mine, theirs in zip(self.static, _tensors(inputs), strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return self.loss.detach(), {k: v.detach() for k, v in self.metrics.items()}


def _tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(x, lambda t: (found.append(t), t)[1])
    return found


def make_fabric(config: LoopConfig) -> Any:
    """lightning-fabric over `config.devices` processes. Raises `UnusableInput` where it is not installed."""
    try:
        from lightning_fabric import Fabric
    except ImportError:
        try:
            from lightning.fabric import Fabric
        except ImportError as e:
            raise UnusableInput(
                "Training on several devices needs lightning-fabric: pip install 'handhold[train]'."
            ) from e
    kind = torch.device(config.device).type
    fabric = Fabric(accelerator=kind, devices=config.devices, strategy="ddp", precision="32-true")
    fabric.launch()
    return fabric
