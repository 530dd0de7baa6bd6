"""`AutoModelForCausalLM.from_pretrained(folder)` for normtweak's packed checkpoints, after `import normtweak.integrations.transformers`.

transformers knows GPTQ checkpoints by their `quant_method` and hands them to optimum and gptqmodel. Importing this file puts a
quantizer in that place which takes the checkpoints that normtweak wrote and leaves all others to transformers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import GPTQConfig

from ..checkpoint import module_settings, stored_activations
from ..linear import Conv1DLinear, PackedLinear, RoutedLinear, quantizable_linears, replace
from ..models import present_blocks

_THEIRS = AUTO_QUANTIZER_MAPPING["gptq"]


class NormTweakQuantizer(HfQuantizer):
    """Loads linears in GPTQ's layout and turns each into a PackedLinear."""

    requires_calibration = True

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        """transformers' own quantizer for a checkpoint that another tool wrote."""
        written_by = (getattr(quantization_config, "meta", None) or {}).get("quantizer", [])
        if any(str(name).startswith("normtweak:") for name in written_by):
            return super().__new__(cls)
        return _THEIRS(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config: Any = self.quantization_config
        settings = {"bits": config.bits, "group_size": config.group_size, "dynamic": config.dynamic}
        plain = dict(model.named_modules())
        path = present_blocks(model)
        for name, linear in quantizable_linears(model).items():
            own = module_settings(settings, name) if name.startswith(f"{path}.") or config.lm_head else None
            if own is not None:
                replace(model, name, _StoredLinear(linear, own["bits"], own["group_size"]))
            elif isinstance(linear, Conv1DLinear):
                replace(model, name, plain[name])
            elif isinstance(linear, RoutedLinear):
                raise ValueError(
                    f"load: experts must all be quantized for transformers' loader, got {name} in floating point (normtweak.load reads it)"
                )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        stored = {name: module for name, module in model.named_modules() if isinstance(module, _StoredLinear)}
        config: Any = self.quantization_config
        activations = stored_activations({"meta": config.meta})
        for name, module in stored.items():
            packed = PackedLinear.from_gptq(name, module.tensors(), module.bits, module.in_features)
            packed.activations = activations
            replace(model, name, packed)

    @property
    def is_trainable(self) -> bool:
        """Whether transformers' Trainer may train the packed weights: it may not."""
        return False

    def is_serializable(self, **kwargs: Any) -> bool:
        """Whether `save_pretrained` writes the model back: not yet."""
        return False


class _Config(GPTQConfig):
    """GPTQConfig that keeps what differs by module."""

    def __init__(self, *args: Any, dynamic: dict[str, Any] | None = None, lm_head: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dynamic, self.lm_head = dynamic, lm_head


class _StoredLinear(nn.Module):
    """The tensors of a GPTQ linear as a checkpoint stores them, for transformers' loader to fill."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int) -> None:
        super().__init__()
        n, k = linear.out_features, linear.in_features
        groups = 1 if group_size == -1 else k // group_size
        self.in_features, self.bits = k, bits
        self.register_buffer("qweight", torch.empty(-(-k * bits // 32), n, dtype=torch.int32))
        self.register_buffer("qzeros", torch.empty(groups, -(-n * bits // 32), dtype=torch.int32))
        self.register_buffer("scales", torch.empty(groups, n, dtype=torch.float16))
        self.register_buffer("g_idx", torch.empty(k, dtype=torch.int32))
        if linear.bias is not None:
            self.register_buffer("bias", torch.empty(n, dtype=linear.bias.dtype))

    @property
    def weight(self) -> torch.Tensor:
        """Nothing: GPT-2 fills the weight of a module by this name at random before the checkpoint is read."""
        return torch.empty(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By GPTQ's names."""
        return dict(self.named_buffers())


AUTO_QUANTIZER_MAPPING["gptq"] = NormTweakQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = _Config
