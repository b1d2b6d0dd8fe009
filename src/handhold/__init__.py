"""handhold: one video of hands handling an object in; hands and object out in 3D, in metres.

    import handhold
    result = handhold.run("video.mp4", "runs/video", handhold.Config())
    scene = handhold.Scene.load(result.run.scene_path)

Names are imported when first used, so `import handhold` is quick.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# OpenMP threads that wait by spinning slow everything else on a busy machine many times over: let them sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"

_NAMES = {
    "Body": "scene",
    "Landmarks": "scene",
    "Mesh": "scene",
    "Rigid": "scene",
    "Scene": "scene",
    "Sequence": "scene",
    "Skinned": "scene",
    "Config": "config",
    "HandholdError": "errors",
    "MissingAsset": "errors",
    "StageFailed": "errors",
    "UnusableInput": "errors",
    "read_video": "datasets.video",
    "run": "pipeline",
    "Run": "runs",
    "open_run": "runs",
}

__all__ = [*_NAMES, "__version__"]

if TYPE_CHECKING:
    from .config import Config as Config
    from .datasets.video import read_video as read_video
    from .errors import HandholdError as HandholdError
    from .errors import MissingAsset as MissingAsset
    from .errors import StageFailed as StageFailed
    from .errors import UnusableInput as UnusableInput
    from .pipeline import run as run
    from .runs import Run as Run
    from .runs import open_run as open_run
    from .scene import Body as Body
    from .scene import Landmarks as Landmarks
    from .scene import Mesh as Mesh
    from .scene import Rigid as Rigid
    from .scene import Scene as Scene
    from .scene import Sequence as Sequence
    from .scene import Skinned as Skinned


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'handhold' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
