"""What several tests share: a small video made on the spot, and the clip shipped with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from clips import moving_square, write_video


@pytest.fixture
def square_video(tmp_path: Path) -> Path:
    """A readable clip of 12 frames, 96x64, 10 fps."""
    return write_video(tmp_path / "square.mp4", moving_square())


@pytest.fixture(scope="session")
def demo_clip() -> Path:
    """Folder of the clip shipped with the package: video.mp4, K.txt, gt.npz."""
    return Path(str(resources.files("handhold"))) / "data" / "demo"
