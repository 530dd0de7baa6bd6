"""Launch configurations: one frozen dataclass per op and architecture, each value with its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DequantGemmCpu:
    """CPU bodies of dequant_gemm: the fused kernel for few rows of x, panels and the BLAS for more."""

    # Up to here unpacking the weight again for every four rows costs less than writing it dequantized and reading it back; measured
    # at 4096 x 4096 and 576 x 1536. Lower for bfloat16, which processors with bfloat16 products multiply faster than float32.
    fused_max_rows: int = 32
    fused_max_rows_bfloat16: int = 16
    # Small enough for a large cache (dequantizing 4096 x 4096 into 4 MB panels takes 3.7 ms, into 8 MB 6.2), large enough that
    # every thread gets work of each and that the threads seldom wait for one another.
    panel_bytes: int = 2**22


DEQUANT_GEMM_CPU = DequantGemmCpu()
