"""Files that are never half-written, and digests of their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing; it takes the name `path` only when the block ends without
    error.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            yield f
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp)
        raise


def write_atomically(path: str | os.PathLike, data: bytes | str, sync: bool = True) -> None:
    """Write `data` to `path`, whole or not at all; `sync=False` is quicker, for one of many files that a stamp
    vouches for.
    """
    with atomic_file(path, sync) as f:
        f.write(data.encode() if isinstance(data, str) else data)


def digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, or of a folder's file names and contents."""
    path, h = Path(path), hashlib.sha256()
    if path.is_dir():
        for p in sorted(p for p in path.rglob("*") if p.is_file()):
            h.update(f"{p.relative_to(path).as_posix()}\0{digest(p)}\n".encode())
        return h.hexdigest()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def _umask() -> int:
    # mkstemp makes files 0600; a finished file should have the permissions of any other file the user writes
    mask = os.umask(0)
    os.umask(mask)
    return mask
