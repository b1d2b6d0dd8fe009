"""The state of a training on disk: one safetensors file, whole or absent, with the numbers in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ...errors import UnusableInput
from ...files import write_atomically


def save_state(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write tensors and JSON values so that a crash at any moment leaves the old file or the new one."""
    data = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, {"state": json.dumps(values)})
    write_atomically(path, data)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_state` wrote, on the CPU. Raises `UnusableInput`."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["state"])  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UnusableInput(f"{path} is not a training state of this version; use another --out.") from e
    except Exception as e:  # SafetensorError is not an OSError
        if type(e).__name__ != "SafetensorError":
            raise
        raise UnusableInput(f"{path} is damaged; remove it to train from the start.") from e


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The moments of every parameter as `name/key`."""
    out = {}
    for p, entries in optimizer.state.items():
        out |= {f"{names[p]}/{k}": v if isinstance(v, Tensor) else torch.tensor(v) for k, v in entries.items()}
    return out


def restore_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, on each parameter's device."""
    for p, name in names.items():
        found = {k.rsplit("/", 1)[1]: v for k, v in tensors.items() if k.rsplit("/", 1)[0] == name}
        if found:
            optimizer.state[p] = {k: v.to(p.device) for k, v in found.items()}


def restore_module(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into a module; every parameter and buffer of its state must be there."""
    own = module.state_dict()
    if set(own) != set(tensors) or any(own[k].shape != tensors[k].shape for k in own):
        raise UnusableInput("The saved training is of another network; use another --out.")
    module.load_state_dict(tensors)


def strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
