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
from .activations import Passes, Stream, split_rows
from .config import QuantizeConfig, TweakConfig
from .families import Family
from .folding import folds_of
from .linear import PackedLinear, quantizable_linears, replace
from .progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block: the tweak's loss on held-out calibration text and its learning rate, 0 where the norms were left (None without a tweak)."""

    index: int
    seconds: float
    loss_before: float | None = None
    loss_after: float | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.loss_before is None or self.loss_after is None:
            return f"block {self.index}: quantized in {self.seconds:.1f} s"
        return f"block {self.index}: loss {self.loss_before:.4g} -> {self.loss_after:.4g} at rate {self.rate:g} in {self.seconds:.1f} s"


def quantize_blocks(
    path: str,
    count: int,
    open_block: Callable[[int], nn.Module],
    close_block: Callable[[int, nn.Module, dict[str, Tensor]], None],
    stream: Stream | None,
    config: QuantizeConfig,
    progress: Progress,
    family: Family | None = None,
) -> tuple[list[BlockReport], Stream | None, Stream | None]:
    """Quantize and tweak `count` blocks in order; gives what happened to each, and behind the last one the stream and the float model's own
    (None when neither tweak nor polish looks at it).

    path: of the blocks in the model. open_block(l): block l with its float weights. close_block(l, block, norms): called when block l is final, its linears packed; norms: its norm parameters, by name, as
    they were before the tweak (none where nothing of it was kept).
    stream: what the first block is given (None when the configuration looks at no text). family: what is known of the model's.
    Raises ValueError, naming it, for a block without linears or norms.
    """
    quantizer = quantizers.find(config.method)
    tweak = config.tweak
    # The float model's own activations, kept beside the quantized ones when they are a target.
    float_stream = stream if config.needs_float_stream else None
    reports = []
    with progress.task("quantizing", count) as advance:
        for index in range(count):
            began = time.perf_counter()
            block = open_block(index)
            place = f"{path}.{index}."
            linears = {place + name: linear for name, linear in quantizable_linears(block).items()}
            if not linears:
                raise ValueError(f"quantize: block {index} must hold nn.Linear modules, got {type(block).__name__} without one")

            # 8, 9: quantize; the float output, of the float stream or (Algorithm 1) of the quantized one, is a pass that the quantizer looks at too
            run = Passes(block, index, stream, float_stream)
            with torch.no_grad():
                weights = quantizer.quantize_block(linears, run, config, folds_of(block, place, family))
            target = run.output(tweak.target_stream) if tweak else None
            if float_stream is not None:
                float_stream = float_stream.moved(run.output("float"))

            # 10: freeze
            for name, weight in weights.items():
                replace(block, name.removeprefix(place), PackedLinear.from_weight(weight, linears[name].bias, activations=config.packed_activations))
            block.requires_grad_(False)

            # 11-16: tweak; 17: the tweaked quantized output goes on
            tweaked: tuple[float, float, float] | tuple[()] = ()
            untweaked: dict[str, Tensor] = {}  # where the tweak was kept
            if stream is not None:
                if tweak and target is not None:
                    before = {p.name: p.start for p in norms.norm_parameters(block, relative=True)}
                    tweaked = tweak_block(block, index, count, stream, target, tweak, config.seed)
                    untweaked = before if tweaked[2] else {}
                stream = stream.moved(stream.through(block, index))
            close_block(index, block, untweaked)
            reports.append(BlockReport(index, time.perf_counter() - began, *tweaked))
            advance(str(reports[-1]))
    return reports, stream, float_stream


def tweak_block(
    block: nn.Module, index: int, count: int, stream: Stream, target: Tensor, config: TweakConfig, seed: int
) -> tuple[float, float, float]:
    """Lines 11-16: the norm parameters of a frozen block are replaced by what Adam found, at the rate whose loss on the held-out sequences is least.

    target: float output [S, L, H]. Rates are tried in rising order, each from the norms as they were, until that loss no longer falls. Returns the loss
    before and after, and the rate (0 when the norms stay as they were).
    Raises ValueError when the loss isn't finite, at the first rate.
    """
    trained, held_out = split_rows(len(target), config.held_out)
    start = {p.name: p.start for p in norms.norm_parameters(block, relative=config.step == "relative")}
    before = mean_loss(block, index, stream, target, config, held_out)
    best, norms_of_best, rate_of_best = (before, start, 0.0) if config.reject_worse else (math.inf, start, 0.0)
    for learning_rate in config.learning_rates():
        rate = learning_rate * (1 + config.depth_scale * index / count)  # eq. 3
        norms.assign(block, start)
        values = descend(block, index, stream, target, config, rate, trained, seed + index)
        norms.assign(block, values)
        after = mean_loss(block, index, stream, target, config, held_out)
        if not math.isfinite(after) and learning_rate == config.learning_rates()[0]:
            raise ValueError(f"tweak: the loss of block {index} must stay finite (try a smaller learning_rate), got {after}")
        if not after < best:
            logger.info("block %d: at rate %g the tweak took the held-out loss from %.4g to %.4g; not kept", index, rate, before, after)
            break
        best, norms_of_best, rate_of_best = after, values, rate
    norms.assign(block, norms_of_best)
    return before, best, rate_of_best


def descend(
    block: nn.Module, index: int, stream: Stream, target: Tensor, config: TweakConfig, rate: float, rows: Tensor, seed: int
) -> dict[str, Tensor]:
    """Adam on float32 masters of a block's norm parameters, over some of the sequences; the values it ends at, by name."""
    parameters = norms.norm_parameters(block, relative=config.step == "relative")
    loss_of = losses.find(config.loss)
    adam = torch.optim.Adam([p.master for p in parameters], lr=rate)
    order = torch.Generator().manual_seed(seed)
    steps = config.iterations * -(-len(rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0 if config.schedule == "constant" else 1.0 - step / steps)
    for _ in range(config.iterations):
        for batch in rows[torch.randperm(len(rows), generator=order)].split(config.batch_size):
            output = stream.call(with_parameters(block, {p.name: p.value() for p in parameters}), index, batch)
            wanted = target[batch].to(output.device)
            loss = loss_of(output, wanted, token_mask(wanted, config))
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return {p.name: p.value().detach() for p in parameters}


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
