"""Base quantizers behind one protocol, found by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight

from ..config import QuantizeConfig
from ..folding import Fold


class Run(Protocol):
    """Sends the calibration text through the block as it is at the time of the call."""

    def __call__(self, sequences: int | None = None) -> Tensor:
        """The block's output [S, L, H] for the first `sequences` sequences, for all when None."""
        ...


class Quantizer(Protocol):
    """Chooses the codes of one block's linears."""

    def check(self) -> None:
        """Raise ValueError when something that it needs isn't installed. Called before any heavy work."""
        return

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """The quantized weight of each linear that `config.for_module(path)` gives settings for. linears: by path in the model.

        run: for quantizers that look at activations; for a block it is an `activations.Passes`. folds: where scales can move inside the block; a quantizer that moves some does so in
        place, and gives the codes of the linears as they are then. Raises ValueError for a configuration or a block that it can't do.
        """
        ...


def find(name: str) -> Quantizer:
    """The quantizer called `name`. Raises ValueError for a name that no file has."""
    from . import autoround, awq, gptq, rtn, smoothquant

    quantizers: dict[str, Quantizer] = {
        "gptq": gptq.GPTQ(),
        "rtn": rtn.RTN(),
        "awq": awq.AWQ(),
        "smoothquant": smoothquant.SmoothQuant(),
        "autoround": autoround.AutoRound(),
    }
    if name not in quantizers:
        raise ValueError(f"quantizers: method must be one of {', '.join(quantizers)}, got {name}")
    return quantizers[name]
