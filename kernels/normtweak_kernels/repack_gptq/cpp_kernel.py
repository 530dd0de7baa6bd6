"""repack_gptq on the CPU, at the memory's speed: csrc/cpu/repack_gptq.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native, packing, registry


def _refuses(words: Tensor, *rest: object) -> str | None:
    return native.refuses(words)


def _move(gptq: Tensor, packed: Tensor, n: int, k: int, bits: int, to_gptq: bool) -> None:
    if 0 not in (n, k):
        native.loaded().repack_gptq(torch.get_num_threads(), native.address(gptq), native.address(packed), n, k, bits, to_gptq)


@registry.register("repack_gptq", "cpp", _refuses)
def repack_gptq(qweight: Tensor, bits: int, k: int) -> Tensor:
    """See the package's docstring."""
    n, qweight = qweight.shape[1], qweight.contiguous()
    packed = torch.empty(packing.packed_shape(n, k, bits), dtype=torch.int32, device="cpu")
    _move(qweight, packed, n, k, bits, False)
    return packed


@registry.register("repack_to_gptq", "cpp", _refuses)
def repack_to_gptq(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """See the package's docstring."""
    packed = packed.contiguous()
    qweight = torch.empty(-(-k * bits // 32), n, dtype=torch.int32, device="cpu")
    _move(qweight, packed, n, k, bits, True)
    return qweight
