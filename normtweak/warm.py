"""Chooses how kernels are launched on this machine's GPU, for the linears of a packed model: `normtweak bench --warm`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from normtweak_kernels import gpu

from . import formats, models
from .config import require

# Linears of a 7B and an 8B model (attention, gate and up, down projections) at 4 bits in groups of 128, for a call without a model.
DEFAULT_SHAPES = [(4096, 4096, 4, 32, True), (1024, 4096, 4, 32, True), (14336, 4096, 4, 32, True), (4096, 14336, 4, 112, True)]


def shapes(model: str | os.PathLike[str]) -> list[tuple[int, int, int, int, bool]]:
    """(N, K, bits, groups, symmetric) of a packed checkpoint's linears, each once, from its headers and configuration alone."""
    folder = models.ModelFolder(models.resolve(model))
    require(folder.quantization is not None, "bench", "model", "a packed checkpoint", str(model))
    form = formats.open_format(folder.quantization or {})
    found = set()
    for name, (linear, _) in models.packed_linears(folder.skeleton(), folder, form).items():
        if (scheme := form.scheme(name)) is not None:
            found.add((linear.out_features, linear.in_features, scheme.bits, scheme.groups(linear.in_features), scheme.symmetric))
    return sorted(found)


def warm(model: str | os.PathLike[str] | None) -> Iterator[str]:
    """Times launch configurations for a model's linears (of DEFAULT_SHAPES for None) and notes the fastest; yields a line for each.

    Raises ValueError where there is no GPU that the kernels run on.
    """
    missing = "no GPU" if not torch.cuda.is_available() else gpu.refuses(torch.empty(0, device="cuda"))
    require(not missing, "bench", "warm", "called on a machine with a GPU for Triton's kernels", missing)
    from normtweak_kernels.dequant_gemm import triton_kernel

    device = torch.device("cuda", torch.cuda.current_device())
    for n, k, bits, groups, symmetric in DEFAULT_SHAPES if model is None else shapes(model):
        yield from triton_kernel.warm(n, k, bits, groups, symmetric, torch.bfloat16, device)
