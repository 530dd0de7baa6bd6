"""`AutoModelForCausalLM.from_pretrained(folder)` with packed linears, and `NormTweakConfig` for models that aren't packed yet, or by others.

`import normtweak` is enough: this file is imported as soon as transformers' registry of quantizers is (see `hooks`). Checkpoints say `quant_method: gptq`, which
gptqmodel and vLLM read; of those the ones that normtweak wrote come here. All others go to transformers' own loaders, unless NormTweakConfig is passed.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from normtweak_kernels.dequant_gemm import ACTIVATIONS

from .. import formats
from ..checkpoint import stored_activations, written_here
from ..config import QuantizeConfig, require
from ..linear import Conv1DLinear, PackedLinear, quantizable_linears, replace
from ..models import ModelFolder, load, packed_linears
from ..pipeline import quantize

logger = logging.getLogger(__name__)

METHOD = "normtweak"


@register_quantization_config(METHOD)
class NormTweakConfig(QuantizationConfigMixin):
    """What `from_pretrained(..., quantization_config=NormTweakConfig(...))` is told.

    For a float model: how to quantize it on the spot. bits, group_size, symmetric and `settings` are those of `normtweak.QuantizeConfig`. method: "rtn" looks at
    no text and takes seconds, which is good at 8 bits, fair at 4 and ruins a model at 2; "gptq" is the whole recipe of `normtweak.quantize` (text
    that the model writes, GPTQ, tweak, polish): minutes for a small model.
    For a model that is quantized already, by whatever tool: that normtweak shall load it into packed linears. The checkpoint's own settings count then.
    activations: how they enter the packed products, see `normtweak_kernels.dequant_gemm`; None: as the checkpoint or the recipe says. Raises ValueError for settings that QuantizeConfig refuses.
    """

    def __init__(
        self, bits: int = 4, group_size: int = -1, *, symmetric: bool = True, method: str = "rtn", activations: str | None = None, **settings: Any
    ) -> None:
        known = activations is None or activations in ACTIVATIONS
        require(known, "NormTweakConfig", "activations", f"one of {', '.join(ACTIVATIONS)}", activations)
        if method == "rtn":
            settings = {"tweak": None} | settings
        self.quant_method = METHOD  # type: ignore[assignment]
        self.activations = activations
        self.recipe = QuantizeConfig.preset(bits=bits, group_size=group_size, symmetric=symmetric, method=method, **settings)
        self.stored: dict[str, Any] | None = None

    @classmethod
    def of_checkpoint(cls, stored: dict[str, Any], activations: str | None = None) -> NormTweakConfig:
        """For a checkpoint whose config.json has `stored` as its `quantization_config`."""
        config = cls(activations=activations)
        config.stored = copy.deepcopy(stored)
        config.activations = activations or stored_activations(stored)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From `to_dict`'s result: a checkpoint's settings, or a recipe."""
        if "stored" in config_dict:
            config = cls.of_checkpoint(config_dict["stored"])
        elif config_dict.get("quant_method") != METHOD:
            config = cls.of_checkpoint(config_dict)
        else:
            config = cls(**{key: value for key, value in config_dict.items() if key != "quant_method"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """What config.json is to say: of a checkpoint its own settings, else the recipe."""
        if self.stored is not None:
            return copy.deepcopy(self.stored)
        return self.recipe.to_dict() | {"quant_method": METHOD, "activations": self.activations}


@register_quantizer(METHOD)
class NormTweakQuantizer(HfQuantizer):
    """Loads linears as a checkpoint stores them and turns each into a PackedLinear; quantizes a float model first. Writes them back as they were."""

    quantization_config: NormTweakConfig
    # Adapters on top: packed weights themselves have no gradient.
    is_trainable = True
    is_compileable = True

    def is_serializable(self, **kwargs: Any) -> bool:
        """Whether `save_pretrained` can write the model: it can."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        require(bool(checkpoint_files), "from_pretrained", "model", "a folder or on the hub", "a state dictionary")
        assert checkpoint_files is not None
        folder = self._folder = ModelFolder(Path(checkpoint_files[0]).parent)
        self._names = [name for name, _ in model.named_parameters()]
        if not self.pre_quantized:
            self._check_float(model, device_map)
            return
        form = self._format = formats.open_format(self.quantization_config.stored or {})
        plain = dict(model.named_modules())
        packed = packed_linears(model, folder, form)
        # what the checkpoint's settings call them, also where the model is loaded without its head
        self._paths = {name: prefix.removesuffix(".") for name, (_, prefix) in packed.items()}
        for name, linear in quantizable_linears(model).items():
            if name in packed:
                prefix = packed[name][1]
                leaves = [leaf for leaf in form.leaves if folder.weights.find(prefix + leaf) == prefix + leaf]
                replace(model, name, _StoredLinear(linear, {leaf: folder.weights.empty(prefix + leaf) for leaf in leaves}))
            elif isinstance(linear, Conv1DLinear):
                replace(model, name, plain[name])
        self._names = [name for name, _ in model.named_parameters()]

    def _check_float(self, model: Any, device_map: Any) -> None:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
        require(type(model) is known, "from_pretrained", "model", "a causal language model, to be quantized on the spot", type(model).__name__)
        _check_one_device(device_map)
        recipe = self.quantization_config.recipe
        if recipe.method == "rtn" and recipe.bits < 4:
            logger.warning("rounding to the nearest of %d bits ruins most models: NormTweakConfig(..., method='gptq') looks at text", recipe.bits)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self._quantize(model)
            return
        stored = {name: module for name, module in model.named_modules() if isinstance(module, _StoredLinear)}
        for name, module in stored.items():
            require(module.device.type != "meta", "from_pretrained", "offload_buffers", "off for packed linears", "on")
            tensors, device = module.tensors(), module.device
            # Repacked on the CPU, where the native kernels do it, and sent back.
            packed = self._format.read(
                self._paths[name], {leaf: tensor.cpu() for leaf, tensor in tensors.items()}, module.out_features, module.in_features
            )
            packed.activations = self.quantization_config.activations or "auto"
            replace(model, name, packed.to(device))

    def _quantize(self, model: Any) -> None:
        """Put a packed model's modules in the place of the float model's, which transformers has just loaded."""
        if not Path(model.name_or_path).is_dir():
            from transformers import AutoTokenizer

            # It comes to lie beside the weights that transformers downloaded, of the same revision.
            AutoTokenizer.from_pretrained(model.name_or_path, revision=model.config._commit_hash)
        _check_one_device(getattr(model, "hf_device_map", None))  # what "auto" came to
        dtype, device = model.dtype, model.device
        for name, _ in list(model.named_children()):
            setattr(model, name, nn.Identity())  # so that there are never two float models in memory
        logger.info("quantizing %s on the spot", model.name_or_path)
        with tempfile.TemporaryDirectory(prefix="normtweak-") as scratch:
            out = Path(scratch) / "packed"
            quantize(self._folder.path, out=out, config=self.quantization_config.recipe)
            packed = load(out, dtype=dtype, device=device, activations=self.quantization_config.activations)
        for name, module in packed.named_children():
            setattr(model, name, module)
        model.config.tie_word_embeddings = packed.config.tie_word_embeddings
        model.hf_quantizer, model.config.quantization_config = packed.hf_quantizer, packed.hf_quantizer.quantization_config

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Without the steps that merge experts into tensors that the packed model hasn't. (transformers before 5.20 doesn't say which model.)"""
        from transformers.core_model_loading import WeightConverter

        names = [name for name, _ in model.named_parameters()] if model is not None else self._names

        def of_use(step: Any) -> bool:
            return not isinstance(step, WeightConverter) or any(re.search(target, name) for target in step.target_patterns for name in names)

        return [step for step in weight_conversions if of_use(step)]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """For `save_pretrained`: packed linears in the checkpoint's own format, the rest as it is."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # of an adapter on top, nothing else is written
        form = formats.open_format(self.quantization_config.stored or {})
        tensors = dict(model.state_dict())
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                for leaf in module.state_dict():
                    del tensors[f"{name}.{leaf}"]
                host = module if module.qweight.is_cpu else copy.deepcopy(module).cpu()
                tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in form.write(name, host).items()}
        return tensors, {}


class _StoredLinear(nn.Module):
    """The tensors of a packed linear as a checkpoint stores them, for transformers' loader to fill."""

    def __init__(self, linear: nn.Linear, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        for leaf, tensor in tensors.items():
            self.register_buffer(leaf, tensor)
        if linear.bias is not None:
            self.register_buffer("bias", torch.empty(linear.out_features, dtype=linear.bias.dtype))

    @property
    def weight(self) -> Tensor:
        """Nothing: GPT-2 fills the weight of a module by this name at random before the checkpoint is read."""
        return torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Where the loader put the tensors."""
        return next(self.buffers()).device

    def tensors(self) -> dict[str, Tensor]:
        """By their names."""
        return dict(self.named_buffers())


def _check_one_device(device_map: Any) -> None:
    devices = set(device_map.values()) if isinstance(device_map, dict) else set()
    one = len(devices) <= 1 and "disk" not in devices
    require(one, "from_pretrained", "device_map", "one device while a model is quantized on the spot (save it, then load it on several)", device_map)


_merge = AutoHfQuantizer.merge_quantization_configs


def _merge_configs(stored: Any, passed: Any) -> Any:
    """transformers' choice of a quantizer for a checkpoint, `stored` its settings and `passed` what the user gave: ours where it is ours or asked for."""
    if isinstance(passed, NormTweakConfig):
        return NormTweakConfig.of_checkpoint(stored if isinstance(stored, dict) else stored.to_dict(), passed.activations)
    return NormTweakConfig.of_checkpoint(stored) if passed is None and isinstance(stored, dict) and written_here(stored) else _merge(stored, passed)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_configs)  # type: ignore[assignment, method-assign]
