"""Loads the C++ module, or says in one line why it is not there."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

logger = logging.getLogger(__name__)


@cache
def _load() -> tuple[ModuleType | None, str]:
    # torch first: its OpenMP runtime must be the one that the module's symbols resolve to, so that both share one thread pool.
    import torch  # noqa: F401

    try:
        return importlib.import_module("normtweak_kernels._native"), ""
    except ImportError as error:
        reason = str(error).splitlines()[0]
        logger.warning("normtweak runs without native kernels (%s); the torch reference is used, slower", reason)
        return None, reason


def module() -> ModuleType | None:
    """The compiled module `normtweak_kernels._native`, or None where it was not built (warned of once)."""
    return _load()[0]


def why_missing() -> str:
    """One line that says why the compiled module is missing; empty when it is there."""
    return _load()[1]
