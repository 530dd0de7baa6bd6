"""AutoRound's format: GPTQ's tensors, version 1 for `auto_round:auto_gptq` and 2 for `auto_round`, g_idx left out; read only.

What differs by module is in `extra_config`, by path or by regular expression; 16 bits stand for a linear in floating point.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..config import require
from .gptq import GPTQ, scheme_of
from .scheme import Scheme

_VERSIONS = {"auto_round": "gptq_v2", "auto_round:auto_gptq": "gptq", "auto_round:gptqmodel": "gptq_v2"}


class AutoRound(GPTQ):
    """See `formats.Format`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        packing = settings.get("packing_format", "auto_round:auto_gptq")
        require(packing in _VERSIONS, "load", "packing_format", "one of " + ", ".join(_VERSIONS), packing)
        kind = settings.get("data_type", "int")
        require(kind == "int", "load", "data_type", "int", kind)
        inputs = settings.get("act_bits") or 16
        require(inputs >= 16, "load", "act_bits", "16 (activations that aren't quantized)", inputs)
        require(not settings.get("rotation_config"), "load", "rotation_config", "absent", "one")
        super().__init__({"checkpoint_format": _VERSIONS[packing]})
        self.settings = settings

    def scheme(self, path: str) -> Scheme | None:
        """See `formats.Format`."""
        extra = self.settings.get("extra_config") or {}
        own: Mapping[str, Any] = extra.get(path) or next((settings for name, settings in extra.items() if _found(name, path)), {})
        settings = {**self.settings, **{key: value for key, value in own.items() if value is not None}}
        return None if settings.get("bits") == 16 else scheme_of(settings)


def _found(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"load: extra_config must have paths or regular expressions for keys, got {pattern!r} ({error})") from None
