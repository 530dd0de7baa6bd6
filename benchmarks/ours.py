"""Our packed product as other benchmarks call it: factory(q, scales, zeros, group, bits) -> callable(x) -> y, float32 in and out.

q: uint8 [N, K] codes; scales, zeros: float32 [N, K / group]; y [M, N] = x @ ((q - zero) * scale).T. Scales are stored in float16, as checkpoints do.
`factory` is the default (23 bits of float32 activations); `int16` and `int8` are the faster modes of `dequant_gemm`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from normtweak_kernels import packing
from normtweak_kernels.dequant_gemm import Prepared


def make(
    q: Tensor, scales: Tensor, zeros: Tensor, group: int, bits: int, *, activations: str, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """A product with one weight, in the given mode and with x in the given dtype."""
    symmetric = bool((zeros == 2 ** (bits - 1)).all())
    weight = Prepared(
        packing.pack(q, bits),
        scales.t().contiguous().half(),
        None if symmetric else zeros.t().contiguous().to(torch.uint8),
        q.shape[1],
        bits=bits,
        activations=activations,
    )
    return lambda x: weight(x.to(dtype))


factory = partial(make, activations="auto")
bfloat16 = partial(make, activations="auto", dtype=torch.bfloat16)
int16 = partial(make, activations="int16")
int8 = partial(make, activations="int8")
