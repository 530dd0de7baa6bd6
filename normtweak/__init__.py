"""normtweak: quantize a language model layer by layer, tweak its norms, serve the packed weights."""

from .config import CalibrationConfig, ModuleOverride, QuantizeConfig, TweakConfig
from .linear import PackedLinear
from .models import load, load_tokenizer
from .pipeline import Report, quantize

__all__ = ["CalibrationConfig", "ModuleOverride", "PackedLinear", "QuantizeConfig", "Report", "TweakConfig", "load", "load_tokenizer", "quantize"]
