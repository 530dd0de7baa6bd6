"""How one linear's codes are stored; and sets of module paths as regular expressions, which checkpoints name them by."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from normtweak_kernels import packing

from ..config import require
from ..linear import PackedLinear


@dataclass(frozen=True)
class Scheme:
    """bits; group_size: inputs that share a scale, -1 for all of a row's; symmetric: every zero is 2**(bits-1)."""

    bits: int
    group_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        require(type(self.bits) is int and self.bits in packing.BITS, "load", "bits", "one of 2, 3, 4, 8", self.bits)
        require(type(self.group_size) is int and (self.group_size == -1 or self.group_size >= 1), "load", "group_size", "-1 or more", self.group_size)

    def __str__(self) -> str:
        groups = "per channel" if self.group_size == -1 else f"in groups of {self.group_size}"
        return f"{self.bits} bits {groups}, {'symmetric' if self.symmetric else 'asymmetric'}"

    @classmethod
    def of(cls, linear: PackedLinear) -> Scheme:
        """That of a packed linear."""
        per_channel = linear.group_size == linear.in_features
        return cls(linear.bits, -1 if per_channel else linear.group_size, linear.zeros is None)

    def groups(self, k: int) -> int:
        """Scales of each row of k inputs; a last group may be short."""
        return 1 if self.group_size == -1 else -(-k // self.group_size)


def packed_scheme(path: str, scheme: Scheme | None) -> Scheme:
    """What the configuration says of a linear that has codes. Raises ValueError, naming it, where it says that it has none."""
    require(scheme is not None, "load", path, "packed only where the configuration doesn't leave it out", "packed weights")
    assert scheme is not None
    return scheme


def commonest(schemes: Mapping[str, Scheme]) -> list[Scheme]:
    """The different schemes of some linears, the most frequent first."""
    return [scheme for scheme, _ in Counter(schemes.values()).most_common()]


def patterns(chosen: Collection[str], others: Collection[str]) -> Iterator[str]:
    """Regular expressions for `re.match` that match each path of `chosen` and none of `others`.

    One with `\\d+` for numbers stands for a linear of all blocks where they are all chosen; other paths stand for themselves.
    """
    taken = {_numberless(path) for path in others}
    done = set()
    for path in chosen:
        pattern = _numberless(path)
        pattern = re.escape(path) if pattern in taken else pattern
        if pattern not in done:
            done.add(pattern)
            yield pattern + "$"


def _numberless(path: str) -> str:
    return r"\d+".join(map(re.escape, re.split(r"\d+", path)))
