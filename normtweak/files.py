"""Files that are there whole or not at all, and where what can be made again is kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models and generated text are kept: $XDG_CACHE_HOME/normtweak or ~/.cache/normtweak."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "normtweak"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block ends without an error. Several processes may write the same file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
