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


def quantize_activations(x: Tensor, groups: int, activations: str) -> Tensor:
    """x [..., K] rounded to the integers of a mode of `dequant_gemm` and scaled back, in float32 (float64 for float64).

    A scale, the largest magnitude over 32512 (int16) or 127 (int8), is shared by 64 values of a group of the weight, by all of a row in
    int8_token. A row with a value that isn't finite becomes NaN where the scale is shared.
    """
    k, limit = x.shape[-1], 32512 if activations == "int16" else 127
    run = k if activations == "int8_token" else min(64, k // groups)
    values = x.to(_wide(x))
    if activations != "int8_token":
        values = values.unflatten(-1, (groups, -1))
    length = values.shape[-1]
    runs = torch.nn.functional.pad(values, (0, -length % run)).unflatten(-1, (-1, run))
    scale = runs.abs().amax(-1, keepdim=True) / limit
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    rounded = torch.where(scale > 2.0**-126, (runs / scale).round() * scale, scale * 0)
    return rounded.flatten(-2)[..., :length].reshape(x.shape)


@registry.register("dequant_gemm", "reference")
def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> Tensor:
    """Weights and products in float32 (float64 for float64), rounded once at the end."""
    dtype = x.dtype
    weight = dense(qweight, scales, zeros, bits, x.shape[-1], _wide(x))
    if activations != "auto":
        x = quantize_activations(x, scales.shape[0], activations)
    # contiguous: torch picks another product, with sums in another order, for a permuted x, and the result shall not depend on strides
    with torch.autocast(x.device.type, enabled=False):
        y = torch.nn.functional.linear(x.to(weight.dtype).contiguous(), weight, None if bias is None else bias.to(weight.dtype))
    return y.to(dtype)


@registry.register("dequant_gemm_backward", "reference")
def dequant_gemm_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    """grad @ dequant(W): the gradient in x, [..., K]."""
    weight = dense(qweight, scales, zeros, bits, k, _wide(grad))
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)
