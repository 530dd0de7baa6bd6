"""Loads the C++ module, or says in one line why it is not there."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# torch's dtypes as the C++ module names them.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@cache
def _load() -> tuple[ModuleType | None, str]:
    # torch is imported above, before the module: its OpenMP runtime must be the one that the module's symbols resolve to, so
    # that both share one thread pool.
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


def loaded() -> ModuleType:
    """The compiled module, for code that `refuses` keeps from running without it. Raises ValueError where it is missing."""
    native = module()
    if native is None:
        raise ValueError(f"native: the compiled module must be built, got {why_missing()}")
    return native


def refuses(*tensors: Tensor | None) -> str | None:
    """Why the C++ kernels can't run on these tensors (None among them is skipped), or None when they can."""
    for tensor in tensors:
        if tensor is not None and tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}, not on the CPU"
        if tensor is not None and tensor.dtype == torch.float64:
            return "float64 is computed by the reference only"
    return None if module() is not None else f"the C++ module is missing ({why_missing()})"


def address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
