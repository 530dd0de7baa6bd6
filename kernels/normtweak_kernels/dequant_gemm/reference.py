"""dequant_gemm in plain torch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import affine, packing, registry


def dense(qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int, dtype: torch.dtype) -> Tensor:
    """The whole dequantized weight [N, K]."""
    return affine.dequantize(packing.unpack(qweight, bits, scales.shape[1], k), scales, zeros, bits, dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@registry.register("dequant_gemm", "reference")
def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    """Weights and products in float32 (float64 for float64), rounded once at the end."""
    weight = dense(qweight, scales, zeros, bits, x.shape[-1], _wide(x))
    # contiguous: torch picks another product, with sums in another order, for a permuted x, and the result shall not depend on strides
    y = torch.nn.functional.linear(x.to(weight.dtype).contiguous(), weight, None if bias is None else bias.to(weight.dtype))
    return y.to(x.dtype)


@registry.register("dequant_gemm_backward", "reference")
def dequant_gemm_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    """grad @ dequant(W): the gradient in x, [..., K]."""
    weight = dense(qweight, scales, zeros, bits, k, _wide(grad))
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)
