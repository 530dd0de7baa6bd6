"""A tensor-parallel rank's part of packed linears, cut from a GPTQ checkpoint's tensors, and the parts of a merged linear (qkv, gate and up) put together.

A shard's first column may lie inside a group, and inside a packed word: 576 columns in groups of 64, halved, cut the fifth group. The shard's codes are then
packed anew, and its groups become smaller ones of equal size, each with the scale of the group that it was cut from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from normtweak_kernels import packing, repack_gptq
from normtweak_kernels.packing import BITS

from .config import require
from .linear import PackedLinear

# What `Shard.empty` holds and `Shard.fill` takes, by GPTQ's names.
STORED = ("qweight", "scales", "qzeros")


@dataclass(frozen=True)
class Shard:
    """Columns [start, stop) of a linear with k columns, packed at `bits` in groups of `group_size` (-1: one per row).

    Raises ValueError for other bits, groups that don't divide k, columns that aren't there.
    """

    bits: int
    group_size: int
    k: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        require(self.bits in BITS, "shard", "bits", "one of 2, 3, 4, 8", self.bits)
        whole = self.group_size == -1 or (self.group_size > 0 and self.k % self.group_size == 0)
        require(whole, "shard", "group_size", f"-1 or a divisor of the {self.k} columns", self.group_size)
        require(0 <= self.start < self.stop <= self.k, "shard", "columns", f"in 0 to {self.k}", f"{self.start} to {self.stop}")

    @property
    def columns(self) -> int:
        """How many columns the shard has."""
        return self.stop - self.start

    @property
    def local_group(self) -> int:
        """Columns that share a scale in the shard: the largest size that divides it and lies in one of the linear's groups each time."""
        group = self.k if self.group_size == -1 else self.group_size
        if self.start // group == (self.stop - 1) // group:
            return self.columns
        return gcd(group, self.start, self.stop)

    def empty(self, rows: int) -> dict[str, Tensor]:
        """Zeroed tensors for so many rows: qweight int32 [ceil(columns * bits / 32), rows] in GPTQ's layout, scales float16 and qzeros int32, unpacked,
        [groups, rows]."""
        groups = self.columns // self.local_group
        return {
            "qweight": torch.zeros(-(-self.columns * self.bits // 32), rows, dtype=torch.int32),
            "scales": torch.zeros(groups, rows, dtype=torch.float16),
            "qzeros": torch.zeros(groups, rows, dtype=torch.int32),  # the checkpoint's dtype, which engines compare
        }

    def cut(self, name: str, stored: Tensor, rows: int, first: int, last: int, *, v2: bool = False) -> Tensor:
        """Rows [first, last) of this shard of one of a GPTQ linear's tensors (`name` is one of STORED), as `empty` lays them out.

        rows: how many the linear has. v2: qzeros hold the zero itself, not zero - 1. Raises ValueError for a tensor that isn't such a linear's.
        """
        require(0 <= first <= last <= rows, "shard", "rows", f"in 0 to {rows}", f"{first} to {last}")
        if name == "qweight":
            shape = -(-self.k * self.bits // 32), rows
            require(tuple(stored.shape) == shape, "shard", name, f"{shape} at {self.bits} bits", tuple(stored.shape))
            return self._words(stored[:, first:last])
        groups = 1 if self.group_size == -1 else self.k // self.group_size
        per_group = packing.unpack_gptq_zeros(stored, self.bits, rows, v2=v2) if name == "qzeros" else stored.half()
        require(tuple(per_group.shape) == (groups, rows), "shard", name, f"of {groups} groups and {rows} rows", tuple(per_group.shape))
        begins = torch.arange(self.start, self.stop, self.local_group, device=per_group.device)
        return per_group[begins // (self.k // groups), first:last]

    def _words(self, words: Tensor) -> Tensor:
        chunk = packing.CHUNK
        if self.start % chunk == 0 and (self.stop % chunk == 0 or self.stop == self.k):
            return words[self.start * self.bits // 32 : -(-self.stop * self.bits // 32)]
        codes = packing.unpack_gptq(words, self.bits, self.k)[:, self.start : self.stop]
        return packing.pack_gptq(codes, self.bits)

    def pack(self, tensors: Mapping[str, Tensor]) -> PackedLinear:
        """The linear of tensors in the layout of `empty`, whose zeros are left out when all are the symmetric one."""
        zeros = tensors["qzeros"].to(torch.uint8)
        symmetric = bool((zeros == 2 ** (self.bits - 1)).all())
        # on the CPU, where a C++ body does it without a second copy in wide integers
        qweight = repack_gptq(tensors["qweight"].cpu(), self.bits, self.columns).to(zeros.device)
        return PackedLinear(qweight, tensors["scales"], None if symmetric else zeros, bits=self.bits, in_features=self.columns)


def first_row(rows: int, local: int, rank: int, world: int) -> int:
    """Where a rank's `local` rows begin among the `rows` of a linear: all ranks hold parts of their own, or several the same (few key-value heads).

    Raises ValueError when the rows can't be split so.
    """
    parts = rows // local if local else 0
    fits = parts > 0 and rows % local == 0 and world % parts == 0
    require(fits, "shard", "rows", f"in parts of {local} for {world} ranks", rows)
    return rank * parts // world * local


def check_order(name: str, g_idx: Tensor, group_size: int) -> None:
    """Raise ValueError, naming the linear, unless column k is in group k // group_size."""
    k = g_idx.numel()
    plain = torch.arange(k, device=g_idx.device) // (k if group_size == -1 else group_size)
    found = torch.equal(g_idx.to(plain.dtype), plain)
    require(found, name, "g_idx", "k // group_size (act-order without static groups is not supported)", "another order")
