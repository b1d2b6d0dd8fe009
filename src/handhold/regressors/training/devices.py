"""Where a network runs: in mixed precision, and on several devices."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnusableInput
from .config import LoopConfig


class Mixed:
    """A network called under autocast, whose outputs are fp32; everything else is the network's own."""

    def __init__(self, model: nn.Module, device: torch.device, bf16: bool):
        self.model, self._device, self._bf16 = model, device.type, bf16

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
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
