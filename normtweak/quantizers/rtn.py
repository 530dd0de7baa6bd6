"""RTN: every weight goes to the nearest point of its group's min-max grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from normtweak_kernels import QuantizedWeight

from ..config import QuantizeConfig
from ..folding import Fold
from ..rounding import nearest
from . import Quantizer, Run


class RTN(Quantizer):
    """Round to nearest. It looks at no activation and searches no clip range, so that it stays the field's plain baseline."""

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """See Quantizer."""
        return {name: nearest(linear.weight, own) for name, linear in linears.items() if (own := config.for_module(name))}
