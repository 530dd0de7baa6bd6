"""A block of 128 columns of GPTQ on a GPU, and a whole weight, beside the float32 product that a whole weight takes at least."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from normtweak_kernels import gptq_block_update, gptq_solve

WEIGHTS = [(576, 1536), (4096, 4096), (14336, 4096)]
GROUP_SIZE = 64
BLOCK = 128
DEVICE = "cuda"


def cases() -> Iterator[tuple[str, int, int, dict[str, Callable[[], object]]]]:
    """(case, bytes moved, operations, calls), see gpu.py."""
    for n, k in WEIGHTS:
        weight, codes = torch.randn(n, k, device=DEVICE), torch.empty(n, k, dtype=torch.uint8, device=DEVICE)
        hinv = torch.eye(k, device=DEVICE) + 0.01 * torch.randn(k, k, device=DEVICE).triu(1)
        scales = torch.full((k // GROUP_SIZE, n), 0.25, device=DEVICE)
        zeros = torch.full((k // GROUP_SIZE, n), 8, dtype=torch.uint8, device=DEVICE)
        index = (torch.arange(k, device=DEVICE) // GROUP_SIZE).int()

        def last_block(clip_steps: int, index=None, weight=weight, hinv=hinv, codes=codes, grids=(scales, zeros), k=k) -> None:
            gptq_block_update(weight, hinv, codes, *grids, k - BLOCK, k, bits=4, group_index=index, clip_steps=clip_steps)

        yield (
            f"N={n} K={k} the last block",
            n * BLOCK * 13 + 4 * BLOCK * BLOCK,
            n * BLOCK * BLOCK,
            {
                "triton, static groups": lambda last=last_block, index=index: last(0, index),
                "triton, grids found": lambda last=last_block: last(0),
                "triton, clip search": lambda last=last_block: last(24),
            },
        )

        block_errors = torch.randn(n, BLOCK, device=DEVICE)

        def products(weight=weight, hinv=hinv, k=k, errors=block_errors) -> None:
            for stop in range(BLOCK, k, BLOCK):
                weight[:, stop:].addmm_(errors, hinv[stop - BLOCK : stop, stop:], alpha=-1e-9)

        yield (
            f"N={n} K={k} all blocks",
            weight.nbytes + codes.nbytes + hinv.nbytes // 2,
            n * k * k,
            {
                "triton": lambda weight=weight, hinv=hinv, scales=scales, zeros=zeros: gptq_solve(weight, hinv, scales, zeros, bits=4),
                "torch float32 products alone": products,
            },
        )
