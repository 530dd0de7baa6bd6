"""The packed product on 1 thread and on more, in turn: python benchmarks/threads.py [--threads 2] [--rounds 15]. Not pinned."""

from __future__ import annotations

import argparse

import torch

from bench_dequant_gemm import rotation
from interleaved import medians, table
from normtweak_kernels import dequant_gemm, packing
from shapes import GROUP_SIZE

N = K = 4096


def contenders(m: int, bits: int, threads: int):
    """One product of m rows by number of threads, and a read of the same bytes; weights come from memory."""
    x = torch.randn(m, K).bfloat16()
    words = torch.randint(-(2**31), 2**31 - 1, packing.packed_shape(N, K, bits), dtype=torch.int32)
    scales = torch.rand(K // GROUP_SIZE, N).half()
    weights = rotation(words, scales)
    streams = rotation(torch.randint(0, 2**31, ((words.nbytes + scales.nbytes) // 8,), dtype=torch.int64))

    def on(count, call):
        def run():
            torch.set_num_threads(count)
            call()

        return run

    counts = (1, threads)
    calls = {f"{count} threads": on(count, lambda: dequant_gemm(x, *next(weights), bits=bits)) for count in counts}
    return calls | {f"stream, {count} threads": on(count, lambda: next(streams)[0].sum()) for count in counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for bits in (4, 2):
        for m in (1, 16, 256, 1024):
            seconds = medians(contenders(m, bits, options.threads), options.rounds)
            print(table(f"W{bits} g{GROUP_SIZE} {N} x {K}, M={m}, bfloat16", seconds, "1 threads"), flush=True)


if __name__ == "__main__":
    main()
