"""The activations that enter each block, and how the model calls its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .config import require

CPU = torch.device("cpu")


class BlockCalls:
    """The arguments (masks, positions, rotary embeddings) that a model gives each block beside the hidden states, for each batch size.

    Found by running the model's own forward with every block replaced by one that hands its input on: nothing is computed but the embeddings and
    the arguments, and whatever the family does between blocks is done by the family's own code.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self._model, self._blocks = model, blocks
        self._as_tuple = False
        self._calls: dict[int, list[Call]] = {}
        self._placed: dict[tuple[int, torch.device], list[Call]] = {}

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> what the first block is given, float32 [B, L, H]; notes the arguments for batches of B.

        Raises ValueError when the model doesn't call each block once, or gives a block arguments that depend on the tokens.
        """
        # A model takes a block's output as it is, or as the first of a tuple. Taking the first of a tensor, it loses the batch dimension.
        try:
            hidden, calls = self._record(tokens)
        except _TupleWanted:
            self._as_tuple = True
            hidden, calls = self._record(tokens)
        if len(calls) != len(self._blocks):
            raise ValueError(f"activations: the model must call each of its {len(self._blocks)} blocks once, got {len(calls)} calls")
        known = self._calls.setdefault(len(tokens), calls)
        if not _equal(known, calls):
            raise ValueError("activations: a block's arguments must not depend on the tokens, got some that do")
        return hidden.float()

    def _record(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        first: list[Tensor] = []
        calls: list[Call] = []

        def stand_in(hidden: Tensor, *args: Any, **named: Any) -> Any:
            if first and hidden.dim() < first[0].dim() and not self._as_tuple:
                raise _TupleWanted
            first.append(hidden)
            calls.append((args, named))
            if len(calls) == len(self._blocks):
                raise _Enough  # what follows, final norm and output head, isn't needed and may not be loaded
            return (hidden,) if self._as_tuple else hidden

        with suppress(_Enough):
            self._run(tokens, stand_in)
        if not first:
            raise ValueError(f"activations: the model must call each of its {len(self._blocks)} blocks once, got 0 calls")
        return first[0], calls

    @torch.no_grad()
    def leave(self, tokens: Tensor, hidden: Tensor, head: nn.Module) -> None:
        """Send what the last block gave for tokens [B, L], hidden [B, L, H], as far as `head`, whose forward hooks see it; `embed` came before.

        What the family does behind its blocks, a norm or more, is done by the family's own code. No logits are computed.
        """

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Enough

        handle = head.register_forward_pre_hook(stop)
        try:
            with suppress(_Enough):
                self._run(tokens, lambda *args, **named: (hidden,) if self._as_tuple else hidden)
        finally:
            handle.remove()

    def logits(self, tokens: Tensor, hidden: Tensor, values: dict[str, Tensor]) -> Tensor:
        """What the model makes [B, L, V] of what the last block gave for tokens [B, L], hidden [B, L, H]; `embed` came before.

        values: parameters by name that stand for the model's own.
        """
        return self._run(tokens, lambda *args, **named: (hidden,) if self._as_tuple else hidden, values).logits

    def _run(self, tokens: Tensor, stand_in: Callable[..., Any], values: dict[str, Tensor] | None = None) -> Any:
        for block in self._blocks:
            block.forward = stand_in
        try:
            return torch.func.functional_call(self._model, values or {}, kwargs={"input_ids": tokens, "use_cache": False})
        finally:
            for block in self._blocks:
                del block.forward

    def of(self, index: int, batch: int, device: torch.device) -> Call:
        """The arguments of block `index` for a batch of `batch` sequences, seen by `embed` before, on a device."""
        key = batch, device
        if key not in self._placed:
            # blocks share most of their tensors, which are moved once
            moved: dict[int, Tensor] = {}
            self._placed[key] = [_placed(call, device, moved) for call in self._calls[batch]]
        return self._placed[key][index]


# Positional arguments after the hidden states, and named ones.
Call = tuple[tuple[Any, ...], dict[str, Any]]


def _placed(value: Any, device: torch.device, moved: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return moved.setdefault(id(value), value.to(device))
    if isinstance(value, list | tuple):
        return type(value)(_placed(item, device, moved) for item in value)
    return {key: _placed(item, device, moved) for key, item in value.items()} if isinstance(value, dict) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return type(a) is type(b)


class _Enough(Exception):
    """What was wanted of a run is known."""


class _TupleWanted(Exception):
    """The model takes the first of what a block gives."""


class Stream:
    """The hidden states of all sequences at one depth, float32 [S, L, H], and how to send them through a block.

    They stay where they are, in the host's memory; what a block is given and gives lies on `device`, where the blocks are.
    """

    def __init__(self, hidden: Tensor, calls: BlockCalls, batch_size: int, compute_dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.hidden, self._calls = hidden, calls
        self.batch_size, self.compute_dtype, self.device = batch_size, compute_dtype, device

    def starts(self) -> Iterator[slice]:
        """The sequences of each batch."""
        for start in range(0, len(self.hidden), self.batch_size):
            yield slice(start, min(start + self.batch_size, len(self.hidden)))

    def call(self, block: Callable[..., Any], index: int, rows: slice | Tensor) -> Tensor:
        """Output [B, L, H] float32 of a block for some of the sequences, on the block's device; differentiable in the block's parameters."""
        return self.send(block, index, self.hidden[rows])

    def send(self, block: Callable[..., Any], index: int, hidden: Tensor) -> Tensor:
        """Output [B, L, H] float32 of a block for hidden states [B, L, H], on the block's device."""
        hidden = hidden.to(self.device)
        with computing(self.device.type, self.compute_dtype):
            args, named = self._calls.of(index, len(hidden), self.device)
            output = block(hidden, *args, **named)
        return (output[0] if isinstance(output, tuple | list) else output).float()

    @torch.no_grad()
    def through(self, block: nn.Module, index: int) -> Tensor:
        """Output [S, L, H] of a block for every sequence."""
        return torch.cat([self.call(block, index, rows).to(self.hidden.device) for rows in self.starts()])

    def first(self, sequences: int) -> Stream:
        """Of the first sequences alone."""
        return self.moved(self.hidden[:sequences])

    def moved(self, hidden: Tensor) -> Stream:
        """The stream one block further."""
        return Stream(hidden, self._calls, self.batch_size, self.compute_dtype, self.device)


class Passes:
    """Calls that send the calibration text through a block that is being quantized, while whoever quantizes it watches.

    A pass is through the block as it stands. The first of each stream is to be through its float weights, or what scales that moved left of them, which is the same function: its
    output is kept.
    """

    def __init__(self, block: nn.Module, index: int, stream: Stream | None, float_stream: Stream | None) -> None:
        self.block, self.index = block, index
        self._streams = {"quantized": stream, "float": float_stream}
        self._outputs: dict[str, Tensor] = {}

    @property
    def has_float(self) -> bool:
        """Whether the float model's own activations are kept."""
        return self._streams["float"] is not None

    @property
    def batches(self) -> int:
        """How many batches a pass has."""
        return len(list(self.stream("quantized").starts()))

    def __call__(self, sequences: int | None = None) -> Tensor:
        """Send what the quantized blocks before gave, of the first `sequences` sequences or all; the output [S, L, H]."""
        if sequences is not None:
            return self.stream("quantized").first(sequences).through(self.block, self.index)
        return self._send("quantized")

    def of_float(self) -> Tensor:
        """Send the float model's own activations; the output [S, L, H]."""
        return self._send("float")

    @torch.no_grad()
    def until(self, modules: Collection[nn.Module]) -> None:
        """Send what the quantized blocks before gave, each batch no further than to where the last of some of the block's modules is called, once each."""
        stream, waiting = self.stream("quantized"), set[int]()

        def called(module: nn.Module, args: tuple[Any, ...]) -> None:
            waiting.discard(id(module))
            if not waiting:
                raise _Enough

        # Hooks run in the order of their registration: who watches the modules has seen the last one's input by then.
        handles = [module.register_forward_pre_hook(called) for module in modules]
        try:
            for rows in stream.starts():
                waiting.update(map(id, modules))
                with suppress(_Enough):
                    stream.call(self.block, self.index, rows)
        finally:
            for handle in handles:
                handle.remove()

    def output(self, name: str) -> Tensor:
        """What the float block makes [S, L, H] of the stream "quantized" or "float"."""
        return self._outputs[name] if name in self._outputs else self._send(name)

    def stream(self, name: str) -> Stream:
        """The stream "quantized" or "float". Raises ValueError where it isn't kept."""
        stream = self._streams[name]
        if stream is None:
            raise ValueError("quantize: this method must be given calibration text, got none")
        return stream

    def _send(self, name: str) -> Tensor:
        output = self.stream(name).through(self.block, self.index)
        self._outputs.setdefault(name, output)
        return output


@contextmanager
def computing(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Matrix products in `dtype` (autocast), norms and sums in float32."""
    with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
        yield


def device_of(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" stands for here: auto is a GPU where there is one. Raises ValueError for one that isn't there."""
    known = name in ("auto", "cpu", "cuda") or (name.startswith("cuda:") and name[5:].isdigit())
    require(known, "device", "name", "auto, cpu, cuda or cuda:N", name)
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", 0) if count else CPU
    device = torch.device(name)
    require(device.type == "cpu" or (device.index or 0) < count, "device", "name", f"one of this machine's {count} GPUs, or cpu", name)
    return device


def compute_dtype(name: str, device: torch.device = CPU) -> torch.dtype:
    """The dtype that "auto", "float32" or "bfloat16" stands for on a device: auto is bfloat16 where that is multiplied natively."""
    require(name in ("auto", "float32", "bfloat16"), "compute_dtype", "name", "auto, float32 or bfloat16", name)
    if name == "auto":
        native = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def embed_all(calls: BlockCalls, tokens: Tensor, batch_size: int, also: Iterable[int] = ()) -> Tensor:
    """The first block's input for token ids [S, L], taken in batches; the blocks' arguments are noted for batches of `also` sequences too."""
    for size in also:
        if size <= len(tokens):
            calls.embed(tokens[:size])
    return torch.cat([calls.embed(batch) for batch in tokens.split(batch_size)])


def split_rows(count: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Which sequences norms are trained on, and which their loss is measured on: the last ones, or all when none is held out."""
    rows = torch.arange(count)
    kept_back = min(max(1, round(count * held_out)), count - 1) if held_out > 0 else 0
    return (rows[:-kept_back], rows[-kept_back:]) if kept_back else (rows, rows)
