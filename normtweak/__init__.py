"""normtweak: quantize a language model layer by layer, tweak its norms, serve the packed weights."""

from typing import Any

from . import integrations
from .config import CalibrationConfig, ModuleOverride, PolishConfig, QuantizeConfig, RetweakConfig, TweakConfig
from .convert import convert
from .linear import PackedLinear
from .models import load, load_tokenizer
from .pipeline import Report, quantize
from .retweak import RetweakReport, tweak

__all__ = [
    "CalibrationConfig",
    "ModuleOverride",
    "NormTweakConfig",
    "PackedLinear",
    "PolishConfig",
    "QuantizeConfig",
    "Report",
    "RetweakConfig",
    "RetweakReport",
    "TweakConfig",
    "convert",
    "integrations",
    "load",
    "load_tokenizer",
    "quantize",
    "tweak",
]


def __getattr__(name: str) -> Any:
    if name == "NormTweakConfig":  # its base is a class of transformers, which `import normtweak` doesn't load
        from .integrations.transformers import NormTweakConfig

        return NormTweakConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
