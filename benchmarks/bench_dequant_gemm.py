import itertools

import pytest
import torch
from shapes import GROUP_SIZE, ROTATED_BYTES, ROWS, WEIGHTS

from normtweak_kernels import dequant_gemm, packing


def rotation(*tensors):
    """Endless copies of the tensors, together larger than a cache."""
    size = sum(tensor.nbytes for tensor in tensors)
    return itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(max(1, ROTATED_BYTES // size))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("variant", ["dense", "cpp W2", "cpp W4", "reference W4"])
def test_dequant_gemm(measure, variant, n, k, m, dtype):
    x, flops = torch.randn(m, k, dtype=dtype), 2 * m * n * k
    case = f"N={n} K={k} M={m} {str(dtype).removeprefix('torch.')}"
    if variant == "dense":
        weights = rotation(torch.randn(n, k, dtype=dtype))
        moved = n * k * x.itemsize + (n + k) * m * x.itemsize
        measure(
            lambda: torch.nn.functional.linear(x, next(weights)[0]), op="dequant_gemm", variant="torch dense", case=case, moved=moved, flops=flops
        )
        return
    backend, bits = variant.split()[0], int(variant[-1])
    words = torch.randint(-(2**31), 2**31 - 1, packing.packed_shape(n, k, bits), dtype=torch.int32)
    scales = torch.rand(k // GROUP_SIZE, n).half()
    weights = rotation(words, scales)
    moved = words.nbytes + scales.nbytes + (n + k) * m * x.itemsize
    measure(lambda: dequant_gemm(x, *next(weights), bits=bits), op="dequant_gemm", variant=backend, case=f"{case} W{bits}", moved=moved, flops=flops)
