"""How much memory a run takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Peak resident bytes of this process while open, above what it held when opened.

    Linux forgets the old peak on request (/proc/self/clear_refs); elsewhere the peak is the process's own since its start.
    """

    peak: int = 0

    def __enter__(self) -> PeakMemory:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._start = _status("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.peak = _status("VmHWM") - self._start


def release() -> None:
    """Hand memory that nothing refers to back to the system: what glibc keeps of one stage for later would be on top of what the next one takes."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where no GPU was used
    with contextlib.suppress(AttributeError, OSError):  # elsewhere than with glibc
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # bytes on macOS, else KiB
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
