"""repack_gptq: GPTQ's words to the packed layout and back, without the codes in between. Both layouts: `packing.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import packing, registry
from . import cpp_kernel, reference  # noqa: F401  (they register their bodies)

torch.library.define("normtweak::repack_gptq", "(Tensor qweight, int bits, SymInt k) -> Tensor")
torch.library.define("normtweak::repack_to_gptq", "(Tensor packed, int bits, SymInt n, SymInt k) -> Tensor")


@torch.library.impl("normtweak::repack_gptq", "default")
def _run(qweight: Tensor, bits: int, k: int) -> Tensor:
    return registry.select("repack_gptq", qweight, bits, k).run(qweight, bits, k)


@torch.library.impl("normtweak::repack_to_gptq", "default")
def _run_back(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    return registry.select("repack_to_gptq", packed, bits, n, k).run(packed, bits, n, k)


@torch.library.register_fake("normtweak::repack_gptq")
def _fake(qweight: Tensor, bits: int, k: int) -> Tensor:
    return qweight.new_empty(packing.packed_shape(qweight.shape[1], k, bits))


@torch.library.register_fake("normtweak::repack_to_gptq")
def _fake_back(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    return packed.new_empty((-(-k * bits // 32), n))


def repack_gptq(qweight: Tensor, bits: int, k: int) -> Tensor:
    """GPTQ's qweight int32 [ceil(k * bits / 32), N] -> the packed int32 [ceil(N/16), ceil(k/32) * bits, 16] of the same codes.

    Raises ValueError for other bits, shapes or dtypes.
    """
    packing.check_bits("repack_gptq", bits)
    if qweight.dim() != 2 or qweight.dtype != torch.int32 or qweight.shape[0] != -(-k * bits // 32):
        raise ValueError(
            f"repack_gptq: qweight must be int32 [{-(-k * bits // 32)}, N] for {bits} bits and K = {k}, got {qweight.dtype} {tuple(qweight.shape)}"
        )
    return torch.ops.normtweak.repack_gptq(qweight, bits, k)


def repack_to_gptq(packed: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `repack_gptq`. Raises ValueError for other bits, shapes or dtypes."""
    packing.check_bits("repack_to_gptq", bits)
    if tuple(packed.shape) != packing.packed_shape(n, k, bits) or packed.dtype != torch.int32:
        raise ValueError(f"repack_to_gptq: packed must be int32 {packing.packed_shape(n, k, bits)}, got {packed.dtype} {tuple(packed.shape)}")
    return torch.ops.normtweak.repack_to_gptq(packed, bits, n, k)
