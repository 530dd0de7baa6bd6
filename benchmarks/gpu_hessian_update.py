"""The Hessian of a batch of activations on a GPU beside torch's whole product, in float32 and in the activations' own precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from normtweak_kernels import hessian_update

TOKENS = 2048
CHANNELS = [576, 1536, 4096, 14336]
DTYPES = [torch.bfloat16, torch.float32]
DEVICE = "cuda"


def cases() -> Iterator[tuple[str, int, int, dict[str, Callable[[], object]]]]:
    """(case, bytes moved, operations, calls), see gpu.py. Operations are those of one triangle."""
    for channels in CHANNELS:
        for dtype in DTYPES:
            x = torch.randn(TOKENS, channels, device=DEVICE).to(dtype)
            values, hessian = x.float(), torch.zeros(channels, channels, device=DEVICE)
            yield (
                f"T={TOKENS} K={channels} {str(dtype).removeprefix('torch.')}",
                x.nbytes + 4 * channels * channels,
                TOKENS * channels * channels,
                {
                    "triton": lambda hessian=hessian, x=x: hessian_update(hessian, x),
                    "torch float32": lambda hessian=hessian, values=values: hessian.addmm_(values.t(), values),
                    # A 16-bit result, which makes a Hessian indefinite: the speed to compare with, not a way to compute it.
                    "torch, sum rounded": lambda x=x: x.t() @ x,
                },
            )
