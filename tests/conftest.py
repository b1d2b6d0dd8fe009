"""What several tests share: a small video made on the spot, and the clip shipped with the package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from clips import moving_square, write_video

# Tests say which engine they mean. Removed here as well as in the fixture: the compiled library is loaded, and its
# instruction set chosen, while tests are collected.
for name in ("HANDHOLD_BACKEND", "HANDHOLD_ISA"):
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test inherits a choice of engine that another one left behind."""
    for name in ("HANDHOLD_BACKEND", "HANDHOLD_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors as small as those of tests are slower on several threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def square_video(tmp_path: Path) -> Path:
    """A readable clip of 12 frames, 96x64, 10 fps."""
    return write_video(tmp_path / "square.mp4", moving_square())


@pytest.fixture(scope="session")
def demo_clip() -> Path:
    """Folder of the clip shipped with the package: video.mp4, K.txt, gt.npz."""
    return Path(str(resources.files("handhold"))) / "data" / "demo"
