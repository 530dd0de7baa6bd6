"""Launch configurations: one frozen dataclass per op and architecture, each value with its reason."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class DequantGemmCpu:
    """Which body of dequant_gemm runs on an instruction set, by the number of rows of x. Measured at 2048 x 2048, 1 thread.

    The integer kernel splits x into bytes and multiplies the codes as they are; the float kernel unpacks the weight again for every four
    rows; panels are dequantized into cache and multiplied by torch's BLAS.
    """

    # Rows up to which the integer kernel is the fastest, for weights of up to 4 bits and of 8. Without a product of bytes by fours
    # (VNNI, sdot) the codes of 8 bits go by halves, and the processor's float32 products overtake it.
    integer_max_rows: int
    integer_max_rows_8bit: int
    # Above them, up to here unpacking the weight again for every four rows costs less than writing it dequantized and reading it back.
    float_max_rows: int = 32
    # Rows above which panels of bfloat16 win on processors that multiply it fast, though the kernels of this package keep more of x.
    # On AMX its product is far above any other; beside VNNI (Zen 4 and 5) it is as fast as 16-bit integers, without their scales.
    bfloat16_panel_rows: int = 192
    bfloat16_panel_rows_amx: int = 64
    # Small enough for a large cache, large enough that every thread gets work of each and that the threads seldom wait for one another:
    # dequantizing 4096 x 4096 into 4 MB panels takes 3.7 ms, into 8 MB 6.2.
    panel_bytes: int = 2**22


DEQUANT_GEMM_CPU = {
    "portable": DequantGemmCpu(integer_max_rows=0, integer_max_rows_8bit=0),
    "avx2": DequantGemmCpu(integer_max_rows=32, integer_max_rows_8bit=1),
    "avx2_vnni": DequantGemmCpu(integer_max_rows=sys.maxsize, integer_max_rows_8bit=64),
    "avx512": DequantGemmCpu(integer_max_rows=256, integer_max_rows_8bit=1),
    "avx512_vnni": DequantGemmCpu(integer_max_rows=sys.maxsize, integer_max_rows_8bit=sys.maxsize),
    # Not yet run on such a processor: compiled, its logic executed with emulated tiles. avx512_vnni's limits; bfloat16 goes to oneDNN's AMX
    # panels from bfloat16_panel_rows_amx rows on, as their sums stay in tiles along the whole of K. The integer product's leave them every
    # 64 values to be scaled, which takes longer than the product itself.
    "amx": DequantGemmCpu(integer_max_rows=sys.maxsize, integer_max_rows_8bit=sys.maxsize),
    "amx_emulated": DequantGemmCpu(integer_max_rows=sys.maxsize, integer_max_rows_8bit=sys.maxsize),
    # Not measured on such a processor: what avx2_vnni, whose instructions are the nearest, was found to want.
    "dotprod": DequantGemmCpu(integer_max_rows=sys.maxsize, integer_max_rows_8bit=64),
}


@dataclass(frozen=True)
class DequantGemvGpu:
    """How dequant_gemm's Triton kernel for up to 8 rows of x is launched. A program computes 16 columns of y."""

    # They share the chunks of K. More of them have more of the weight on its way at a time, and more sums to add up at the end.
    num_warps: int
    # Chunks of 32 values of K that a thread unpacks before it scales its sum, at most a group: more of them load a scale less often and have
    # more of the weight on its way, in more registers.
    chunks: int

    def __post_init__(self) -> None:
        for name, most in (("num_warps", 32), ("chunks", 8)):
            value = getattr(self, name)
            if value < 1 or value > most or value & (value - 1):
                raise ValueError(f"DequantGemvGpu: {name} must be a power of two of at most {most}, got {value}")


@dataclass(frozen=True)
class DequantGemmGpu:
    """How dequant_gemm's Triton GEMMs (forward, int8 and backward in x) are launched.

    A program computes block_m rows of x by block_n columns of y; backward in x, block_m rows of grad by block_k columns of the result, summed
    over N in steps of block_n.
    """

    block_m: int
    block_n: int
    # Values of K unpacked between two products, at most a group; the kernels take the largest power of two in both.
    block_k: int
    # Parts that the sum over K is cut into, each a program of its own; more than one where M and N alone are too few for the processor.
    split_k: int = 1
    num_warps: int = 4
    # Tiles in flight on the way from memory to the tensor cores.
    num_stages: int = 3
    # Blocks of M that run side by side over the same weights, so that both stay in the second-level cache.
    group_m: int = 8

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages", "group_m"):
            if getattr(self, name) < 1:
                raise ValueError(f"DequantGemmGpu: {name} must be at least 1, got {getattr(self, name)}")
        for name, least in (("block_m", 16), ("block_n", 16), ("block_k", 32)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"DequantGemmGpu: {name} must be a power of two of at least {least}, got {value}")


@dataclass(frozen=True)
class DequantGemmGpuLists:
    """What dequant_gemm may be launched with on one architecture: short lists for `tuning.tune`, of which the first fits unless it found another.

    Chosen by what the compilers say of each (registers, shared memory, instructions per weight) and by the number of programs it gives; not
    yet timed on a GPU.
    """

    multiprocessors: int
    # Up to so many rows the kernel without tensor cores runs, and up to twice as many tuning tries it. A product of theirs takes 16 rows as
    # long as one; without them each row costs instructions, of which a processor has as many to spare as its memory is slow.
    gemv_max_rows: int
    gemv: tuple[DequantGemvGpu, ...]
    # Up to 64 rows: bound by reading the weight, so that K is split until there are programs for all multiprocessors.
    few_rows: tuple[DequantGemmGpu, ...]
    many_rows: tuple[DequantGemmGpu, ...]
    int8: tuple[DequantGemmGpu, ...]
    backward: tuple[DequantGemmGpu, ...]
    # What comes before them for weights of so many bits, with groups or without; with those of others it would spill.
    many_rows_first: Mapping[tuple[int, bool], DequantGemmGpu]
    backward_first: Mapping[tuple[int, bool], DequantGemmGpu]

    def products(self, bits: int, groups: int) -> tuple[DequantGemmGpu, ...]:
        """Those for many rows of x and such a weight."""
        return self._with_first(self.many_rows_first, self.many_rows, bits, groups)

    def gradients(self, bits: int, groups: int) -> tuple[DequantGemmGpu, ...]:
        """Those for the backward in x and such a weight."""
        return self._with_first(self.backward_first, self.backward, bits, groups)

    @staticmethod
    def _with_first(
        first: Mapping[tuple[int, bool], DequantGemmGpu], configs: tuple[DequantGemmGpu, ...], bits: int, groups: int
    ) -> tuple[DequantGemmGpu, ...]:
        key = bits, groups > 1
        return (first[key], *configs) if key in first else configs


# 8 warps share the 128 chunks of K = 4096 in 16 chunks each, two at a time and thread: 3 to 4 programs on a multiprocessor have 48 to 64 KB of a
# 4-bit weight on their way, more than bandwidth times latency asks for (20 to 54 KB). Fewer warps for short K, more for a narrow N.
_GEMV = (
    DequantGemvGpu(num_warps=8, chunks=2),
    DequantGemvGpu(num_warps=4, chunks=2),
    DequantGemvGpu(num_warps=16, chunks=2),
    DequantGemvGpu(num_warps=4, chunks=4),
)
# 16 rows a tile wait for little but memory: a split K gives programs, deep pipelines keep memory busy. A warp of the wide tiles has 32 rows of W for
# what it reads of x, and takes a fifth to a third fewer instructions; narrow ones are for a narrow N.
_FEW_ROWS = tuple(
    DequantGemmGpu(block_m=block_m, block_n=block_n, block_k=64, split_k=split_k, num_warps=4, num_stages=4)
    for block_m in (16, 32, 64)
    for block_n, split_k in ((128, 8), (64, 8), (64, 4))
)

# Tensor cores stay busy while what a code costs, 2 to 4 instructions, is shared by many rows of x, and while a warp reads x from shared memory for 32
# rows of W rather than 16. 128 rows of x by 32 of W fill a thread's registers: 4 and 8 bits per channel have the room. 64 rows leave room for every kind.
_MANY_ROWS = (
    DequantGemmGpu(block_m=64, block_n=256, block_k=64, num_warps=8, num_stages=2),
    DequantGemmGpu(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=2),
)
_MANY_ROWS_CHANNELS = DequantGemmGpu(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=2)
# wgmma is twice as fast, and wants 256 rows of x.
_MANY_ROWS_WGMMA = (
    DequantGemmGpu(block_m=256, block_n=128, block_k=64, num_warps=8, num_stages=3),
    DequantGemmGpu(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4),
    DequantGemmGpu(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
)
_INT8 = (
    DequantGemmGpu(block_m=128, block_n=128, block_k=128, num_warps=8, num_stages=3),
    DequantGemmGpu(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),
)
_BACKWARD = (DequantGemmGpu(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3),)
# As above a warp has 32 rows of what it unpacks, here columns of W. Of 3 bits it takes 64 rows of W for every thread to copy 8 bytes of each plane
# without cutting words apart; with groups two stages of them spill.
_BACKWARD_WIDE = DequantGemmGpu(block_m=64, block_n=64, block_k=256, num_warps=8, num_stages=2)
_BACKWARD_3_BITS = replace(_BACKWARD_WIDE, block_n=128)
_BACKWARD_FIRST = {(bits, grouped): _BACKWARD_WIDE for bits in (2, 4, 8) for grouped in (False, True)} | {
    (3, False): _BACKWARD_3_BITS,
    (3, True): replace(_BACKWARD_3_BITS, num_stages=3),
}
# A100. Half the float32 units of the others: at 4 bits one row takes as long as memory does, 4 rows two and a half times as long, of which
# tensor cores need half to three quarters. H100's second launch would cost what they win.
_SM_80 = DequantGemmGpuLists(
    multiprocessors=108,
    gemv_max_rows=2,
    gemv=_GEMV,
    few_rows=_FEW_ROWS,
    many_rows=_MANY_ROWS,
    backward_first=_BACKWARD_FIRST,
    many_rows_first={(bits, False): _MANY_ROWS_CHANNELS for bits in (4, 8)},
    int8=_INT8,
    backward=_BACKWARD,
)
_BACKWARD_TWO_STAGES = tuple(replace(config, num_stages=2) for config in _BACKWARD)
# 100 KB of shared memory instead of A100's 164: two stages of bytes. Memory is slow beside arithmetic (A10 600 GB/s, L40S 864): all 8 rows.
_SM_86 = replace(
    _SM_80,
    multiprocessors=72,
    gemv_max_rows=8,
    # The wide tiles last: 16 rows of 4 bits in groups with zeros spill there.
    few_rows=tuple(sorted(_FEW_ROWS, key=lambda config: (config.block_m, config.block_n))),
    int8=tuple(replace(config, num_stages=2) for config in _INT8),
    # Its tensor cores are half as fast as A100's and wait for nothing with half the rows, which leave registers free.
    backward_first=_BACKWARD_FIRST | {(3, True): _BACKWARD_WIDE},
)
DEQUANT_GEMM_GPU = {
    "sm_80": _SM_80,
    "sm_86": _SM_86,
    "sm_89": replace(_SM_86, multiprocessors=142),
    # H100: wgmma wants 4 warps for each 64 rows of its first operand.
    "sm_90": replace(
        _SM_80,
        multiprocessors=132,
        gemv_max_rows=4,
        many_rows=_MANY_ROWS_WGMMA,
        many_rows_first={},
        backward=(DequantGemmGpu(block_m=256, block_n=64, block_k=128, num_warps=8, num_stages=3), *_BACKWARD),
        backward_first={},
    ),
    # B200: its memory is 2.4 times as fast as H100's, its float32 units are not. Two rows of sums spill. Products keep sums in a memory of their own: four
    # warps have the registers for a tile, of eight those of 3 bits in groups spill.
    "sm_100": replace(
        _SM_80,
        multiprocessors=148,
        gemv_max_rows=1,
        many_rows=(replace(_MANY_ROWS[0], num_warps=4), _MANY_ROWS[1]),
        backward=_BACKWARD_TWO_STAGES,
    ),
    # RTX 5090: sm_89's shared memory, mma.sync, twice the bandwidth. Its tensor cores are slow beside its other units: small tiles are enough for
    # them, and larger ones spill with 3 bits in groups.
    "sm_120": replace(
        _SM_86,
        multiprocessors=170,
        gemv_max_rows=4,
        many_rows=(replace(_MANY_ROWS[1], num_warps=8), replace(_MANY_ROWS[1], block_n=64)),
        many_rows_first={},
        int8=_SM_86.int8[1:],
        backward=(replace(_BACKWARD_TWO_STAGES[0], block_m=32),),
        backward_first={},
    ),
    # MI300X: a wavefront of 64 lanes does twice a warp's work: half as many of them, each with 64 rows or columns of W and 8 bytes of its words a lane.
    # Fewer words than threads would be loaded again by each wavefront. 64 KB of shared memory, which holds 8 wavefronts' tiles in two stages. Above 2
    # rows the sums of the kernel without tensor cores spill.
    "gfx942": replace(
        _SM_86,
        multiprocessors=304,
        gemv_max_rows=1,
        gemv=tuple(DequantGemvGpu(num_warps=warps, chunks=2) for warps in (4, 2, 8)),
        few_rows=tuple(
            DequantGemmGpu(block_m=block_m, block_n=128, block_k=64, split_k=split_k, num_warps=2, num_stages=2)
            for block_m, split_k in ((16, 16), (16, 8), (32, 8), (32, 4), (64, 8), (64, 4))
        ),
        many_rows=(DequantGemmGpu(block_m=64, block_n=128, block_k=64, num_warps=2, num_stages=2),),
        many_rows_first={(bits, grouped): _MANY_ROWS_CHANNELS for bits in (4, 8) for grouped in (False, True)},
        int8=(_SM_86.int8[0], replace(_SM_86.int8[1], num_warps=2)),
        backward=(DequantGemmGpu(block_m=32, block_n=64, block_k=128, num_warps=2, num_stages=2),),
        backward_first={},
    ),
}


def nearest_architecture(name: str, known: Iterable[str]) -> str:
    """Of the known architectures the same, or the newest that is not newer and of the same maker; the maker's oldest where all are newer."""
    names = list(known)
    if name in names:
        return name

    def number(architecture: str) -> int:
        return int(architecture.lstrip("smgfx_"), 16)

    same = sorted((other for other in names if other[:2] == name[:2]), key=number)
    return max((other for other in same if number(other) <= number(name)), key=number, default=same[0])


@dataclass(frozen=True)
class HessianUpdateCpu:
    """CPU body of hessian_update that goes through torch's matrix products."""

    # A strip computes its whole last square, half of it in vain: 1/8 more than the triangle at K = 4096, with products still wide.
    strip_rows: int = 512


HESSIAN_UPDATE_CPU = HessianUpdateCpu()


@dataclass(frozen=True)
class ChannelLossGpu:
    """Tiles of channel_loss's Triton kernels. One set for every GPU: they move memory and do little else. Not yet timed on one."""

    # A tile of x is read once and kept in registers while its mean and then its squares are summed: 64 values a thread, and still three or
    # four programs per multiprocessor, so that one loads while another sums. With 128 tokens and 8 warps there was room for one.
    block_tokens: int = 64
    block_channels: int = 128
    num_warps: int = 4
    # Tokens are cut into so many strips at most: enough programs for every multiprocessor when there are a few blocks of channels. A strip
    # writes 12 bytes per channel, at 16384 tokens 1 % (float32) or 2 % (16 bits) of what x takes.
    max_strips: int = 64
    # Strips are merged per channel: narrow, so that many multiprocessors take part.
    merge_strips: int = 32
    merge_channels: int = 32
    merge_warps: int = 4
    # Wide enough that a thread's share of the channels' statistics is a load of 8 bytes.
    grad_tokens: int = 32
    grad_channels: int = 256
    grad_warps: int = 4
    # The same on AMD's GPUs, whose warps have 64 lanes.
    grad_wavefronts: int = 2


CHANNEL_LOSS_GPU = ChannelLossGpu()


@dataclass(frozen=True)
class GptqBlockUpdateGpu:
    """One launch of gptq_block_update's Triton kernel: a column's latency counts, not a unit's speed. Not yet timed on a GPU."""

    # A row's 128 columns are four neighbours in each of 32 lanes: as many again for each column's scale, zero and diagonal, eight for two rows of U.
    max_columns: int = 128
    # A row per warp: the shortest way from one column to the next, and rows enough for every multiprocessor from N = 1100 on.
    block_rows: int = 8
    num_warps: int = 8


# Half of a wavefront's 64 lanes have a row each.
GPTQ_BLOCK_UPDATE_GPU = {"sm_80": GptqBlockUpdateGpu(), "gfx942": GptqBlockUpdateGpu(num_warps=4)}


@dataclass(frozen=True)
class HessianUpdateGpu:
    """Tiles of hessian_update's Triton kernel: a square of channels, summed over a few tokens at a time. Not yet timed on a GPU."""

    block_channels: int
    block_tokens: int
    # The three parts of float32 values are held in registers, which spill with 32 tokens.
    block_tokens_float32: int
    num_warps: int
    num_stages: int


# 64 sums a thread, as many registers again for the Hessian's tile at the end: with 4 warps they spill. Three stages are 96 KB on sm_90, the 64 KB
# that gfx942 has, and 64 KB on sm_80.
_HESSIAN_WIDE = HessianUpdateGpu(block_channels=128, block_tokens=64, block_tokens_float32=16, num_warps=8, num_stages=3)
# Fewer channels than 2048 make fewer of those tiles than there are multiprocessors.
_HESSIAN_NARROW = HessianUpdateGpu(block_channels=64, block_tokens=32, block_tokens_float32=16, num_warps=4, num_stages=4)


def hessian_update_gpu(channels: int) -> HessianUpdateGpu:
    """The tiles for a Hessian of so many channels."""
    return _HESSIAN_WIDE if channels >= 2048 else _HESSIAN_NARROW
