"""GPTQ's layout to ours and back, beside a copy of the same words."""

import pytest
import torch

from normtweak_kernels import packing, repack_gptq, repack_to_gptq
from shapes import WEIGHTS


def make(n, k, bits):
    gptq = torch.randint(-(2**31), 2**31 - 1, (k * bits // 32, n), dtype=torch.int32)
    packed = repack_gptq(gptq, bits, k)
    calls = {variant: lambda: repack_gptq(gptq, bits, k) for variant in ("cpp", "reference")}
    calls |= {"back": lambda: repack_to_gptq(packed, bits, n, k), "copy": gptq.clone}
    return calls, {"op": "repack_gptq", "case": f"N={n} K={k} W{bits}", "moved": 2 * gptq.nbytes}


CASES = [(*shape, bits) for shape in WEIGHTS for bits in packing.BITS]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("variant", ["cpp", "reference", "back", "copy"])
def test_repack_gptq(measure, case, variant):
    calls, info = make(*case)
    measure(calls[variant], variant=variant, **info)
