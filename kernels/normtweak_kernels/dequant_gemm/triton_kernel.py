"""dequant_gemm on GPUs: which of Triton's kernels runs, by the number of rows of x, and how it is launched (launch.py, tuning.py).

Activations: "auto" and "int16" multiply x as it is, in 16 bits of floating point with float32 sums; integers of 16 bits would be no faster on a GPU.
"int8" rounds x in torch first, as the definition does. "int8_token" multiplies bytes on the tensor cores, and is rounded in torch for few rows, where
memory takes all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .. import gpu, packing, registry, tuning
from ..launch import DEQUANT_GEMM_GPU, DequantGemmGpu, DequantGemmGpuLists, DequantGemvGpu, nearest_architecture
from .reference import quantize_activations
from .triton_gemm import gemm, gemm_int8, grad_x
from .triton_gemv import MAX_ROWS, gemv

Config = DequantGemvGpu | DequantGemmGpu
# Rows up to which a product is bound by reading the weight on every GPU, and K is split.
FEW_ROWS = 64
# Products of two bytes whose sum surely fits into 32 bits.
MAX_BYTE_SUM = 2**16
# What `warm` times: decoding, batches, prompts; backward the rows of a training step.
WARM_ROWS = tuple(2**i for i in range(13))
WARM_BACKWARD_ROWS = WARM_ROWS[8:]


def _group_size(k: int, groups: int) -> str | None:
    if groups > 1 and k // groups % packing.CHUNK:
        return f"the group size must be all of K or a multiple of {packing.CHUNK}, got {k // groups} of {k}"
    return None


def _refuses(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> str | None:
    reason = gpu.refuses(x, qweight, scales, zeros, bias) or _group_size(x.shape[-1], scales.shape[0])
    few = x.numel() <= MAX_ROWS * x.shape[-1]
    if reason is None and activations == "int8_token" and bits == 8 and scales.shape[0] == 1 and x.shape[-1] > MAX_BYTE_SUM and not few:
        return f"sums of products of two bytes over more than {MAX_BYTE_SUM} columns overflow 32 bits"
    if reason is None and x.dtype == torch.float32 and not few:
        return f"more than {MAX_ROWS} rows of float32 are computed by the reference only: tensor cores would round them"
    return reason


def _refuses_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> str | None:
    if grad.dtype == torch.float32:
        return "a gradient in float32 is computed by the reference only: tensor cores would round it"
    return gpu.refuses(grad, qweight, scales, zeros) or _group_size(k, scales.shape[0])


def lists(device: torch.device) -> DequantGemmGpuLists:
    """The launch configurations of a tensor's GPU."""
    return DEQUANT_GEMM_GPU[nearest_architecture(gpu.architecture(device.index), DEQUANT_GEMM_GPU)]


def _key(regime: str, m: int, n: int, k: int, bits: int, groups: int) -> str:
    # Numbers of rows in one power of two share a choice, and so do those beyond the last one that is tuned.
    return tuning.key("dequant_gemm", regime, M=min(1 << (m - 1).bit_length(), WARM_ROWS[-1]), N=n, K=k, bits=bits, groups=groups)


def candidates(
    available: DequantGemmGpuLists, m: int, bits: int, groups: int, dtype: torch.dtype, activations: str
) -> tuple[str, tuple[Config, ...]]:
    """The regime of a product with m rows of x, and what it may be launched with: the kind of a configuration says which kernel runs."""
    if dtype == torch.float32:
        return "float32", available.gemv
    if activations == "int8_token" and m > MAX_ROWS:
        return "int8", available.int8
    if m <= available.gemv_max_rows:
        return "fewest rows", (*available.gemv, *available.few_rows)
    if m <= min(2 * available.gemv_max_rows, MAX_ROWS):
        return "fewest rows", (*available.few_rows, *available.gemv)
    if m <= FEW_ROWS:
        return "few rows", available.few_rows
    return "many rows", available.products(bits, groups)


def _choose(regime: str, configs: Sequence[Config], m: int, n: int, k: int, bits: int, groups: int, device: torch.device) -> Config:
    """What tuning found for this product; else what `_likely` gives."""
    return tuning.chosen(_key(regime, m, n, k, bits, groups), configs, device.index) or _likely(regime, configs, m, n, lists(device).multiprocessors)


def _likely(regime: str, configs: Sequence[Config], m: int, n: int, multiprocessors: int) -> Config:
    """The first configuration of a kernel without tensor cores; else, up to FEW_ROWS rows, of those that hold them all the first that gives every
    multiprocessor a program, or the one that gives the most; else by its turns.

    Turns are how many tiles a multiprocessor computes one after the other, times a tile's size; the first of at most a tenth more than the fewest.
    """
    if isinstance(configs[0], DequantGemvGpu):
        return configs[0]
    gemms = [config for config in configs if isinstance(config, DequantGemmGpu)]

    def programs(config: DequantGemmGpu) -> int:
        return -(-m // config.block_m) * -(-n // config.block_n)

    if regime == "many rows":
        turns = [-(-programs(config) // multiprocessors) * config.block_m * config.block_n for config in gemms]
        return next(config for config, count in zip(gemms, turns, strict=True) if 10 * count <= 11 * min(turns))
    height = min((config.block_m for config in gemms if config.block_m >= m), default=max(config.block_m for config in gemms))
    gemms = [config for config in gemms if config.block_m == height]
    config = max(gemms, key=lambda config: min(programs(config) * config.split_k, multiprocessors))
    # No more parts of K than give every multiprocessor a few programs.
    split_k = config.split_k
    while split_k > 1 and programs(config) * split_k > 4 * multiprocessors:
        split_k //= 2
    return replace(config, split_k=split_k)


def _launch(
    config: Config, x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str
) -> Tensor:
    """x [M, K] and all others contiguous -> [M, N], by the kernel that the configuration is for."""
    weight = qweight, scales, zeros, bias, bits
    if activations == "int8_token" and x.shape[0] > MAX_ROWS and isinstance(config, DequantGemmGpu):
        return gemm_int8(x, *weight, config)
    rounded = x if activations in ("auto", "int16") else quantize_activations(x, scales.shape[0], activations)
    if isinstance(config, DequantGemvGpu):
        return gemv(rounded, *weight, config, x.dtype)
    return gemm(rounded.to(x.dtype), *weight, config)


@registry.register("dequant_gemm", "triton", _refuses)
def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> Tensor:
    """See the package's docstring."""
    (groups, n), k = scales.shape, x.shape[-1]
    rows = x.reshape(-1, k).contiguous()
    m = rows.shape[0]
    if m == 0:
        return x.new_empty((*x.shape[:-1], n))
    weight = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    config = _choose(*candidates(lists(x.device), m, bits, groups, x.dtype, activations), m, n, k, bits, groups, x.device)
    with gpu.on_device_of(x):
        return _launch(config, rows, *weight, None if bias is None else bias.contiguous(), bits, activations).view(*x.shape[:-1], n)


def warm(n: int, k: int, bits: int, groups: int, symmetric: bool, dtype: torch.dtype, device: torch.device) -> Iterator[str]:
    """Times what a weight [n, k] may be launched with on its GPU, for all WARM_ROWS, backward for WARM_BACKWARD_ROWS, and notes the fastest.

    Yields a line for each.
    """
    qweight = torch.randint(-(2**31), 2**31 - 1, packing.packed_shape(n, k, bits), dtype=torch.int32, device=device)
    scales = torch.rand(groups, n, device=device).half()
    zeros = None if symmetric else torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8, device=device)

    def choose(regime: str, m: int, configs: Sequence[Config], run: Callable[[Any], Tensor]) -> str:
        with gpu.on_device_of(qweight):
            best, microseconds = tuning.tune(configs, run, OutOfResources)
        tuning.note({_key(regime, m, n, k, bits, groups): best}, device.index)
        return f"{n} x {k}, {bits} bits, M = {m}, {regime}: {microseconds:.1f} us, {best}"

    for m in WARM_ROWS:
        x = torch.randn(m, k, dtype=dtype, device=device)
        for activations in ("auto", "int8_token") if m > MAX_ROWS else ("auto",):
            regime, configs = candidates(lists(device), m, bits, groups, dtype, activations)
            yield choose(
                regime, m, configs, partial(_launch, x=x, qweight=qweight, scales=scales, zeros=zeros, bias=None, bits=bits, activations=activations)
            )
    for m in WARM_BACKWARD_ROWS:
        grad = torch.randn(m, n, dtype=dtype, device=device)
        yield choose("backward", m, lists(device).gradients(bits, groups), partial(grad_x, grad, qweight, scales, zeros, bits, k))


@registry.register("dequant_gemm_backward", "triton", _refuses_backward)
def dequant_gemm_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    """See the package's docstring."""
    groups, n = scales.shape
    rows = grad.reshape(-1, n).contiguous()
    if rows.shape[0] == 0:
        return grad.new_empty((*grad.shape[:-1], k))
    weight = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
    config = _choose("backward", lists(grad.device).gradients(bits, groups), rows.shape[0], n, k, bits, groups, grad.device)
    assert isinstance(config, DequantGemmGpu)
    with gpu.on_device_of(grad):
        return grad_x(rows, *weight, bits, k, config).view(*grad.shape[:-1], k)
