"""dequant_gemm: y = x @ dequant(W)^T + bias, straight from packed weights.

    dequant(W)[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],   g = k // (K / G)
and backward in x: dL/dx = dL/dy @ dequant(W). The packed layout is that of `packing.pack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

torch.library.define("normtweak::dequant_gemm", "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits) -> Tensor")
torch.library.define("normtweak::dequant_gemm_backward", "(Tensor grad, Tensor qweight, Tensor scales, Tensor? zeros, int bits, SymInt k) -> Tensor")


@torch.library.impl("normtweak::dequant_gemm", "default")
def _run(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    args = (x, qweight, scales, zeros, bias, bits)
    return registry.select("dequant_gemm", *args).run(*args)


@torch.library.impl("normtweak::dequant_gemm_backward", "default")
def _run_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    args = (grad, qweight, scales, zeros, bits, k)
    return registry.select("dequant_gemm_backward", *args).run(*args)


@torch.library.register_fake("normtweak::dequant_gemm")
def _fake(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.register_fake("normtweak::dequant_gemm_backward")
def _fake_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _setup_context(ctx, inputs, output) -> None:
    x, qweight, scales, zeros, _bias, ctx.bits = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(qweight, scales, zeros)


def _backward(ctx, grad):
    qweight, scales, zeros = ctx.saved_tensors
    grad_x = torch.ops.normtweak.dequant_gemm_backward(grad, qweight, scales, zeros, ctx.bits, ctx.k) if ctx.needs_input_grad[0] else None
    grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None


torch.library.register_autograd("normtweak::dequant_gemm", _backward, setup_context=_setup_context)


def dequant_gemm(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None, *, bits: int) -> Tensor:
    """x @ dequant(W)^T + bias for a packed weight [N, K]; differentiable in x and bias.

    x: [..., K], float16, bfloat16, float32 or float64; the product is accumulated in float32 (float64 for float64).
    qweight: int32 [ceil(N/16), ceil(K/32) * bits, 16]. scales: float16 or float32 [G, N], G dividing K (G = 1: per channel).
    zeros: uint8 [G, N], or None for the symmetric zero 2**(bits-1). bias: [N] in x's dtype, or None.
    Returns [..., N] in x's dtype. Raises ValueError for other bits, shapes or dtypes.
    """
    packing.check_bits("dequant_gemm", bits)
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"dequant_gemm: x must be floating point [..., K], got {x.dtype} {tuple(x.shape)}")
    k = x.shape[-1]
    if scales.dim() != 2 or scales.dtype not in (torch.float16, torch.float32) or scales.shape[0] < 1 or k % scales.shape[0]:
        raise ValueError(f"dequant_gemm: scales must be float16 or float32 [G, N] with G dividing K = {k}, got {scales.dtype} {tuple(scales.shape)}")
    n = scales.shape[1]
    if tuple(qweight.shape) != packing.packed_shape(n, k, bits) or qweight.dtype != torch.int32:
        raise ValueError(f"dequant_gemm: qweight must be int32 {packing.packed_shape(n, k, bits)}, got {qweight.dtype} {tuple(qweight.shape)}")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype != torch.uint8):
        raise ValueError(f"dequant_gemm: zeros must be uint8 {tuple(scales.shape)} or None, got {zeros.dtype} {tuple(zeros.shape)}")
    if bias is not None and (tuple(bias.shape) != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"dequant_gemm: bias must be {x.dtype} [{n}] or None, got {bias.dtype} {tuple(bias.shape)}")
    return torch.ops.normtweak.dequant_gemm(x, qweight, scales, zeros, bias, bits)
