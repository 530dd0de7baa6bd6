"""The packed product on a GPU beside torch's dense 16-bit one, torch's int4 product, and gemlite, Marlin and bitsandbytes where installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from normtweak_kernels import dequant_gemm, packing

SHAPES = [(576, 1536), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 256, 2048]
GROUP_SIZE = 64
DEVICE = "cuda"
Call = Callable[[], Tensor]


def torch_int4(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    """torch's own 4-bit product (bfloat16)."""
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    scales_and_zeros = torch.stack([scales.bfloat16(), torch.zeros_like(scales).bfloat16()], -1).contiguous()
    return lambda: torch._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_and_zeros)


def gemlite(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    """gemlite's Triton kernels, of the same bits."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

    n, k = codes.shape
    dtype = TORCH_TO_DTYPE[x.dtype]
    linear = GemLiteLinearTriton(4, group_size=GROUP_SIZE, in_features=k, out_features=n, input_dtype=dtype, output_dtype=dtype)
    linear.pack(codes, scales.t().reshape(-1, 1).to(x.dtype), torch.full((n * k // GROUP_SIZE, 1), 8, dtype=x.dtype, device=DEVICE), None)
    return lambda: linear(x)


def vllm(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    """Marlin, as vLLM calls it."""
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_empty_g_idx,
        marlin_make_workspace_new,
    )
    from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
    from vllm.scalar_type import scalar_types

    n, k = codes.shape
    dense = ((codes.float() - 8).unflatten(1, (-1, GROUP_SIZE)) * scales.float().t().unsqueeze(-1)).flatten(1)
    _, weight, weight_scale, g_idx, order, _ = marlin_quantize(dense.t().to(x.dtype).contiguous(), scalar_types.uint4b8, GROUP_SIZE, act_order=False)
    workspace, none = marlin_make_workspace_new(x.device), marlin_make_empty_g_idx(x.device)
    return lambda: apply_gptq_marlin_linear(
        input=x,
        weight=weight,
        weight_scale=weight_scale,
        weight_zp=none,
        g_idx=g_idx,
        g_idx_sort_indices=order,
        workspace=workspace,
        wtype=scalar_types.uint4b8,
        output_size_per_partition=n,
        input_size_per_partition=k,
        is_k_full=True,
    )


def bitsandbytes(x: Tensor, codes: Tensor, scales: Tensor) -> Call:
    """bitsandbytes' 4-bit product (its own grid, nf4; as many bytes)."""
    import bitsandbytes as bnb

    quantized, state = bnb.functional.quantize_4bit(torch.randn(codes.shape, dtype=x.dtype, device=DEVICE), blocksize=64, quant_type="nf4")
    return lambda: bnb.matmul_4bit(x, quantized.t(), quant_state=state)


PEERS = {"torch int4": torch_int4, "gemlite": gemlite, "vllm": vllm, "bitsandbytes": bitsandbytes}


def peers(x: Tensor, codes: Tensor, scales: Tensor) -> dict[str, Call]:
    """Those that are installed; one that can't multiply these is named with its reason."""
    calls = {}
    for name, make in PEERS.items():
        if importlib.util.find_spec(name.split()[0]) is None:
            continue
        try:
            calls[name] = make(x, codes, scales)
            calls[name]()
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            print(
                f"{name} left out at N={codes.shape[0]} K={codes.shape[1]} M={len(x)}: {type(error).__name__}: {str(error).splitlines()[:1]}",
                file=sys.stderr,
            )
            calls.pop(name, None)
    return calls


def ours(x: Tensor, qweight: Tensor, scales: Tensor, bits: int) -> dict[str, Call]:
    """This package's kernels."""
    calls = {"triton": lambda: dequant_gemm(x, qweight, scales, bits=bits)}
    if len(x) > 8:
        calls["triton int8_token"] = lambda: dequant_gemm(x, qweight, scales, bits=bits, activations="int8_token")
    return calls


def dense(x: Tensor, n: int) -> Call:
    """torch's 16-bit product."""
    weight = torch.randn(n, x.shape[1], dtype=x.dtype, device=x.device)
    return lambda: torch.nn.functional.linear(x, weight)


def cases() -> Iterator[tuple[str, int, int, dict[str, Call]]]:
    """(case, bytes moved, operations, calls), see gpu.py."""
    for n, k in SHAPES:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scales = torch.rand(k // GROUP_SIZE, n, device=DEVICE).half() / 64
        words = {bits: packing.pack(codes & (2**bits - 1), bits).to(DEVICE) for bits in packing.BITS}
        for m in ROWS:
            x = torch.randn(m, k, device=DEVICE).bfloat16()
            for bits, qweight in words.items():
                calls = ours(x, qweight, scales, bits)
                if bits == 4:
                    calls |= {"torch dense": dense(x, n), **peers(x, codes.to(DEVICE), scales)}
                moved = qweight.nbytes + scales.nbytes + (n + k) * m * x.itemsize
                yield f"N={n} K={k} M={m} W{bits} g{GROUP_SIZE}", moved, 2 * m * n * k, calls
