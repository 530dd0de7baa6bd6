"""End-to-end polish: all norms of the packed model at once, against the float model's next-token distribution.

An extension of Norm Tweaking (arXiv 2309.02784), whose Algorithm 1 looks at one block at a time (loop.py) and so can't see what an error costs at the
output. Here Adam moves every norm, the last one too, down the gradient of

    L = mean over tokens of KL(softmax(float logits) || softmax(packed logits)),

with float32 masters, steps relative to each gain, and a rate that falls linearly to 0. Only norm parameters change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import norms
from .activations import BlockCalls, computing, split_rows
from .attention import use_blockwise
from .config import PolishConfig
from .progress import Progress

# What is tried when no learning rate is given, in rising order.
POLISH_RATES = (5e-3, 1e-2, 2e-2, 4e-2)
# Nats per token that sums over a vocabulary in float32 don't decide: two ways to compute the same model differ by 1e-8.
ROUNDING = 1e-6
# Sequences that the rest is judged by, at most: more take time and decide nothing.
HELD_OUT = 16
# Bytes of activations that are kept for the backward pass rather than computed again.
KEPT = 2**30
# Logits whose divergence is computed at a time: what a core's cache holds a few times over; what fills a GPU.
_TOGETHER = {False: 2**18, True: 2**24}


@dataclass(frozen=True)
class PolishReport:
    """KL(float || packed) per token on held-out calibration text before and after (nats), whether the polish changed the norms, and its learning rate.

    undone: whether the norms from before the layer-wise tweak did better there, or hardly worse, and came back.
    """

    kl_before: float
    kl_after: float
    accepted: bool
    rate: float
    undone: bool = False

    def __str__(self) -> str:
        line = f"KL to float {self.kl_before:.4f} -> {self.kl_after:.4f} at rate {self.rate:g}"
        line += "" if self.accepted else ", not accepted: norms are left as they were"
        return line + (", the layer-wise tweak undone" if self.undone else "")


def polish(
    model: nn.Module,
    blocks: nn.ModuleList,
    tokens: Tensor,
    float_hidden: Tensor,
    config: PolishConfig,
    *,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress,
    float_values: dict[str, Tensor] | None = None,
    untweaked: dict[str, Tensor] | None = None,
) -> tuple[PolishReport, dict[str, Tensor]]:
    """Polish the norms of a packed causal model in place.

    blocks: the model's list of decoder blocks. tokens: int64 [S, L]. float_hidden: the float model's last block output for them, float32 [S, L, H].
    float_values: norm parameters that the float model has behind its blocks; None where the packed model begins with the same. dtype: of matrix products.
    untweaked: norm parameters from before a layer-wise tweak, by name: the polish begins with them where held-out sequences like them no less than the tweaked ones, and they
    come back where neither tweak nor polish gains `config.min_gain` on them.
    Memory: the packed model, and of one sequence the activations that enter each block, one block's own (up to a gigabyte of them, which saves a fifth of the time), and two sets of
    logits. Returns the report and the norm parameters by name, float32: changed ones, or the old where held-out text got no better than `min_gain` asks.
    Raises ValueError when the loss isn't finite.
    """
    start = {p.name: p.start for p in norms.norm_parameters(model, relative=True)}
    use_blockwise(model, next(model.parameters()).device)
    model.requires_grad_(False)
    own = {name: model.get_parameter(name).requires_grad_() for name in start}
    objective = _Objective(model, blocks, tokens, float_hidden, start | (float_values or {}), dtype)
    trained, held_out = split_rows(len(tokens), min(config.held_out, HELD_OUT / len(tokens)))
    tweaked = plain = objective.mean(held_out)
    origin = start
    if untweaked:
        origin = start | untweaked
        norms.assign(model, origin)
        plain = objective.mean(held_out)
    before, start = (tweaked, start) if tweaked < plain else (plain, origin)
    norms.assign(model, start)
    wanted = (1 - config.min_gain) * plain
    rate = config.learning_rate or _find_rate(model, objective, trained, held_out, config, seed, progress)
    _descend(model, objective, trained, config, rate, seed, progress)
    after = objective.mean(held_out)
    if not math.isfinite(after):
        raise ValueError(f"polish: the loss must stay finite (try a smaller learning_rate), got {after}")
    after = _step_back(model, objective, start, after, held_out)
    accepted = before - after > ROUNDING and after <= wanted
    if not accepted:
        before, start = (before, start) if before <= wanted else (plain, origin)
        norms.assign(model, start)
    model.requires_grad_(False)
    report = PolishReport(before, after if accepted else before, accepted, rate, undone=bool(untweaked) and start is origin)
    return report, {name: parameter.detach() for name, parameter in own.items()}


def _descend(model: nn.Module, objective: _Objective, rows: Tensor, config: PolishConfig, rate: float, seed: int, progress: Progress) -> None:
    """Adam on all norms of the model, in place, over some of the sequences, the rate falling to 0."""
    parameters = norms.norm_parameters(model, relative=True)
    own = [model.get_parameter(p.name) for p in parameters]
    adam = torch.optim.Adam([p.master for p in parameters], lr=rate)
    steps = config.iterations * -(-len(rows) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1.0 - step / steps)
    order = torch.Generator().manual_seed(seed)
    with progress.task("polishing", steps) as advance:
        for _ in range(config.iterations):
            for batch in rows[torch.randperm(len(rows), generator=order)].split(config.batch_size):
                # The gradient of the parameters in place, which the blocks' recomputation reads too, then through each master's formula. One
                # sequence at a time: its logits, several times over, are the largest thing in memory.
                gradients = [torch.zeros_like(parameter) for parameter in own]
                for row in batch.split(1):
                    found = torch.autograd.grad(objective(row), own)
                    gradients = [total.add_(part / len(batch)) for total, part in zip(gradients, found, strict=True)]
                adam.zero_grad()
                torch.autograd.backward([p.value() for p in parameters], gradients)
                adam.step()
                schedule.step()
                norms.assign(model, {p.name: p.value() for p in parameters})
                advance()


def _step_back(model: nn.Module, objective: _Objective, start: dict[str, Tensor], after: float, held_out: Tensor) -> float:
    """Half of the way back to where the norms came from, again and again as long as held-out sequences like it better; their divergence there."""
    end = {name: model.get_parameter(name).detach().clone() for name in start}
    for share in (0.5, 0.25, 0.125):
        norms.assign(model, {name: start[name] + share * (end[name] - start[name]) for name in start})
        divergence = objective.mean(held_out)
        if not divergence < after:
            norms.assign(model, {name: start[name] + 2 * share * (end[name] - start[name]) for name in start})
            break
        after = divergence
    return after


def _find_rate(model: nn.Module, objective: _Objective, rows: Tensor, held_out: Tensor, config: PolishConfig, seed: int, progress: Progress) -> float:
    """The rate whose short run, over a quarter of the sequences, leaves the least divergence on held-out ones; the model is left as it was.

    Rates rise until that no longer falls.
    """
    start = {p.name: p.start for p in norms.norm_parameters(model, relative=True)}
    few = rows[: max(1, len(rows) // 4)]
    best, found = math.inf, POLISH_RATES[0]
    for rate in POLISH_RATES:
        _descend(model, objective, few, replace(config, iterations=1), rate, seed, progress)
        divergence = objective.mean(held_out)
        norms.assign(model, start)
        if not divergence < best:
            break
        best, found = divergence, rate
    return found


class _Objective:
    """KL(float || packed) per token of some of the sequences, differentiable in the model's parameters."""

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, float_hidden: Tensor, start: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        self._model, self._blocks, self._start = model, blocks, start
        self._tokens, self._hidden, self._dtype = tokens, float_hidden, dtype
        self._calls = BlockCalls(model, blocks)
        self._device = next(model.parameters()).device
        self._calls.embed(tokens[:1].to(self._device))

    def __call__(self, rows: Tensor) -> Tensor:
        tokens, hidden = self._tokens[rows].to(self._device), self._hidden[rows].to(self._device)
        with computing(tokens.device.type, self._dtype):
            with torch.no_grad():
                # What follows the blocks, with the norm that the float model has there.
                target = self._calls.logits(tokens, hidden, self._start)
            with recomputed(self._blocks, KEPT):
                output = self._model(input_ids=tokens, use_cache=False).logits
        return _Divergence.apply(output, target)

    @torch.no_grad()
    def mean(self, rows: Tensor) -> float:
        """Over some of the sequences."""
        return sum(self(row).item() for row in rows.split(1)) / len(rows)


class _Divergence(torch.autograd.Function):
    """Mean over tokens of KL(p || q), p = softmax(target), q = softmax(logits), whose gradient in the logits is q - p, over the tokens' number.

    KL = sum p (target - logits) - (L(target) - L(logits)), where L, the logarithm of a softmax's denominator, comes from the likeliest token: its logit less ln of its probability.
    A few tokens' distributions at a time (_TOGETHER): those of all, several times over, would be the largest thing in memory.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor) -> Tensor:
        count, total = logits[..., 0].numel(), torch.zeros((), device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        step = max(1, _TOGETHER[logits.is_cuda] // logits.shape[-1])
        for rows in (slice(start, start + step) for start in range(0, count, step)):
            own, goal = (t.flatten(0, -2)[rows].float() for t in (logits, target))
            p, q = goal.softmax(-1), own.softmax(-1)
            of_goal, of_own = (x.amax(-1) - shares.amax(-1).log() for x, shares in ((goal, p), (own, q)))
            total += torch.dot(p.flatten(), (goal - own).flatten()) - (of_goal - of_own).sum()
            if gradient is not None:
                gradient.flatten(0, -2)[rows] = q.sub_(p).div_(count)
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


@contextmanager
def recomputed(blocks: nn.ModuleList, kept: int) -> Iterator[None]:
    """While open, blocks keep what their backward pass needs as long as those before took less than `kept` bytes for it, then nothing but their input: the rest is computed again."""
    sizes: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*blocks.parameters(), *blocks.buffers())}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def run(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if sum(sizes.values()) >= kept:
            return checkpoint(forward, *args, use_reentrant=False, **named)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return forward(*args, **named)

    for block in blocks:
        block.forward = partial(run, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
