"""What the vLLM plugin decides without vLLM: which versions it is for, which checkpoints it takes, how each linear of one is packed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from normtweak_kernels.dequant_gemm import ACTIVATIONS
from normtweak_kernels.packing import BITS

from .. import formats
from ..checkpoint import stored_activations, written_here
from ..config import require

NAME = "normtweak"
OLDEST, NEWEST = (0, 30), (0, 32)
# Fewer bits than vLLM's own GPTQ takes.
FEW_BITS = (2, 3)

# Bits and group size (-1: one per row) of a packed linear; None for one in floating point.
Packing = tuple[int, int] | None


def version_problem(version: str) -> str | None:
    """One line that says which vLLM the plugin is for, where `version` is another; None where it is one of those."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    wanted = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    return f"vllm: version must be {wanted} for normtweak's plugin, got {version}"


def claims(settings: Mapping[str, Any], asked: str | None) -> bool:
    """Whether the plugin takes a checkpoint with this quantization_config; asked: the --quantization that the user gave.

    Its own, those that vLLM's GPTQ refuses for having 2 or 3 bits anywhere, and any GPTQ checkpoint where the user asks for "normtweak".
    """
    method = str(settings.get("quant_method", "")).lower()
    if asked not in (None, NAME) or method not in (NAME, "gptq"):
        return False
    bits = {settings.get("bits"), *(own.get("bits") for own in (settings.get("dynamic") or {}).values() if own)}
    return method == NAME or asked == NAME or written_here(settings) or not bits.isdisjoint(FEW_BITS)


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ValueError for a quantization_config that the plugin can't run."""
    form = settings.get("checkpoint_format") or "gptq"
    require(form in ("gptq", "gptq_v2"), "quantization_config", "checkpoint_format", "gptq or gptq_v2", form)
    activations = stored_activations(settings)
    require(activations in ACTIVATIONS, "quantization_config", "activations", f"one of {', '.join(ACTIVATIONS)}", activations)
    for own in (settings, *(settings | rule for rule in (settings.get("dynamic") or {}).values() if rule)):
        bits, group = own.get("bits"), own.get("group_size")
        require(bits in BITS, "quantization_config", "bits", "one of 2, 3, 4, 8", bits)
        require(isinstance(group, int) and (group == -1 or group > 0), "quantization_config", "group_size", "-1 or positive", group)
        ordered = bool(own.get("desc_act")) and group != -1 and not (own.get("meta") or {}).get("static_groups")
        require(not ordered, "quantization_config", "desc_act", "false (columns in the order of their groups)", True)


def packings(settings: dict[str, Any], names: Sequence[str], stored: frozenset[str] | None) -> list[Packing]:
    """How the linears at these paths are packed. stored: the paths that have codes in the checkpoint, None when that isn't known.

    Raises ValueError when packed linears and others are to be one merged linear.
    """
    form, found = formats.open_format({**settings, "quant_method": "gptq"}), []
    for name in names:
        scheme = form.scheme(name)
        packed = scheme is not None and (stored is None or name in stored)
        found.append((scheme.bits, scheme.group_size) if packed and scheme is not None else None)
    mixed = None in found and any(found)
    without = ", ".join(name for name, packing in zip(names, found, strict=True) if packing is None)
    require(not mixed, "vllm", ", ".join(names), "all packed or all in floating point, as vLLM merges them", f"no codes for {without}")
    return found


def part_names(path: str, merged: Mapping[str, Sequence[str]]) -> list[str]:
    """The paths in a checkpoint of what a model calls `path`. merged: a merged linear's name -> its parts', as vLLM's models state it."""
    parent, dot, leaf = path.rpartition(".")
    return [f"{parent}{dot}{part}" for part in merged.get(leaf, [leaf])]
