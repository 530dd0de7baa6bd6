"""The activations that enter each block, and how the model calls its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class BlockCalls:
    """The keyword arguments (masks, positions, rotary embeddings) that a model gives each block, for one batch shape.

    Found by running the model's own forward with every block replaced by one that hands its input on: nothing is computed but the embeddings and
    the arguments, and whatever the family does between blocks is done by the family's own code.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self._model, self._blocks = model, blocks
        self._kwargs: dict[int, list[dict[str, Any]]] = {}

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> what the first block is given, float32 [B, L, H]; notes the arguments for batches of B.

        Raises ValueError when the model doesn't call each block once.
        """
        # A model takes a block's output as it is, or as the first of a tuple. Taking the first of a tensor, it loses the batch dimension.
        try:
            inputs, kwargs = self._record(tokens, as_tuple=False)
        except _TupleWanted:
            inputs, kwargs = self._record(tokens, as_tuple=True)
        if len(inputs) != len(self._blocks):
            raise ValueError(f"activations: the model must call each of its {len(self._blocks)} blocks once, got {len(inputs)} calls")
        self._kwargs[len(tokens)] = kwargs
        return inputs[0].float()

    def _record(self, tokens: Tensor, as_tuple: bool) -> tuple[list[Tensor], list[dict[str, Any]]]:
        inputs: list[Tensor] = []
        kwargs: list[dict[str, Any]] = []

        def stand_in(hidden: Tensor, *args: Any, **named: Any) -> Any:
            if args:
                raise ValueError(f"activations: blocks must be given keyword arguments after the first, got {len(args)} positional ones")
            if inputs and hidden.dim() < inputs[0].dim() and not as_tuple:
                raise _TupleWanted
            inputs.append(hidden)
            kwargs.append(named)
            return (hidden,) if as_tuple else hidden

        for block in self._blocks:
            block.forward = stand_in
        try:
            self._model(input_ids=tokens, use_cache=False)
        finally:
            for block in self._blocks:
                del block.forward
        return inputs, kwargs

    def of(self, index: int, batch: int) -> dict[str, Any]:
        """The arguments of block `index` for a batch of `batch` sequences, seen by `embed` before."""
        return self._kwargs[batch][index]


class _TupleWanted(Exception):
    """The model takes the first of what a block gives."""


class Stream:
    """The hidden states of all sequences at one depth, float32 [S, L, H], and how to send them through a block."""

    def __init__(self, hidden: Tensor, calls: BlockCalls, batch_size: int, compute_dtype: torch.dtype) -> None:
        self.hidden, self._calls = hidden, calls
        self.batch_size, self.compute_dtype = batch_size, compute_dtype

    def starts(self) -> Iterator[slice]:
        """The sequences of each batch."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.hidden)))

    def call(self, block: Callable[..., Any], index: int, rows: slice | Tensor) -> Tensor:
        """Output [B, L, H] float32 of a block for some of the sequences; differentiable in the block's parameters."""
        hidden = self.hidden[rows]
        with computing(hidden.device.type, self.compute_dtype):
            output = block(hidden, **self._calls.of(index, len(hidden)))
        return (output[0] if isinstance(output, tuple) else output).float()

    @torch.no_grad()
    def through(self, block: nn.Module, index: int) -> Tensor:
        """Output [S, L, H] of a block for every sequence."""
        return torch.cat([self.call(block, index, rows) for rows in self.starts()])

    def moved(self, hidden: Tensor) -> Stream:
        """The stream one block further."""
        return Stream(hidden, self._calls, self.batch_size, self.compute_dtype)


@contextmanager
def computing(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype` (autocast), norms and sums in float32."""
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        yield


def compute_dtype(name: str) -> torch.dtype:
    """The dtype that "auto", "float32" or "bfloat16" stands for here: auto is bfloat16 where the processor multiplies it natively."""
    if name == "auto":
        native = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def embed_all(calls: BlockCalls, tokens: Tensor, batch_sizes: tuple[int, ...]) -> Tensor:
    """The first block's input for token ids [S, L], with the arguments noted for every batch size that a run will use."""
    samples = len(tokens)
    sizes = {size for batch in batch_sizes for size in (min(batch, samples), samples % min(batch, samples)) if size}
    for size in sizes:
        calls.embed(tokens[:size])
    step = min(batch_sizes[0], samples)
    return torch.cat([calls.embed(tokens[start : start + step]) for start in range(0, samples, step)])
