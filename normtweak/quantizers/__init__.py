"""Base quantizers behind one protocol, found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import nn

from normtweak_kernels import QuantizedWeight

from ..config import QuantizeConfig


class Quantizer(Protocol):
    """Chooses the codes of one block's linears."""

    def quantize_block(self, linears: Mapping[str, nn.Linear], run: Callable[[], None], config: QuantizeConfig) -> dict[str, QuantizedWeight]:
        """The quantized weight of each linear that `config.for_module(path)` gives settings for. linears: by path in the model.

        `run()` sends the calibration text through the block, for quantizers that look at activations.
        """
        ...


def find(name: str) -> Quantizer:
    """The quantizer called `name`. Raises ValueError for a name that no file has."""
    from . import gptq, rtn

    quantizers: dict[str, Quantizer] = {"gptq": gptq.GPTQ(), "rtn": rtn.RTN()}
    if name not in quantizers:
        raise ValueError(f"quantizers: method must be one of {', '.join(quantizers)}, got {name}")
    return quantizers[name]
