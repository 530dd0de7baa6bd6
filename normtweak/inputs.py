"""What a block's linears are given, gathered by hooks while the calibration text is sent through the block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from normtweak_kernels import hessian_update, mirror_lower

from .linear import RoutedLinear


def enough(in_features: int) -> int:
    """How many tokens make an expert's Hessian worth more than none."""
    return max(1, in_features // 32)


def multiplied(x: Tensor) -> Tensor:
    """An input [..., K] of a linear as [T, K], in the dtype that it is multiplied in."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return x.detach().flatten(0, -2).to(torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)


@dataclass(frozen=True)
class Inputs:
    """What is known of the input of some linears.

    tokens: T, how many were seen. hessian: X^T X / T, float32 [K, K], or None for experts that too few tokens reached.
    drift: (F - X)^T X / T, F the float model's inputs for the same tokens, or None when they weren't kept.
    """

    names: list[str]
    tokens: int
    hessian: Tensor | None
    drift: Tensor | None


class InputCollector:
    """Shows `_add` every input of some linears, once where several are handed the same tensor."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self._linears = linears
        self._leader: dict[str, str] = {}  # linear -> the first linear that is given the same tensor
        self._seen: list[tuple[Tensor, str]] = []
        self._tokens: dict[str, int] = {}

    @contextmanager
    def attached(self) -> Iterator[Self]:
        """While open, forward calls of the linears are observed."""
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self._linears.items()]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def tokens(self, name: str) -> int:
        """How many tokens reached a linear."""
        return self._tokens.get(self._leader.get(name, name), 0)

    def groups(self) -> dict[str, list[str]]:
        """Linears with one input, by the first of them. Raises ValueError for a linear, other than an expert's, that no token reached."""
        groups: dict[str, list[str]] = {}
        for name, linear in self._linears.items():
            if not self.tokens(name) and not isinstance(linear, RoutedLinear):
                raise ValueError(f"quantize: every linear must see calibration tokens, got none for {name}")
            groups.setdefault(self._leader.get(name, name), []).append(name)
        return groups

    def _hook(self, name: str):
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in self._leader:
                self._leader[name] = next((leader for tensor, leader in self._seen if tensor is x), name)
                self._seen.append((x, self._leader[name]))
            if self._leader[name] == name:
                x = x.detach().flatten(0, -2)
                self._tokens[name] = self._tokens.get(name, 0) + x.shape[0]
                self._add(name, x)

        return observe

    def _add(self, name: str, x: Tensor) -> None:
        raise NotImplementedError


class HessianCollector(InputCollector):
    """Accumulates H = X^T X / T of each linear's input over all calls, and its drift from the float model's inputs where those are given."""

    def __init__(self, linears: Mapping[str, nn.Linear], float_inputs: Mapping[str, list[Tensor]] | None = None) -> None:
        super().__init__(linears)
        self._float_inputs = float_inputs or {}
        self._sums: dict[str, Tensor] = {}
        self._drifts: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()

    def shared(self) -> Iterator[Inputs]:
        """The inputs, each with the linears that it is handed to, one at a time; raises ValueError for a linear, no expert's, that no token reached."""
        for leader, names in self.groups().items():
            total, tokens, linear = self._sums.pop(leader, None), self.tokens(leader), self._linears[leader]
            if total is None or (isinstance(linear, RoutedLinear) and tokens < enough(linear.in_features)):
                yield Inputs(names, 0, None, None)
                continue
            drift = self._drifts.pop(leader, None)
            yield Inputs(names, tokens, mirror_lower(total.div_(tokens)), None if drift is None else drift.div_(tokens))

    def _add(self, name: str, x: Tensor) -> None:
        k = x.shape[1]
        if name not in self._sums:
            self._sums[name] = torch.zeros(k, k, dtype=torch.float32, device=x.device)
        hessian_update(self._sums[name], x)
        if name in self._float_inputs:
            own, exact = multiplied(x), self._float_inputs[name][self._calls[name]].to(x.device)
            self._calls[name] += 1
            drift = self._drifts.setdefault(name, torch.zeros_like(self._sums[name]))
            drift += (exact.float() - own.float()).to(own.dtype).t() @ own


class RangeCollector(InputCollector):
    """Each input channel's largest magnitude and mean square over all calls, float32 [K] by linear; an expert that no token reached has none."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__(linears)
        self._largest: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def largest(self) -> dict[str, Tensor]:
        """max over tokens of |x_k|."""
        return {name: self._largest[leader] for leader, names in self.groups().items() if leader in self._largest for name in names}

    def mean_square(self) -> dict[str, Tensor]:
        """Mean over tokens of x_k^2."""
        found = self._squares
        return {name: found[leader] / self.tokens(leader) for leader, names in self.groups().items() if leader in found for name in names}

    def _add(self, name: str, x: Tensor) -> None:
        if len(x) == 0:
            return
        x = x.float()
        largest, squares = x.abs().amax(0), x.square().sum(0)
        self._largest[name] = torch.maximum(self._largest[name], largest) if name in self._largest else largest
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares
