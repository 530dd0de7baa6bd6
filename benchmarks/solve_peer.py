"""A whole GPTQ solve (grids, factor and loop) of one weight beside llm-compressor's, in turn, in one process.

PYTHONPATH=.:kernels PYTHON benchmarks/solve_peer.py [--rounds 7]      with a PYTHON that can import llmcompressor
Pin the process for one thread: OMP_NUM_THREADS=1 taskset -c 0. Both: W4, groups of 64, blocks of 128 columns, no order of activations;
llm-compressor is given its min-max grids, ours also searches 24 ranges for each group.
"""

from __future__ import annotations

import argparse

import torch
from compressed_tensors.quantization import QuantizationArgs
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

from interleaved import medians, table
from normtweak.config import QuantizeConfig
from normtweak.quantizers.gptq import Solver
from shapes import GROUP_SIZE, WEIGHTS

CONFIG = QuantizeConfig(bits=4, group_size=GROUP_SIZE, act_order=False, tweak=None)
PEER = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP_SIZE)


def contenders(n: int, k: int):
    """The two solves of one weight [n, k]."""
    weight, x = torch.randn(n, k), torch.randn(2 * k, k) * torch.linspace(0.3, 3, k)
    hessian = x.t() @ x / len(x)
    scale = weight.unflatten(1, (-1, GROUP_SIZE)).abs().amax(-1) / 7.5
    zero = torch.zeros_like(scale, dtype=torch.int8)

    def peer():
        # it works in place on what it is given
        return quantize_weight(weight.clone()[None], hessian.clone()[None], scale[None], zero[None], None, PEER)

    return {"normtweak": lambda: Solver(hessian, CONFIG, "benchmark").quantize(weight), "llm-compressor": peer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for n, k in WEIGHTS:
        print(table(f"solve N={n} K={k}", medians(contenders(n, k), rounds), "llm-compressor"), flush=True)


if __name__ == "__main__":
    main()
