"""Random linears as GPTQ checkpoints store them."""

import torch

from normtweak_kernels import QuantizedWeight, packing


def stored_linear(n, k, bits, group, symmetric=False, v2=False, seed=0):
    """A linear's weight [n, k] and its tensors as a GPTQ checkpoint stores them."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else k // group
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(groups, n, generator=generator) + 0.1).half()
    zeros = torch.full((groups, n), 2 ** (bits - 1), dtype=torch.uint8)
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (groups, n), generator=generator, dtype=torch.uint8)
    tensors = {
        "qweight": packing.pack_gptq(codes, bits), "scales": scales, "qzeros": packing.pack_gptq_zeros(zeros, bits, v2=v2),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }  # fmt: skip
    return QuantizedWeight(codes, scales, zeros, bits).dequantize(), tensors
