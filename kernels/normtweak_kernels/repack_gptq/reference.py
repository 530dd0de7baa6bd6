"""repack_gptq by way of the codes: the definition."""

from __future__ import annotations

from torch import Tensor

from .. import packing, registry


@registry.register("repack_gptq", "reference")
def repack_gptq(qweight: Tensor, bits: int, k: int) -> Tensor:
    """See the package's docstring."""
    return packing.pack(packing.unpack_gptq(qweight, bits, k), bits)


@registry.register("repack_to_gptq", "reference")
def repack_to_gptq(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """See the package's docstring."""
    return packing.pack_gptq(packing.unpack(packed, bits, n, k), bits)
