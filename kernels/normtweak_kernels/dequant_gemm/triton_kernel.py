"""dequant_gemm on GPUs: which of Triton's kernels runs, by the number of rows of x, and how it is launched (launch.py, tuning.py).

Activations: "auto" and "int16" multiply x as it is, in 16 bits of floating point with float32 sums; integers of 16 bits would be no faster on a GPU.
"int8" rounds x in torch first, as the definition does. "int8_token" multiplies bytes on the tensor cores, and is rounded in torch for few rows, where
memory takes all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .. import gpu, registry, tuning
from ..launch import DEQUANT_GEMM_GPU, DequantGemmGpu, DequantGemmGpuLists, DequantGemvGpu, nearest_architecture
from . import triton_gemm
from .reference import quantize_activations
from .triton_gemm import gemm, gemm_int8, grad_x, quantize_tokens
from .triton_gemv import MAX_ROWS, gemv

Config = TypeVar("Config", DequantGemvGpu, DequantGemmGpu)
# Rows up to which a product is bound by reading the weight on every GPU, and K is split.
FEW_ROWS = 64


def _refuses(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> str | None:
    reason = gpu.refuses(x, qweight, scales, zeros, bias) or triton_gemm.refuses(x.shape[-1], scales.shape[0], bits)
    if reason is None and x.dtype == torch.float32 and x.numel() > MAX_ROWS * x.shape[-1]:
        return f"more than {MAX_ROWS} rows of float32 are computed by the reference only: tensor cores would round them"
    return reason


def _refuses_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> str | None:
    if grad.dtype == torch.float32:
        return "a gradient in float32 is computed by the reference only: tensor cores would round it"
    return gpu.refuses(grad, qweight, scales, zeros) or triton_gemm.refuses(k, scales.shape[0], bits)


def lists(device: torch.device) -> DequantGemmGpuLists:
    """The launch configurations of a tensor's GPU."""
    return DEQUANT_GEMM_GPU[nearest_architecture(gpu.architecture(device.index), DEQUANT_GEMM_GPU)]


def _key(regime: str, m: int, n: int, k: int, bits: int, groups: int) -> str:
    # Numbers of rows in one power of two share a choice.
    return tuning.key("dequant_gemm", regime, M=1 << (m - 1).bit_length(), N=n, K=k, bits=bits, groups=groups)


def _choose(configs: Sequence[Config], regime: str, m: int, n: int, k: int, bits: int, groups: int, device: torch.device) -> Config:
    """What tuning found for this product, else the first of the list whose tile holds all rows, else the one with the tallest tile."""
    found = tuning.chosen(_key(regime, m, n, k, bits, groups), configs, device.index)
    if found is not None:
        return found
    first = configs[0]
    if isinstance(first, DequantGemvGpu):
        return first
    tiles = [config.block_m for config in configs]
    height = min((tile for tile in tiles if tile >= m), default=max(tiles))
    config = next(config for config in configs if config.block_m == height)
    # No more parts of K than give every multiprocessor two programs.
    programs = -(-m // config.block_m) * -(-n // config.block_n)
    split_k = config.split_k
    while split_k > 1 and programs * split_k > 4 * lists(device).multiprocessors:
        split_k //= 2
    return replace(config, split_k=split_k)


def _rounded(x: Tensor, groups: int, activations: str) -> Tensor:
    return x if activations in ("auto", "int16") else quantize_activations(x, groups, activations)


@registry.register("dequant_gemm", "triton", _refuses)
def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> Tensor:
    """See the package's docstring."""
    (groups, n), k = scales.shape, x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    if m == 0:
        return x.new_empty((*x.shape[:-1], n))
    weight = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    bias = None if bias is None else bias.contiguous()
    available, shape = lists(x.device), (m, n, k, bits, groups, x.device)
    with gpu.on_device_of(x):
        if m <= available.gemv_max_rows or x.dtype == torch.float32:
            config = _choose(available.gemv, "gemv", *shape)
            y = gemv(_rounded(rows, groups, activations), *weight, bias, bits, config, x.dtype)
        elif activations == "int8_token":
            y = gemm_int8(*quantize_tokens(rows), *weight, bias, bits, _choose(available.int8, "int8", *shape), x.dtype)
        else:
            regime, configs = ("few rows", available.few_rows) if m <= FEW_ROWS else ("many rows", available.many_rows)
            y = gemm(_rounded(rows, groups, activations).to(x.dtype), *weight, bias, bits, _choose(configs, regime, *shape))
    return y.view(*x.shape[:-1], n)


@registry.register("dequant_gemm_backward", "triton", _refuses_backward)
def dequant_gemm_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    """See the package's docstring."""
    groups, n = scales.shape
    rows = grad.reshape(-1, n).contiguous()
    if rows.shape[0] == 0:
        return grad.new_empty((*grad.shape[:-1], k))
    weight = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    config = _choose(lists(grad.device).backward, "backward", rows.shape[0], n, k, bits, groups, grad.device)
    with gpu.on_device_of(grad):
        return grad_x(rows, *weight, bits, k, config).view(*grad.shape[:-1], k)
