"""Algorithm 1 of Norm Tweaking (arXiv 2309.02784), line beside line.

    1  generate calibration text with the model itself                  -> calibration/
    2  for each block l:
    3-7   take the calibration text's embeddings (l = 0) or the last quantized output as input
    8     compute the float output
    9     quantize the block's linears
    10    freeze them
    11-16 for it in iterations: compute the quantized output, the loss (eq. 2), step the norm parameters
    17  the tweaked quantized output is the next block's input

Only one block's weights are in memory: `open_block` reads them when its turn comes, `close_block` writes them and lets them go.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import losses, norms, quantizers
from .activations import Stream, split_rows
from .config import QuantizeConfig, TweakConfig
from .linear import PackedLinear, quantizable_linears, replace
from .progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block. loss_before, loss_after: the tweak's loss on held-out calibration text (None without a tweak)."""

    index: int
    seconds: float
    loss_before: float | None
    loss_after: float | None

    def __str__(self) -> str:
        if self.loss_before is None or self.loss_after is None:
            return f"block {self.index}: quantized in {self.seconds:.1f} s"
        return f"block {self.index}: loss {self.loss_before:.4g} -> {self.loss_after:.4g} in {self.seconds:.1f} s"


def quantize_blocks(
    path: str,
    count: int,
    open_block: Callable[[int], nn.Module],
    close_block: Callable[[int, nn.Module], None],
    stream: Stream | None,
    config: QuantizeConfig,
    progress: Progress,
) -> tuple[list[BlockReport], Stream | None, Stream | None]:
    """Quantize and tweak `count` blocks in order; gives what happened to each, and behind the last one the stream and the float model's own
    (None when neither tweak nor polish looks at it).

    path: of the blocks in the model. open_block(l): block l with its float weights. close_block(l, block): called when block l is final, its linears packed.
    stream: what the first block is given (None when the configuration looks at no text).
    Raises ValueError, naming it, for a block without linears or norms.
    """
    quantizer = quantizers.find(config.method)
    tweak = config.tweak
    # The float model's own activations, kept beside the quantized ones when they are the target.
    float_stream = stream if config.polish or (tweak and tweak.target_stream == "float") else None
    reports = []
    with progress.task("quantizing", count) as advance:
        for index in range(count):
            began = time.perf_counter()
            block = open_block(index)
            place = f"{path}.{index}."
            linears = {place + name: linear for name, linear in quantizable_linears(block).items()}
            if not linears:
                raise ValueError(f"quantize: block {index} must hold nn.Linear modules, got {type(block).__name__} without one")

            # 8: the float output, of the float stream or (Algorithm 1) of the quantized one
            target: Tensor | None = None
            if float_stream is not None:
                target = float_stream.through(block, index)
                float_stream = float_stream.moved(target)

            # 9: quantize; the quantizer's look at the activations is a pass of the quantized stream through the float block
            seen: list[Tensor] = []
            with torch.no_grad():
                weights = quantizer.quantize_block(linears, pass_through(block, index, stream, seen), config)
            if tweak and stream and tweak.target_stream == "quantized":
                target = seen[0] if seen else stream.through(block, index)

            # 10: freeze
            for name, weight in weights.items():
                replace(block, name.removeprefix(place), PackedLinear.from_weight(weight, linears[name].bias))
            block.requires_grad_(False)

            # 11-16: tweak; 17: the tweaked quantized output goes on
            before = after = None
            if stream is not None:
                if tweak and target is not None:
                    before, after = tweak_block(block, index, count, stream, target, tweak, config.seed)
                stream = stream.moved(stream.through(block, index))
            close_block(index, block)
            reports.append(BlockReport(index, time.perf_counter() - began, before, after))
            advance(str(reports[-1]))
    return reports, stream, float_stream


def pass_through(block: nn.Module, index: int, stream: Stream | None, seen: list[Tensor]) -> Callable[[], None]:
    """A call that sends the stream through the block and keeps the output in `seen`."""

    def run() -> None:
        if stream is None:
            raise ValueError("quantize: this method must be given calibration text, got none")
        seen.append(stream.through(block, index))

    return run


def tweak_block(block: nn.Module, index: int, count: int, stream: Stream, target: Tensor, config: TweakConfig, seed: int) -> tuple[float, float]:
    """Lines 11-16: Adam on the norm parameters of a frozen block, which are replaced by what it found.

    target: float output [S, L, H]. The masters are float32. Returns the loss on the held-out sequences (all, when none is held out) before and after.
    Raises ValueError when the loss isn't finite.
    """
    parameters = norms.norm_parameters(block, relative=config.step == "relative")
    loss_of = losses.find(config.loss)
    rate = config.learning_rate * (1 + config.depth_scale * index / count)  # eq. 3
    adam = torch.optim.Adam([p.master for p in parameters], lr=rate)
    order = torch.Generator().manual_seed(seed + index)
    trained, held_out = split_rows(len(target), config.held_out)
    before = mean_loss(block, index, stream, target, config, held_out)
    steps = config.iterations * -(-len(trained) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0 if config.schedule == "constant" else 1.0 - step / steps)
    for _ in range(config.iterations):
        for rows in trained[torch.randperm(len(trained), generator=order)].split(config.batch_size):
            output = stream.call(with_parameters(block, {p.name: p.value() for p in parameters}), index, rows)
            wanted = target[rows].to(output.device)
            loss = loss_of(output, wanted, token_mask(wanted, config))
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    start = {p.name: block.get_parameter(p.name).clone() for p in parameters}
    norms.assign(block, {p.name: p.value() for p in parameters})
    after = mean_loss(block, index, stream, target, config, held_out)
    if not math.isfinite(after):
        raise ValueError(f"tweak: the loss of block {index} must stay finite (try a smaller learning_rate), got {after}")
    if config.reject_worse and after >= before:
        norms.assign(block, start)
        logger.info("block %d: the tweak raised the held-out loss from %.4g to %.4g; its norms are left as they were", index, before, after)
        after = before
    return before, after


def with_parameters(block: nn.Module, values: dict[str, Tensor]) -> Callable[..., Any]:
    """The block's call with some of its parameters replaced by other tensors."""
    return lambda *args, **kwargs: torch.func.functional_call(block, values, args, kwargs)


def token_mask(target: Tensor, config: TweakConfig) -> Tensor:
    """Which tokens [B, L] of a target [B, L, H] count."""
    mask = torch.ones(target.shape[:2], dtype=torch.bool, device=target.device)
    if config.skip_first_token:
        mask[:, 0] = False
    return mask


@torch.no_grad()
def mean_loss(block: nn.Module, index: int, stream: Stream, target: Tensor, config: TweakConfig, rows: Tensor) -> float:
    """The tweak's loss of a block as it is over some of the sequences, in batches of the tweak's own size."""
    loss_of = losses.find(config.loss)
    batches = rows.split(config.batch_size)
    total = 0.0
    for batch in batches:
        wanted = target[batch].to(stream.device)
        total += loss_of(stream.call(block, index, batch), wanted, token_mask(wanted, config)).item()
    return total / len(batches)
