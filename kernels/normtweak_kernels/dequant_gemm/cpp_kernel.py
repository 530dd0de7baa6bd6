"""dequant_gemm on the CPU, csrc/cpu/integer_gemm.cpp and dequant_gemm.cpp; launch.py says which body runs when."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import native, packing, registry
from ..launch import DEQUANT_GEMM_CPU, DequantGemmCpu
from .reference import quantize_activations

# Bytes that a value of x is split into: 22 bits and a sign are what float32 holds beside the largest of 64 values, 15 more than float16 does.
_PLANES = {"int16": 2, "int8": 1, "int8_token": 1}


@lru_cache(maxsize=2**14)
def _packed_weight(words: int, scales: int, scale_dtype: str, zeros: int, n: int, k: int, groups: int, bits: int) -> Any:
    """The C++ side's record of addresses and sizes, which is no more than these; a compiled model asks for the same ones for every token."""
    return native.loaded().PackedWeight(words, scales, scale_dtype, zeros, n, k, groups, bits)


class Weight:
    """A packed weight [n, k] as the C++ kernels take it: contiguous tensors, which this keeps alive, and their addresses."""

    __slots__ = ("addresses", "bits", "k", "n", "native", "tensors")

    def __init__(self, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> None:
        self.tensors = qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous()
        self.n, self.k, self.bits = scales.shape[1], k, bits
        words, scale, zero = self.tensors
        self.addresses = addresses = words.data_ptr(), scale.data_ptr(), native.address(zero)
        self.native = _packed_weight(addresses[0], addresses[1], native.DTYPES[scales.dtype], addresses[2], self.n, k, scales.shape[0], bits)


def _refuses(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> str | None:
    return native.refuses(x, qweight, scales, zeros, bias)


def _refuses_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> str | None:
    return native.refuses(grad, qweight, scales, zeros)


def launch() -> DequantGemmCpu:
    """The launch configuration of the instruction set in use."""
    return DEQUANT_GEMM_CPU[native.loaded().isa()]


_local = threading.local()


def _panel(weight: Weight, n0: int, n1: int, k0: int, k1: int, dtype: torch.dtype) -> Tensor:
    """dequant(W)[n0:n1, k0:k1] transposed, in memory that the next panel of this thread reuses.

    The system takes longer to hand out fresh pages than a panel takes to fill. Rows that lie a power of two apart would share a few sets of
    the cache, which writing down the columns of the panel would thrash (3 ms for 2048 x 2048 instead of 1): a cache line is left between.
    """
    stride = -(-(n1 - n0) // packing.LANES) * packing.LANES + 64 // dtype.itemsize
    buffers = _local.__dict__.setdefault("panels", {})
    count = (k1 - k0) * stride
    if dtype not in buffers or buffers[dtype].numel() < count:
        buffers[dtype] = torch.empty(count, dtype=dtype, device="cpu")
    panel = buffers[dtype]
    weight.native.dequantize_panel(torch.get_num_threads(), n0, n1, k0, k1, stride, native.DTYPES[dtype], native.address(panel))
    return panel[:count].view(k1 - k0, stride)[:, : n1 - n0]


def _spans(length: int, other: int, multiple: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cuts [0, length) into spans whose panel, `other` values for each, stays near the size in launch.py."""
    span = max(multiple, launch().panel_bytes // (itemsize * max(other, 1)) // multiple * multiple)
    for first in range(0, length, span):
        yield first, min(first + span, length)


def _product_dtype(x: Tensor) -> torch.dtype:
    # float16 is multiplied in float32: its range is too small for sums, and few CPUs multiply it fast. Nor do CPUs without bfloat16
    # products multiply that, whose BLAS converts each value on the way.
    return torch.bfloat16 if x.dtype == torch.bfloat16 and native.loaded().has_bfloat16() else torch.float32


def _integer(x: Tensor, weight: Weight, bias: Tensor | None, planes: int, per_token: bool) -> Tensor:
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], weight.n), dtype=x.dtype, device="cpu")
    bias_address = 0 if bias is None else bias.data_ptr()
    weight.native.integer_gemm(
        torch.get_num_threads(), x.data_ptr(), bias_address, y.data_ptr(), x.numel() // weight.k, native.DTYPES[x.dtype], planes, per_token
    )
    return y


def _float(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    x = torch.nn.functional.pad(x.float(), (0, -weight.k % packing.CHUNK)).contiguous()
    y = torch.empty(x.shape[0], weight.n, dtype=torch.float32, device="cpu")
    bias = None if bias is None else bias.float().contiguous()
    weight.native.dequant_gemm_small(torch.get_num_threads(), native.address(x), native.address(bias), native.address(y), x.shape[0])
    return y


def _by_panels(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    x = x.to(_product_dtype(x))
    y = x.new_empty(x.shape[0], weight.n)
    for n0, n1 in _spans(weight.n, weight.k, packing.LANES, x.itemsize):
        panel = _panel(weight, n0, n1, 0, weight.k, x.dtype)
        if bias is None:
            torch.mm(x, panel, out=y[:, n0:n1])
        else:
            torch.addmm(bias[n0:n1].to(x.dtype), x, panel, out=y[:, n0:n1])
    return y


def _integer_max_rows(weight: Weight, dtype: torch.dtype) -> int:
    """Rows of x up to which the integer kernel is the choice; 0 where it can't run."""
    if not weight.native.integer_gemm_supported():
        return 0
    limits, module = launch(), native.loaded()
    rows = limits.integer_max_rows if weight.bits < 8 else limits.integer_max_rows_8bit
    if dtype == torch.bfloat16 and module.has_bfloat16():
        rows = min(rows, limits.bfloat16_panel_rows_amx if module.has_amx() else limits.bfloat16_panel_rows)
    return rows


def multiply(x: Tensor, weight: Weight, bias: Tensor | None, activations: str) -> Tensor:
    """The op on a weight whose tensors were checked."""
    rows = x.numel() // weight.k
    if rows == 0:
        return x.new_empty((*x.shape[:-1], weight.n))
    if bias is not None:
        bias = bias.contiguous()
    limit = _integer_max_rows(weight, x.dtype)
    if activations != "auto":
        if limit:
            return _integer(x, weight, bias, _PLANES[activations], activations == "int8_token")
        x = quantize_activations(x, weight.native.groups, activations).to(x.dtype)
    elif rows <= limit:
        return _integer(x, weight, bias, 3 if x.dtype == torch.float32 else 2, False)
    body = _float if rows <= launch().float_max_rows else _by_panels
    return body(x.reshape(-1, weight.k), weight, bias).to(x.dtype).view(*x.shape[:-1], weight.n)


@registry.register("dequant_gemm", "cpp", _refuses)
def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> Tensor:
    """See the package's docstring."""
    return multiply(x, Weight(qweight, scales, zeros, bits, x.shape[-1]), bias, activations)


@registry.register("dequant_gemm_backward", "cpp", _refuses_backward)
def dequant_gemm_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    """See the package's docstring. Panels are cut along K, so that no sum is split between two products."""
    weight = Weight(qweight, scales, zeros, bits, k)
    rows = grad.reshape(-1, weight.n).to(_product_dtype(grad))
    grad_x = rows.new_empty(rows.shape[0], k)
    for k0, k1 in _spans(k, weight.n, packing.CHUNK, rows.itemsize):
        torch.mm(rows, _panel(weight, 0, weight.n, k0, k1, rows.dtype).t(), out=grad_x[:, k0:k1])
    return grad_x.to(grad.dtype).view(*grad.shape[:-1], k)
