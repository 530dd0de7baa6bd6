"""Checkpoint formats behind one protocol, found by name: how packed linears are stored, and how a checkpoint's `quantization_config` says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import require
from ..linear import PackedLinear
from .scheme import Scheme

__all__ = ["WRITTEN", "Format", "Scheme", "describe", "open_format"]

# What checkpoints can be written as.
WRITTEN = ("gptq", "gptq_v2", "compressed-tensors")


class Format(Protocol):
    """A checkpoint's format, bound to its `quantization_config`."""

    settings: Mapping[str, Any]
    # Names of a packed linear's tensors behind its path; the codes' own, which tells a packed linear from others, is among them. A bias is "bias" everywhere.
    leaves: tuple[str, ...]
    codes: str

    def scheme(self, path: str) -> Scheme | None:
        """What the configuration says of the linear at `path` in the model; None for one that it leaves in floating point."""
        ...

    def tensors(self, scheme: Scheme, n: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each leaf of a weight [n, k], for loaders that make room before they read."""
        ...

    def read(self, path: str, tensors: Mapping[str, Tensor], n: int, k: int) -> PackedLinear:
        """The packed linear [n, k] of a checkpoint's tensors (`leaves`, and "bias" where it has one).

        Raises ValueError in one line that names it for tensors that don't fit together or say what packed linears can't hold.
        """
        ...

    def grid(self, path: str, tensors: Mapping[str, Tensor], n: int, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """scales [G, n], zeros and perm of `read`'s packed linear, from `tensors` that needn't hold the codes."""
        ...

    def check(self, path: str, scales: Tensor, zeros: Tensor | None, perm: Tensor | None) -> None:
        """Raise ValueError, naming the linear, for a grid that the format can't hold."""
        ...

    def write(self, path: str, linear: PackedLinear) -> dict[str, Tensor]:
        """The checkpoint's tensors by leaf; the inverse of `read`."""
        ...


def open_format(settings: Mapping[str, Any]) -> Format:
    """The format of a checkpoint with this `quantization_config`. Raises ValueError for one that isn't read here."""
    from . import auto_round, compressed_tensors, gptq

    method = settings.get("quant_method")
    readers: dict[str, Callable[[Mapping[str, Any]], Format]] = {
        "gptq": gptq.GPTQ,
        "auto-round": auto_round.AutoRound,
        "compressed-tensors": compressed_tensors.CompressedTensors,
    }
    require(method in readers, "load", "quant_method", "one of " + ", ".join(readers), method)
    return readers[str(method)](settings)


def describe(
    name: str, schemes: Mapping[str, Scheme], plain: Sequence[str], *, head: str | None = None, meta: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint in the format `name`, one of `WRITTEN`; `open_format` of it writes the linears.

    schemes: of the packed linears, by path. plain: paths of linears in floating point. head: the output head's path. meta: who made it, and how, where the format has a place.
    """
    from . import compressed_tensors, gptq

    require(name in WRITTEN, "formats", "format", "one of " + ", ".join(WRITTEN), name)
    if name == "compressed-tensors":
        activations = (meta or {}).get("activations", "auto")
        require(activations == "auto", "formats", "format", f"gptq or gptq_v2 for activations as {activations}", name)
        return compressed_tensors.describe(schemes, plain)
    return gptq.describe(schemes, plain, head, meta or {}, v2=name == "gptq_v2")
