"""Our own networks on disk: one safetensors file, with the settings of the network as JSON in its header.

No pickle. Floating weights are stored as float16 unless told otherwise and loaded as float32; integer tensors and
buffers keep their type. `load_model` builds the network named in the header and fills it exactly.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from ..errors import MissingAsset, UnusableInput
from ..files import write_atomically

FORMAT = "handhold-network-1"
MAX_BYTES = 4 << 30
# name in the header -> (module beside this one, class of the network, class of its settings)
NETWORKS: dict[str, tuple[str, str, str]] = {
    "parametric": ("parametric", "ParametricHand", "ParametricConfig"),
    "direct": ("direct", "DirectHand", "DirectConfig"),
    "segmenter": ("segmenter", "Segmenter", "SegmenterConfig"),
    "wilor": ("wilor", "WilorHand", "WilorConfig"),
    "metro": ("metro", "MetroHand", "MetroConfig"),
}


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    extra: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    max_bytes: int | None = None,
) -> int:
    """Write `model` (with a dataclass `model.config`, of a class in `NETWORKS`) to `path`; returns its size in bytes.

    extra: anything that goes into JSON: steps, data, scores. max_bytes: refuse a larger file (ValueError).
    Raises ValueError when a weight is not finite or does not survive the conversion to `dtype`.
    """
    from safetensors.torch import save

    name = next((k for k, (_, net, _) in NETWORKS.items() if type(model).__name__ == net), None)
    if name is None or not is_dataclass(model.config):
        raise ValueError(f"{type(model).__name__} is not a network that checkpoints know: {', '.join(NETWORKS)}")
    tensors = {}
    for key, value in model.state_dict().items():
        value = value.detach().to("cpu")
        if value.is_floating_point():
            value = value.to(dtype)
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key} holds values that are not finite in {dtype}")
        tensors[key] = value.contiguous().clone()
    header = {
        "format": FORMAT,
        "network": name,
        "config": json.dumps(asdict(model.config), sort_keys=True),
        "extra": json.dumps(extra or {}, sort_keys=True),
    }
    data = save(tensors, metadata=header)
    if max_bytes is not None and len(data) > max_bytes:
        raise ValueError(f"{Path(path).name} would be {len(data)} bytes, more than {max_bytes}")
    write_atomically(path, data)
    return len(data)


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """{"network": name, "config": dict, "extra": dict} of a checkpoint.

    Raises MissingAsset when there is no file, UnusableInput when it is not one of ours.
    """
    path = Path(path)
    _look(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
        if header.get("format") != FORMAT or header.get("network") not in NETWORKS:
            raise UnusableInput(f"{path} is not a network of this version of handhold; train or fetch it again.")
        out = {"network": header["network"], "config": json.loads(header["config"])}
        out["extra"] = json.loads(header.get("extra", "{}"))
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UnusableInput(f"{path} is damaged or not a safetensors file; train or fetch it again.") from e
    return out


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu") -> nn.Module:
    """The network of a checkpoint, in evaluation mode and float32, on `device`. `model.extra` is what was saved with
    it.

    Raises MissingAsset when there is no file, UnusableInput when it is damaged or of another version.
    """
    header = read_header(path)
    module, net, settings = NETWORKS[header["network"]]
    module = importlib.import_module(f".{module}", __package__)
    again = f"{path} was made by another version of handhold; train or fetch it again."
    try:
        model = getattr(module, net)(from_dict(getattr(module, settings), header["config"]))
    except (TypeError, ValueError, KeyError) as e:
        raise UnusableInput(again) from e
    from safetensors.torch import load

    state = load(Path(path).read_bytes())
    wanted = model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in wanted.items()}:
        raise UnusableInput(again)
    model.load_state_dict({k: v.to(wanted[k].dtype) for k, v in state.items()})
    model.extra = header["extra"]
    return model.to(device).eval()


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """A frozen dataclass from what `asdict` and JSON made of it: nested dataclasses, lists back to tuples.

    Raises ValueError for an unknown field.
    """
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    if unknown := values.keys() - names:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)[0]!r}")

    def back(value: Any, kind: Any) -> Any:
        if isinstance(value, dict) and isinstance(kind, type) and is_dataclass(kind):
            return from_dict(kind, value)
        return tuple(back(v, None) for v in value) if isinstance(value, list) else value

    return cls(**{k: back(v, hints[k]) for k, v in values.items()})


def _look(path: Path) -> None:
    if not path.is_file():
        raise MissingAsset(f"The network {path} does not exist; give the path of a checkpoint, or train one.")
    if path.stat().st_size > MAX_BYTES:
        raise UnusableInput(f"{path} is larger than any network of ours ({MAX_BYTES >> 30} GB).")
