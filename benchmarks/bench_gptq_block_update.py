import pytest
import torch

from normtweak_kernels import gptq_block_update, group_params
from shapes import GROUP_SIZE, WEIGHTS

BLOCK = 128


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("variant", ["reference", "cpp"])
def test_a_whole_weight(measure, variant, n, k):
    weight = torch.randn(n, k)
    hinv = torch.eye(k) + 0.01 * torch.randn(k, k).triu(1)
    scales, zeros = group_params(weight, bits=4, group_size=GROUP_SIZE)
    group_index = (torch.arange(k) // GROUP_SIZE).int()
    codes = torch.empty(n, k, dtype=torch.uint8)

    def all_blocks():
        updated = weight.clone()
        for start in range(0, k, BLOCK):
            gptq_block_update(updated, hinv, codes, scales, zeros, start, min(start + BLOCK, k), bits=4, group_index=group_index)

    measure(all_blocks, op="gptq_block_update", variant=variant, case=f"N={n} K={k} all blocks", moved=weight.nbytes + codes.nbytes, flops=n * k * k)
