"""PackedLinear: packed weights behind nn.Linear's face; and other modules' weights presented as nn.Linear, for quantizers to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight, packing
from normtweak_kernels.dequant_gemm import Prepared, dequant_gemm


class PackedLinear(nn.Module):
    """y = x @ dequant(W)^T + bias, from packed codes; nothing is ever dequantized as a whole and kept.

    Buffers: qweight int32 (the layout of `normtweak_kernels.packing`), scales float16 or float32 [G, N], zeros uint8 [G, N] or None (symmetric), perm int32 [K]
    or None. With perm (GPTQ's act-order with groups of its own), the packed weight's column j belongs to the input perm[j]: y = x[perm] @ dequant(W)^T + bias, and
    a group's columns lie side by side. The scales keep their dtype through `.to(dtype)`. `activations` says how x enters the product, see `dequant_gemm`; it may be
    changed at any time. Gradients flow to x and bias.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
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
        perm: Tensor | None = None,
        activations: str = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, scales.shape[1]
        self.bits, self.group_size = bits, in_features // scales.shape[0]
        self.activations = activations
        self._prepared: Prepared | None = None
        self.register_buffer("qweight", qweight.contiguous())
        self.register_buffer("scales", scales.contiguous())
        self.register_buffer("zeros", None if zeros is None else zeros.contiguous())
        self.register_buffer("perm", None if perm is None else perm.to(torch.int32).contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, bias: Tensor | None = None, *, activations: str = "auto") -> PackedLinear:
        """From codes and their parameters; scales are rounded to float16, as checkpoints store them."""
        k = weight.codes.shape[1]
        return cls(weight.pack(), weight.scales.half(), weight.zeros, bias, bits=weight.bits, in_features=k, activations=activations)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype, or in autocast's where that is on. bias: in place of the module's own."""
        if (device := x.device.type) != "meta" and torch.is_autocast_enabled(device):  # torch knows no autocast of shapes
            x = x.to(torch.get_autocast_dtype(device))
        parameter = self._parameters["bias"] if bias is None else bias
        bias = None if parameter is None else parameter.to(x.dtype)
        # Straight from the dictionary, past nn.Module's attribute lookup: a token costs a call of every linear.
        buffers = cast(dict[str, Tensor], self._buffers)
        weight = buffers["qweight"], buffers["scales"], buffers["zeros"]
        if (perm := buffers["perm"]) is not None:
            x = x.index_select(-1, perm)
        if torch.compiler.is_compiling():
            return dequant_gemm(x, *weight, bias, bits=self.bits, activations=self.activations)
        if self._prepared is None or not self._prepared.holds(*weight, self.activations):
            self._prepared = Prepared(*weight, self.in_features, bits=self.bits, activations=self.activations)
        return self._prepared(x, bias)

    def __getstate__(self):
        return self.__dict__ | {"_prepared": None}  # a copy's tensors lie elsewhere

    def quantized(self) -> QuantizedWeight:
        """The codes and parameters, unpacked; columns in the order of the packed weight (see perm)."""
        codes = packing.unpack(self.qweight, self.bits, self.out_features, self.in_features)
        return QuantizedWeight(codes, self.scales, self.zeros, self.bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] that the codes stand for, columns in the order of the inputs."""
        weight = self.quantized().dequantize(dtype)
        return weight if self.perm is None else torch.empty_like(weight).index_copy_(1, self.perm.long(), weight)

    def _apply(self, fn, recurse=True):
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # `.to(dtype)` means activations; scales of another precision are other weights
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        kind = "symmetric" if self.zeros is None else "asymmetric"
        order = "" if self.perm is None else ", inputs permuted"
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group_size={self.group_size}, {kind}{order}"


class Conv1DLinear(nn.Linear):
    """GPT-2's Conv1D as an nn.Linear: the weight is [out, in] here and, as ever, [in, out] in state dictionaries and so in checkpoints."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)


class RoutedLinear(nn.Linear):
    """A linear of one expert: it is given only the tokens that are routed to it, which may be few or none."""


class Experts(nn.ModuleList):
    """A mixture's experts, each with linears of its own: y_t = sum over t's experts e of p_te * down_e(act(gate_e(x_t)) * up_e(x_t)).

    names: what checkpoints call gate, up and down. Takes the place of a module that keeps all experts' weights in two tensors.
    """

    def __init__(self, count: int, hidden: int, intermediate: int, activation: Callable[[Tensor], Tensor], names: tuple[str, str, str]) -> None:
        shapes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
        with torch.device("meta"):
            experts = [
                {name: RoutedLinear(*shape, bias=False) for name, shape in zip(names, shapes, strict=True)}
                for _ in range(count)
            ]  # fmt: skip
        super().__init__(map(nn.ModuleDict, experts))
        self.activation, self.names = activation, names

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], the experts of each token int64 [T, k], their shares [T, k] -> [T, H]."""
        output = torch.zeros_like(hidden)
        for number in top_k_index.unique().tolist():
            gate, up, down = (self[number][name] for name in self.names)
            token, place = torch.where(top_k_index == number)
            x = hidden[token]
            y = down(self.activation(gate(x)) * up(x)) * top_k_weights[token, place, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output


def present_linears(block: nn.Module, experts: tuple[str, str, str]) -> None:
    """Put nn.Linear modules in the place of a meta block's Conv1D and fused expert weights. experts: what checkpoints call gate, up and down.

    Raises ValueError for three-dimensional weights of another layout, which would otherwise stay unquantized without a word.
    """
    for path, module in list(block.named_modules()):
        if is_conv1d(module):
            k, n = module.get_parameter("weight").shape
            replace(block, path, Conv1DLinear(k, n, device="meta"))
        elif any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d):
            replace(block, path, _unfused(path, module, experts))


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _unfused(path: str, fused: Any, names: tuple[str, str, str]) -> Experts:
    shapes = {name: tuple(p.shape) for name, p in fused.named_parameters(recurse=False)}
    known = set(shapes) == {"gate_up_proj", "down_proj"} and hasattr(fused, "act_fn")
    # what transformers notes of layouts and gates that differ from the usual
    known = known and not getattr(fused, "is_transposed", False) and getattr(fused, "is_concatenated", True)
    gate = getattr(type(fused), "_apply_gate", None)
    known = known and (gate is None or gate.__name__ == "_default_apply_gate")
    if known:
        count, hidden, intermediate = shapes["down_proj"]
        known = shapes["gate_up_proj"] == (count, 2 * intermediate, hidden)
    if not known:
        wanted = "gate_up_proj [E, 2I, H] and down_proj [E, H, I] with an activation between, as Mixtral's and Qwen's experts have"
        raise ValueError(f"model: the weights of {path} ({type(fused).__name__}) must be {wanted}, got {shapes}")
    return Experts(count, hidden, intermediate, fused.act_fn, names)


def quantizable_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The nn.Linear modules of a block by their path in it, in the order of the module tree; routers, which choose experts, are none of them."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear) and "Router" not in type(module).__name__}


def left_out(model: Any) -> str:
    """What paths in the whole model begin with and those in `model` don't: transformers' AutoModel gives the part under the head that its prefix names."""
    prefix = getattr(model, "base_model_prefix", "")
    return "" if not prefix or hasattr(model, prefix) else f"{prefix}."


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the path `name` under `root`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
