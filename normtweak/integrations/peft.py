"""LoRA on packed linears: `get_peft_model`, `PeftModel.from_pretrained` and `model.add_adapter` take models with `PackedLinear` modules.

`import normtweak` is enough: this file is imported as soon as peft's LoRA is (see `hooks`). peft keeps a list of the layers it knows inside a function, and
asks a configuration for others, which it doesn't save; so the function is given one more layer here.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.lora.model import LoraModel

from ..config import require
from ..linear import PackedLinear


class PackedLoraLinear(Linear):
    """y = PackedLinear(x) + scaling * B(A(x)): the packed weights stay as they are, gradients reach A, B and x."""

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        start = config.init_lora_weights
        require(start in (True, False, "gaussian"), "LoraConfig", "init_lora_weights", "True, False or gaussian for packed linears", start)
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None but LoRA itself: the others read or change the float weight."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ValueError: codes of a few bits can't hold the sum."""
        raise ValueError("merge: the base layer must be in floating point, got packed weights (keep the adapter beside them)")


_create = LoraModel._create_new_module


def _create_new_module(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if isinstance(base, PackedLinear):
        return PackedLoraLinear(target, adapter_name, config=lora_config, **kwargs)
    return _create(lora_config, adapter_name, target, **kwargs)


LoraModel._create_new_module = staticmethod(_create_new_module)  # type: ignore[method-assign]
