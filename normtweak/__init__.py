"""normtweak: quantize a language model layer by layer, tweak its norms, serve the packed weights."""

from .config import CalibrationConfig, ModuleOverride, QuantizeConfig, RetweakConfig, TweakConfig
from .convert import convert
from .linear import PackedLinear
from .models import load, load_tokenizer
from .pipeline import Report, quantize
from .retweak import RetweakReport, tweak

__all__ = [
    "CalibrationConfig",
    "ModuleOverride",
    "PackedLinear",
    "QuantizeConfig",
    "Report",
    "RetweakConfig",
    "RetweakReport",
    "TweakConfig",
    "convert",
    "load",
    "load_tokenizer",
    "quantize",
    "tweak",
]
