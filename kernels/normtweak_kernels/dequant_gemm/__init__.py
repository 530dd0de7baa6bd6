"""dequant_gemm: y = x @ dequant(W)^T + bias, straight from packed weights.

    dequant(W)[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],   g = k // (K / G)
and backward in x: dL/dx = dL/dy @ dequant(W). The packed layout is that of `packing.pack`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import gpu, native, packing, registry
from ..precision import FLOATS
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

for _op in ("dequant_gemm", "dequant_gemm_backward"):
    registry.register_lazily(_op, "triton", f"{__name__}.triton_kernel", gpu.refuses)

torch.library.define(
    "normtweak::dequant_gemm", "(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? bias, int bits, str activations) -> Tensor"
)
torch.library.define("normtweak::dequant_gemm_backward", "(Tensor grad, Tensor qweight, Tensor scales, Tensor? zeros, int bits, SymInt k) -> Tensor")


@torch.library.impl("normtweak::dequant_gemm", "default")
def _run(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> Tensor:
    args = (x, qweight, scales, zeros, bias, bits, activations)
    return registry.select("dequant_gemm", *args).run(*args)


@torch.library.impl("normtweak::dequant_gemm_backward", "default")
def _run_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    args = (grad, qweight, scales, zeros, bits, k)
    return registry.select("dequant_gemm_backward", *args).run(*args)


@torch.library.register_fake("normtweak::dequant_gemm")
def _fake(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, activations: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], scales.shape[1]))


@torch.library.register_fake("normtweak::dequant_gemm_backward")
def _fake_backward(grad: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, k: int) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], k))


def _setup_context(ctx, inputs, output) -> None:
    x, qweight, scales, zeros, _bias, ctx.bits, _activations = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(qweight, scales, zeros)


def _backward(ctx, grad):
    qweight, scales, zeros = ctx.saved_tensors
    grad_x = torch.ops.normtweak.dequant_gemm_backward(grad, qweight, scales, zeros, ctx.bits, ctx.k) if ctx.needs_input_grad[0] else None
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
    return grad_x, None, None, None, grad_bias, None, None


def _setup_backward_context(ctx, inputs, output) -> None:
    _grad, qweight, scales, zeros, ctx.bits, _k = inputs
    ctx.save_for_backward(qweight, scales, zeros)


def _backward_of_backward(ctx, grad):
    # The gradient in x is linear in that in y, by the same weight: derivatives of any order are these two ops.
    grad_grad = torch.ops.normtweak.dequant_gemm(grad, *ctx.saved_tensors, None, ctx.bits, "auto") if ctx.needs_input_grad[0] else None
    return grad_grad, None, None, None, None, None


torch.library.register_autograd("normtweak::dequant_gemm", _backward, setup_context=_setup_context)
torch.library.register_autograd("normtweak::dequant_gemm_backward", _backward_of_backward, setup_context=_setup_backward_context)


# How x enters the product; see `dequant_gemm`.
ACTIVATIONS = ("auto", "int16", "int8", "int8_token")


def dequant_gemm(
    x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None, *, bits: int, activations: str = "auto"
) -> Tensor:
    """x @ dequant(W)^T + bias for a packed weight [N, K]; differentiable in x and bias.

    x: [..., K], float16, bfloat16, float32 or float64; the product is accumulated in float32 (float64 for float64).
    qweight: int32 [ceil(N/16), ceil(K/32) * bits, 16]. scales: float16 or float32 [G, N], G dividing K (G = 1: per channel).
    zeros: uint8 [G, N], or None for the symmetric zero 2**(bits-1). bias: [N] in x's dtype, or None.
    activations: how x enters the product. "auto": as exactly as its dtype holds it (a CPU may multiply integers of 16 bits, 23 for
    float32, with a scale for every 64 values of a row). The others are faster and rounded: "int16" with a scale for every 64 values (6e-5
    of x), "int8" likewise (6e-3 to 2e-2 of x), "int8_token" with one scale for a row, as
    SmoothQuant wants it (9e-3 where x is smooth, far more where a few channels are large). A GPU multiplies "auto" and "int16" as x is. The gradient is that of the exact product.
    A value of x that isn't finite makes its row NaN, or infinite where x is multiplied as it is.
    Returns [..., N] in x's dtype. Raises ValueError for other bits, shapes, dtypes or activations, and under transforms of torch.func and
    forward-mode differentiation, which would lose the gradient silently.
    """
    packing.check_bits("dequant_gemm", bits)
    if activations not in ACTIVATIONS:
        raise ValueError(f"dequant_gemm: activations must be one of {', '.join(ACTIVATIONS)}, got {activations}")
    if x.dim() < 1 or x.dtype not in FLOATS:
        raise ValueError(f"dequant_gemm: x must be float16, bfloat16, float32 or float64 [..., K], got {x.dtype} {tuple(x.shape)}")
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
    if 0 in (n, k):
        raise ValueError(f"dequant_gemm: the weight must have rows and columns, got {n} x {k}")
    registry.check_transforms("dequant_gemm", x, bias)
    args = (x, qweight, scales, zeros, bias, bits, activations)
    direct = registry.eager(x, bias) and not x.is_meta
    return registry.select("dequant_gemm", *args).run(*args) if direct else torch.ops.normtweak.dequant_gemm(*args)


class Prepared:
    """`dequant_gemm` with one weight, whose tensors are checked once: y = prepared(x, bias). For modules that are called for every token."""

    __slots__ = ("_activations", "_bits", "_k", "_tensors", "_weight")

    def __init__(self, qweight: Tensor, scales: Tensor, zeros: Tensor | None, k: int, *, bits: int, activations: str = "auto") -> None:
        dequant_gemm(scales.new_zeros((0, k), dtype=torch.float32), qweight, scales, zeros, bits=bits, activations=activations)
        self._tensors, self._k, self._bits, self._activations = (qweight, scales, zeros), k, bits, activations
        # A tensor that isn't contiguous would be copied, and the copy would miss what is written to the tensor later.
        plain = registry.eager(qweight, scales, zeros) and all(t is None or t.is_contiguous() for t in self._tensors)
        fits = plain and native.refuses(qweight, scales, zeros) is None
        self._weight = cpp_kernel.Weight(qweight, scales, zeros, bits, k) if fits else None

    def holds(self, qweight: Tensor, scales: Tensor, zeros: Tensor | None, activations: str = "auto") -> bool:
        """Whether it was made of these very tensors, where they still are, and for this mode."""
        mine = self._tensors
        if mine[0] is not qweight or mine[1] is not scales or mine[2] is not zeros or self._activations != activations:
            return False
        return self._weight is None or self._weight.addresses == tuple(0 if t is None else t.data_ptr() for t in mine)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K], bias [N] or None -> [..., N], as `dequant_gemm`."""
        weight = self._weight
        if (
            weight is not None
            and x.is_cpu
            and x.dtype in native.DTYPES
            and x.shape[-1:] == (self._k,)
            and (bias is None or (bias.is_cpu and bias.dtype == x.dtype and bias.shape == (weight.n,)))
            and registry.forced() in (None, "cpp")
            and registry.eager(x, bias)
        ):
            return cpp_kernel.multiply(x, weight, bias, self._activations)
        return dequant_gemm(x, *self._tensors, bias, bits=self._bits, activations=self._activations)
