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

from .. import formats
from ..linear import Conv1DLinear, RoutedLinear, quantizable_linears, replace
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
        self._format = formats.open_format(config.to_dict() | {"quant_method": "gptq"})
        plain = dict(model.named_modules())
        path = present_blocks(model)
        for name, linear in quantizable_linears(model).items():
            scheme = self._format.scheme(name) if name.startswith(f"{path}.") or config.lm_head else None
            if scheme is not None:
                replace(model, name, _StoredLinear(linear, self._format.tensors(scheme, linear.out_features, linear.in_features)))
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
            replace(model, name, self._format.read(name, module.tensors(), module.out_features, module.in_features))

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
    """The tensors of a packed linear as a checkpoint stores them, for transformers' loader to fill."""

    def __init__(self, linear: nn.Linear, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for name, (dtype, shape) in tensors.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        if linear.bias is not None:
            self.register_buffer("bias", torch.empty(linear.out_features, dtype=linear.bias.dtype))

    @property
    def weight(self) -> torch.Tensor:
        """Nothing: GPT-2 fills the weight of a module by this name at random before the checkpoint is read."""
        return torch.empty(0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their names."""
        return dict(self.named_buffers())


AUTO_QUANTIZER_MAPPING["gptq"] = NormTweakQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = _Config
