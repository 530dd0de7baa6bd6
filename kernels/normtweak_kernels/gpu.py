"""Whether Triton's kernels can run on some tensors, and on which architecture. Triton is imported when a tensor is first met on a GPU."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Below it Triton has no tensor-core code for 16-bit products.
MIN_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 asks for kernels to be executed on the CPU, in numpy: slow, for tests. Read when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def why_missing() -> str:
    """One line that says why Triton is missing (warned of once); empty when it is there."""
    try:
        importlib.import_module("triton")
        return ""
    except ImportError as error:
        reason = str(error).splitlines()[0]
        logger.warning("normtweak runs without Triton's kernels (%s); the torch reference is used on GPUs, slower", reason)
        return reason


@cache
def architecture(index: int | None) -> str:
    """What the compilers call the GPU with this index: sm_80, sm_90, gfx942, ...; sm_80 for the interpreter on the CPU, which has none."""
    if index is None:
        return "sm_80"
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _too_old(index: int) -> str | None:
    if torch.version.hip or torch.cuda.get_device_capability(index) >= MIN_CAPABILITY:
        return None
    return f"the GPU is an {architecture(index)}, older than sm_80"


def refuses(*arguments: Any) -> str | None:
    """Why Triton's kernels can't run on the tensors among the arguments of an op, or None when they can.

    On the CPU they run under TRITON_INTERPRET=1 alone; GPUs are CUDA's from sm_80 on, and ROCm's.
    """
    device = None
    for tensor in arguments:
        if not isinstance(tensor, Tensor):
            continue
        if not (tensor.is_cuda or (tensor.is_cpu and interpreted())):
            return f"a tensor is on {tensor.device}, not on a GPU"
        if device is not None and tensor.device != device:
            return f"the tensors are on {device} and {tensor.device}"
        if tensor.dtype == torch.float64:
            return "float64 is computed by the reference only"
        device = tensor.device
    if device is not None and device.type == "cuda" and (reason := _too_old(device.index)):
        return reason
    return f"Triton is missing ({why_missing()})" if why_missing() else None


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one, which is where Triton launches; does nothing for a tensor on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
