"""Shards of packed linears against the whole linear: the same weight, whatever the cut goes through."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtweak import formats
from normtweak.shards import STORED, Shard, check_order, first_row
from normtweak_kernels import packing
from stored_linears import stored_linear


def load(shard, tensors, rows, first, last, v2=False):
    """What an engine does with one rank's rows of one linear."""
    buffers = shard.empty(last - first)
    for name in STORED:
        buffers[name].copy_(shard.cut(name, tensors[name], rows, first, last, v2=v2))
    return shard.pack(buffers)


@st.composite
def linears(draw):
    world = draw(st.sampled_from([1, 2, 3, 4]))
    group = draw(st.sampled_from([-1, 8, 16, 32, 64, 128]))
    if group == -1:
        k = world * draw(st.integers(1, 150))
    else:
        k = group * draw(st.integers(1, 6).filter(lambda groups: group * groups % world == 0))
    return draw(st.sampled_from(packing.BITS)), group, k, world * draw(st.integers(1, 40)), world, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(linears(), st.integers(0, 2**31))
def test_row_parallel_shards_are_columns_of_the_whole(linear, seed):
    bits, group, k, n, world, symmetric, v2 = linear
    weight, tensors = stored_linear(n, k, bits, group, symmetric, v2, seed)
    local = k // world
    for rank in range(world):
        shard = Shard(bits, group, k, rank * local, (rank + 1) * local)
        packed = load(shard, tensors, n, 0, n, v2)
        assert packed.zeros is None or not symmetric
        assert torch.equal(packed.quantized().dequantize(), weight[:, rank * local : (rank + 1) * local])


@settings(max_examples=40, deadline=None)
@given(linears(), st.integers(0, 2**31))
def test_column_parallel_shards_are_rows_of_the_whole(linear, seed):
    bits, group, k, n, world, symmetric, v2 = linear
    weight, tensors = stored_linear(n, k, bits, group, symmetric, v2, seed)
    local = n // world
    for rank in range(world):
        first = first_row(n, local, rank, world)
        packed = load(Shard(bits, group, k, 0, k), tensors, n, first, first + local, v2)
        assert torch.equal(packed.quantized().dequantize(), weight[first : first + local])


@pytest.mark.parametrize("bits", packing.BITS)
def test_a_cut_through_a_group_multiplies_as_the_whole_does(bits):
    weight, tensors = stored_linear(40, 576, bits, 64)
    x = torch.randn(3, 576)
    halves = [Shard(bits, 64, 576, 288 * rank, 288 * (rank + 1)) for rank in range(2)]
    assert [shard.local_group for shard in halves] == [32, 32]
    y = sum(load(shard, tensors, 40, 0, 40)(x[:, shard.start : shard.stop]) for shard in halves)
    torch.testing.assert_close(y, x @ weight.t(), rtol=2e-5, atol=2e-4 * weight.abs().max().item())


def test_a_shard_in_one_group_is_one_group():
    assert Shard(4, 128, 512, 32, 96).local_group == 64
    assert Shard(4, -1, 500, 250, 500).local_group == 250
    assert Shard(4, 64, 576, 0, 576).local_group == 64
    assert Shard(4, 64, 256, 32, 160).local_group == 32  # the first group is cut where no multiple of the shard's length lies


def test_the_whole_is_what_the_checkpoint_reader_makes():
    _, tensors = stored_linear(33, 96, 3, 32)
    form = formats.open_format({"quant_method": "gptq", "bits": 3, "group_size": 96 // len(tensors["scales"]), "sym": False})
    whole, ours = form.read("linear", tensors, 33, 96), load(Shard(3, 32, 96, 0, 96), tensors, 33, 0, 33)
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffer, dict(ours.named_buffers())[name])


def test_merged_rows_lie_one_after_the_other():
    parts = [stored_linear(n, 64, 4, 32, seed=n) for n in (20, 7, 7)]
    shard, at = Shard(4, 32, 64, 0, 64), 0
    buffers = shard.empty(34)
    for weight, tensors in parts:
        for name in STORED:
            buffers[name][:, at : at + len(weight)] = shard.cut(name, tensors[name], len(weight), 0, len(weight))
        at += len(weight)
    assert torch.equal(shard.pack(buffers).quantized().dequantize(), torch.cat([weight for weight, _ in parts]))


def test_rows_of_ranks():
    assert [first_row(12, 3, rank, 4) for rank in range(4)] == [0, 3, 6, 9]
    assert [first_row(12, 12, rank, 4) for rank in range(4)] == [0] * 4  # replicated
    assert [first_row(8, 4, rank, 4) for rank in range(4)] == [0, 0, 4, 4]  # two key-value heads, four ranks
    with pytest.raises(ValueError, match="shard: rows must be in parts of 5 for 2 ranks, got 12"):
        first_row(12, 5, 0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 64, 576, 0, 576), "bits must be one of 2, 3, 4, 8, got 5"),
        ((4, 100, 576, 0, 576), "group_size must be -1 or a divisor of the 576 columns, got 100"),
        ((4, 64, 576, 288, 600), "columns must be in 0 to 576, got 288 to 600"),
    ],
)
def test_shards_that_can_not_be(arguments, message):
    with pytest.raises(ValueError, match=f"shard: {message}"):
        Shard(*arguments)


def test_tensors_of_another_linear():
    _, tensors = stored_linear(16, 128, 4, 64)
    shard = Shard(4, 64, 128, 0, 64)
    with pytest.raises(ValueError, match=r"shard: qweight must be \(16, 24\) at 4 bits, got \(16, 16\)"):
        shard.cut("qweight", tensors["qweight"], 24, 0, 24)
    with pytest.raises(ValueError, match=r"shard: scales must be of 4 groups and 16 rows, got \(2, 16\)"):
        Shard(4, 32, 128, 0, 64).cut("scales", tensors["scales"], 16, 0, 16)
    check_order("linear", tensors["g_idx"], 64)
    with pytest.raises(ValueError, match="linear: g_idx must be k // group_size"):
        check_order("linear", tensors["g_idx"].flip(0), 64)
