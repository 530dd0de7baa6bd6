"""RTN: every weight goes to the nearest point of its group's min-max grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from normtweak_kernels import QuantizedWeight, affine, group_params

from ..config import QuantizeConfig


class RTN:
    """Round to nearest. It looks at no activation and searches no clip range, so that it stays the field's plain baseline."""

    def quantize_block(self, linears: Mapping[str, nn.Linear], run: Callable[[], None], config: QuantizeConfig) -> dict[str, QuantizedWeight]:
        """See Quantizer."""
        return {name: self._quantize(linear, own) for name, linear in linears.items() if (own := config.for_module(name))}

    def _quantize(self, linear: nn.Linear, config: QuantizeConfig) -> QuantizedWeight:
        weight = linear.weight.detach().float()
        scales, zeros = group_params(weight, bits=config.bits, group_size=config.group_size, symmetric=config.symmetric)
        k = weight.shape[1]
        codes = affine.quantize(weight, affine.expand(scales, k), affine.expand(zeros.float(), k), config.bits)
        return QuantizedWeight(codes.to(torch.uint8), scales.half(), None if config.symmetric else zeros, config.bits)
