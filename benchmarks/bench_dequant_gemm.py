"""The packed product beside torch's dense one, a read of the same bytes (`stream`) and a dense bfloat16 product (`probe`: the state of AMX)."""

import itertools

import pytest
import torch

from normtweak_kernels import dequant_gemm, packing
from shapes import GROUP_SIZE, ROTATED_BYTES, ROWS, WEIGHTS


def rotation(*tensors):
    """Endless copies of the tensors, together larger than a cache."""
    size = sum(tensor.nbytes for tensor in tensors)
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(max(1, ROTATED_BYTES // size))])


def make(n, k, m, dtype, bits):
    """The variants of one product, by name, and what they move and compute."""
    x, flops = torch.randn(m, k).to(dtype), 2 * m * n * k
    words = torch.randint(-(2**31), 2**31 - 1, packing.packed_shape(n, k, bits), dtype=torch.int32)
    scales = torch.rand(k // GROUP_SIZE, n).half()
    weights, dense = rotation(words, scales), rotation(torch.randn(n, k).to(dtype))
    bytes_read = rotation(torch.randint(0, 2**31, ((words.nbytes + scales.nbytes) // 8,), dtype=torch.int64))
    probe = torch.randn(512, 512).bfloat16()
    calls = {variant: lambda: dequant_gemm(x, *next(weights), bits=bits) for variant in ("cpp", "reference")}
    calls |= {mode: lambda mode=mode: dequant_gemm(x, *next(weights), bits=bits, activations=mode) for mode in ("int16", "int8", "int8_token")}
    calls |= {
        "torch dense": lambda: torch.nn.functional.linear(x, next(dense)[0]),
        "stream": lambda: next(bytes_read)[0].sum(),
        "probe": lambda: probe @ probe,
    }
    moved = words.nbytes + scales.nbytes + (n + k) * m * x.itemsize
    case = f"N={n} K={k} M={m} {str(dtype).removeprefix('torch.')} W{bits}"
    return calls, {"op": "dequant_gemm", "case": case, "moved": moved, "flops": flops}


CASES = [(*shape, m, dtype, bits) for shape in WEIGHTS for m in ROWS for dtype in (torch.float32, torch.bfloat16) for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value).removeprefix("torch.") for value in case))
def test_dequant_gemm(measure, case):
    calls, info = make(*case)
    measure(calls["cpp"], variant="cpp", **info)


# What the product is compared with, at the bits that most people use.
@pytest.mark.parametrize("variant", ["reference", "int16", "int8", "int8_token", "torch dense", "stream", "probe"])
@pytest.mark.parametrize("case", [case for case in CASES if case[-1] == 4], ids=lambda case: "-".join(str(v).removeprefix("torch.") for v in case))
def test_beside_dequant_gemm(measure, case, variant):
    calls, info = make(*case)
    measure(calls[variant], variant=variant, **info)
