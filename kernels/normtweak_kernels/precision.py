"""The dtypes of activations, and torch's precision of float32 products, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# What the ops take as activations; torch has floats of 8 bits and fewer, which it doesn't compute with either.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Float32 products as torch.set_float32_matmul_precision(name) makes them, and as before afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
