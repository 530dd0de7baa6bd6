"""PackedLinear: packed weights behind nn.Linear's face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight, packing, repack_gptq, repack_to_gptq
from normtweak_kernels.dequant_gemm import Prepared, dequant_gemm


class PackedLinear(nn.Module):
    """y = x @ dequant(W)^T + bias, from packed codes; nothing is ever dequantized as a whole and kept.

    Buffers: qweight int32 (the layout of `normtweak_kernels.packing`), scales float16 [G, N], zeros uint8 [G, N] or None (symmetric). The scales keep
    their dtype through `.to(dtype)`. `activations` says how x enters the product, see `dequant_gemm`; it may be changed at any time. Gradients flow
    to x and bias.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None = None,
        *,
        bits: int,
        in_features: int,
        activations: str = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, scales.shape[1]
        self.bits, self.group_size = bits, in_features // scales.shape[0]
        self.activations = activations
        self._prepared: Prepared | None = None
        self.register_buffer("qweight", qweight.contiguous())
        self.register_buffer("scales", scales.half().contiguous())
        self.register_buffer("zeros", None if zeros is None else zeros.contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None) -> PackedLinear:
        """From codes and their parameters; scales are rounded to float16, as checkpoints store them."""
        return cls(weight.pack(), weight.scales, weight.zeros, bias, bits=weight.bits, in_features=weight.codes.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype, or in autocast's where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        parameter = self._parameters["bias"]
        bias = None if parameter is None else parameter.to(x.dtype)
        # Straight from the dictionary, past nn.Module's attribute lookup: a token costs a call of every linear.
        buffers = cast(dict[str, Tensor], self._buffers)
        weight = buffers["qweight"], buffers["scales"], buffers["zeros"]
        if torch.compiler.is_compiling():
            return dequant_gemm(x, *weight, bias, bits=self.bits, activations=self.activations)
        if self._prepared is None or not self._prepared.holds(*weight, self.activations):
            self._prepared = Prepared(*weight, self.in_features, bits=self.bits, activations=self.activations)
        return self._prepared(x, bias)

    def __getstate__(self):
        return self.__dict__ | {"_prepared": None}  # a copy's tensors lie elsewhere

    def quantized(self) -> QuantizedWeight:
        """The codes and parameters, unpacked."""
        codes = packing.unpack(self.qweight, self.bits, self.out_features, self.in_features)
        return QuantizedWeight(codes, self.scales, self.zeros, self.bits)

    def to_gptq(self) -> dict[str, Tensor]:
        """The tensors of a GPTQ v1 checkpoint: qweight, qzeros, scales, g_idx (and bias)."""
        zeros = torch.full(self.scales.shape, 2 ** (self.bits - 1), dtype=torch.uint8) if self.zeros is None else self.zeros
        tensors = {
            "qweight": repack_to_gptq(self.qweight, self.bits, self.out_features, self.in_features),
            "qzeros": packing.pack_gptq_zeros(zeros, self.bits),
            "scales": self.scales,
            "g_idx": torch.arange(self.in_features, dtype=torch.int32) // self.group_size,
        }
        return tensors if self.bias is None else tensors | {"bias": self.bias.data}

    @classmethod
    def from_gptq(cls, name: str, tensors: Mapping[str, Tensor], bits: int, in_features: int, *, v2: bool = False) -> PackedLinear:
        """From a GPTQ checkpoint's tensors. Raises ValueError, naming the linear, when they don't fit together or g_idx isn't k // group_size."""
        scales = tensors["scales"].half()
        groups, n = scales.shape
        try:
            qweight = repack_gptq(tensors["qweight"], bits, in_features)
            zeros = packing.unpack_gptq_zeros(tensors["qzeros"], bits, n, v2=v2)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if tensors["qweight"].shape[1] != n or zeros.shape != scales.shape or in_features % groups:
            raise ValueError(
                f"{name}: qweight, qzeros and scales must belong together, got {tuple(tensors['qweight'].shape)}, "
                f"{tuple(tensors['qzeros'].shape)}, {tuple(scales.shape)}"
            )
        g_idx = tensors.get("g_idx")
        if g_idx is not None and not torch.equal(g_idx.int(), torch.arange(in_features, dtype=torch.int32) // (in_features // groups)):
            raise ValueError(f"{name}: g_idx must be k // group_size (act-order without static groups is not supported), got another order")
        symmetric = bool((zeros == 2 ** (bits - 1)).all())
        return cls(qweight, scales, None if symmetric else zeros, tensors.get("bias"), bits=bits, in_features=in_features)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # `.to(dtype)` means activations; scales of another precision are other weights
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        kind = "symmetric" if self.zeros is None else "asymmetric"
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group_size={self.group_size}, {kind}"


def quantizable_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The nn.Linear modules of a block by their path in it, in the order of the module tree."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the path `name` under `root`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
