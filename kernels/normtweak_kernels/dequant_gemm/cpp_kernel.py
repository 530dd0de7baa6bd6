"""dequant_gemm on the CPU: a fused kernel for few rows of x, else panels of the weight for torch's BLAS; csrc/cpu/dequant_gemm.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native, packing, registry
from ..launch import DEQUANT_GEMM_CPU


@dataclass(frozen=True)
class _Weight:
    """A packed weight [n, k] whose tensors are contiguous."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    k: int

    @property
    def n(self) -> int:
        return self.scales.shape[1]

    def arguments(self) -> tuple[object, ...]:
        """What every C++ kernel takes of a packed weight."""
        return (
            native.address(self.qweight), native.address(self.scales), native.DTYPES[self.scales.dtype], native.address(self.zeros),
            self.n, self.k, self.scales.shape[0], self.bits,
        )  # fmt: skip


def _weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> _Weight:
    return _Weight(qweight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous(), bits, k)


def _refuses(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int) -> str | None:
    return native.refuses(x, qweight, scales, zeros, bias)


def _refuses_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> str | None:
    return native.refuses(grad, qweight, scales, zeros)


def _panel(buffer: Tensor, weight: _Weight, n0: int, n1: int, k0: int, k1: int) -> Tensor:
    """dequant(W)[n0:n1, k0:k1] transposed, in a view of `buffer`."""
    width = -(-(n1 - n0) // packing.LANES) * packing.LANES
    native.loaded().dequantize_panel(
        torch.get_num_threads(), *weight.arguments(), n0, n1, k0, k1, native.DTYPES[buffer.dtype], native.address(buffer)
    )
    return buffer[: (k1 - k0) * width].view(k1 - k0, width)[:, : n1 - n0]


def _spans(length: int, other: int, multiple: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Cuts [0, length) into spans whose panel, `other` values for each, stays near the size in launch.py."""
    span = max(multiple, DEQUANT_GEMM_CPU.panel_bytes // (itemsize * max(other, 1)) // multiple * multiple)
    for first in range(0, length, span):
        yield first, min(first + span, length)


def _product_dtype(x: Tensor) -> torch.dtype:
    # float16 is multiplied in float32: its range is too small for sums, and few CPUs multiply it fast.
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32


def _fused(x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    x = torch.nn.functional.pad(x.float(), (0, -weight.k % packing.CHUNK)).contiguous()
    y = torch.empty(x.shape[0], weight.n)
    bias = None if bias is None else bias.float().contiguous()
    native.loaded().dequant_gemm_small(
        torch.get_num_threads(), *weight.arguments(), native.address(x), native.address(bias), native.address(y), x.shape[0]
    )
    return y


def _by_panels(x: Tensor, weight: _Weight, bias: Tensor | None) -> Tensor:
    x = x.to(_product_dtype(x))
    y = x.new_empty(x.shape[0], weight.n)
    buffer = None
    for n0, n1 in _spans(weight.n, weight.k, packing.LANES, x.itemsize):
        if buffer is None:
            buffer = x.new_empty(weight.k * (-(-(n1 - n0) // packing.LANES) * packing.LANES))
        panel = _panel(buffer, weight, n0, n1, 0, weight.k)
        if bias is None:
            torch.mm(x, panel, out=y[:, n0:n1])
        else:
            torch.addmm(bias[n0:n1].to(x.dtype), x, panel, out=y[:, n0:n1])
    return y


@registry.register("dequant_gemm", "cpp", _refuses)
def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    """See the package's docstring."""
    weight = _weight(qweight, scales, zeros, bits, x.shape[-1])
    rows = x.reshape(-1, weight.k)
    if 0 in (rows.shape[0], weight.n):
        return x.new_empty((*x.shape[:-1], weight.n))
    launch = DEQUANT_GEMM_CPU
    fused_max = launch.fused_max_rows_bfloat16 if x.dtype == torch.bfloat16 else launch.fused_max_rows
    body = _fused if rows.shape[0] <= fused_max else _by_panels
    return body(rows, weight, bias).to(x.dtype).view(*x.shape[:-1], weight.n)


@registry.register("dequant_gemm_backward", "cpp", _refuses_backward)
def dequant_gemm_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    """See the package's docstring. Panels are cut along K, so that no sum is split between two products."""
    weight = _weight(qweight, scales, zeros, bits, k)
    rows = grad.reshape(-1, weight.n).to(_product_dtype(grad))
    grad_x = rows.new_empty(rows.shape[0], k)
    width = -(-weight.n // packing.LANES) * packing.LANES
    buffer = None
    for k0, k1 in _spans(k, width, packing.CHUNK, rows.itemsize):
        if buffer is None:
            buffer = rows.new_empty((k1 - k0) * width)
        torch.mm(rows, _panel(buffer, weight, 0, weight.n, k0, k1).t(), out=grad_x[:, k0:k1])
    return grad_x.to(grad.dtype).view(*grad.shape[:-1], k)
