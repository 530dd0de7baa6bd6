"""GPTQ: column by column, each column's rounding error is passed on to the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight, gptq_solve, group_params, hessian_update, inverse_cholesky, mirror_lower

from ..activations import Passes
from ..config import QuantizeConfig
from ..linear import RoutedLinear

logger = logging.getLogger(__name__)


class GPTQ:
    """GPTQ with damping, activation order over static groups, and a clip search for the groups' ranges.

    Two things that the plain algorithm does without: linears are quantized in the order of their calls, each on the inputs that the ones before it give
    when quantized (`sequential`); and a share of what those inputs lack of the float model's own is made good first (`correction`).
    """

    def quantize_block(self, linears: Mapping[str, nn.Linear], run: Callable[[], None], config: QuantizeConfig) -> dict[str, QuantizedWeight]:
        """See Quantizer. Linears that are handed the same tensor share one Hessian and its factor.

        An expert's linears that too few tokens were routed to are rounded to nearest; a warning names them.
        """
        configs = {name: own for name in linears if (own := config.for_module(name))}
        chosen = {name: linears[name] for name in configs}
        stages, float_inputs = self._look(chosen, run, config)
        result: dict[str, QuantizedWeight] = {}
        starved: list[str] = []
        with restored(chosen):
            for stage in stages:
                collector = HessianCollector({name: linears[name] for name in stage}, float_inputs)
                with collector.attached():
                    run()
                for inputs in collector.shared():
                    found = _solve(inputs, chosen, configs, config)
                    if inputs.hessian is None:
                        wanted = _enough(linears[inputs.names[0]].in_features)
                        starved += [f"{name} ({collector.tokens(name)} of {wanted})" for name in inputs.names]
                    for name, quantized in found.items() if len(stages) > 1 else ():
                        linears[name].weight.data = quantized.dequantize().to(linears[name].weight.dtype)
                    result |= found
        if starved:
            logger.warning("gptq: too few calibration tokens (of how many needed) were routed to %s; rounded to nearest", ", ".join(starved))
        return {name: result[name] for name in configs}

    def _look(
        self, linears: Mapping[str, nn.Linear], run: Callable[[], None], config: QuantizeConfig
    ) -> tuple[list[list[str]], Mapping[str, list[Tensor]]]:
        """What is quantized together, in order, and the linears' inputs in the float model where they are asked for."""
        if not isinstance(run, Passes):  # a single linear, whose inputs nothing before it changes
            return [list(linears)], {}
        corrected = config.correction > 0 and run.has_float
        if not corrected and not config.sequential:
            return [list(linears)], {}
        leaders, inputs = watch(linears, run.of_float if corrected else run, keep=corrected)
        if not config.sequential:
            return [list(linears)], inputs
        stages: dict[str, list[str]] = {}
        for name in [*leaders, *(name for name in linears if name not in leaders)]:
            # experts' namesakes go together
            stages.setdefault(re.sub(r"\d+", "", leaders.get(name, name)), []).append(name)
        return list(stages.values()), inputs


def _solve(
    inputs: Inputs, linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantizeConfig], config: QuantizeConfig
) -> dict[str, QuantizedWeight]:
    """The quantized weights of linears that share their input."""
    hessian, own = inputs.hessian, {name: configs[name] for name in inputs.names}
    if hessian is None:
        linear = linears[inputs.names[0]]
        # Without a Hessian no error is passed on; without its diagonal the clip search would do harm.
        hessian = torch.eye(linear.in_features, device=linear.weight.device)
        own = {name: dataclasses.replace(settings, clip_steps=0) for name, settings in own.items()}
    solver = Solver(hessian, config, " ".join(inputs.names), inputs.tokens)
    found = {}
    for name, settings in own.items():
        weight = linears[name].weight.detach().float()
        if inputs.drift is not None:
            weight = weight + config.correction * solver.divided(weight @ inputs.drift)
        found[name] = solver.quantize(weight, settings)
    return found


@contextmanager
def restored(linears: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Weights that are put in the place of the linears' own go when this ends."""
    weights = {name: linear.weight.data for name, linear in linears.items()}
    try:
        yield
    finally:
        for name, weight in weights.items():
            linears[name].weight.data = weight


def watch(linears: Mapping[str, nn.Linear], run: Callable[[], None], *, keep: bool) -> tuple[dict[str, str], dict[str, list[Tensor]]]:
    """For each linear in the order of its first call in a pass, the first one that is handed the same tensor; and their inputs [T, K], call by call.

    Inputs are kept (if `keep`) on the host, in the dtype that they are multiplied in, once for linears that are called one after the other with the same.
    """
    leaders: dict[str, str] = {}
    inputs: dict[str, list[Tensor]] = {}
    last: list[tuple[Tensor, str, Tensor | None]] = []

    def hook(name: str):
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], name, multiplied(args[0]).cpu() if keep else None)]
            _, leader, x = last[0]
            leaders.setdefault(name, leader)
            # a router may send other tokens to an expert when it is asked again
            if x is not None and not isinstance(module, RoutedLinear):
                inputs.setdefault(name, []).append(x)

        return observe

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return leaders, inputs


def multiplied(x: Tensor) -> Tensor:
    """An input [..., K] of a linear as [T, K], in the dtype that it is multiplied in."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return x.detach().flatten(0, -2).to(torch.get_autocast_dtype(x.device.type) if autocast else x.dtype)


def _enough(in_features: int) -> int:
    """How many tokens make an expert's Hessian worth more than none."""
    return max(1, in_features // 32)


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


class HessianCollector:
    """Accumulates H = X^T X / T of each linear's input over all calls, and its drift from the float model's inputs where those are given."""

    def __init__(self, linears: Mapping[str, nn.Linear], float_inputs: Mapping[str, list[Tensor]] | None = None) -> None:
        self._linears, self._float_inputs = linears, float_inputs or {}
        self._leader: dict[str, str] = {}  # linear -> the first linear that is given the same tensor
        self._seen: list[tuple[Tensor, str]] = []
        self._sums: dict[str, Tensor] = {}
        self._drifts: dict[str, Tensor] = {}
        self._calls: Counter[str] = Counter()
        self._tokens: dict[str, int] = {}

    @contextmanager
    def attached(self):
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

    def shared(self) -> Iterator[Inputs]:
        """The inputs, each with the linears that it is handed to, one at a time; raises ValueError for a linear, no expert's, that no token reached."""
        groups: dict[str, list[str]] = {}
        for name, linear in self._linears.items():
            if not self.tokens(name) and not isinstance(linear, RoutedLinear):
                raise ValueError(f"gptq: every linear must see calibration tokens, got none for {name}")
            groups.setdefault(self._leader.get(name, name), []).append(name)
        for leader, names in groups.items():
            total, tokens, linear = self._sums.pop(leader, None), self.tokens(leader), self._linears[leader]
            if total is None or (isinstance(linear, RoutedLinear) and tokens < _enough(linear.in_features)):
                yield Inputs(names, 0, None, None)
                continue
            drift = self._drifts.pop(leader, None)
            yield Inputs(names, tokens, mirror_lower(total.div_(tokens)), None if drift is None else drift.div_(tokens))

    def _hook(self, name: str):
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in self._leader:
                self._leader[name] = next((leader for tensor, leader in self._seen if tensor is x), name)
                self._seen.append((x, self._leader[name]))
            if self._leader[name] == name:
                self._add(name, x)

        return observe

    def _add(self, name: str, x: Tensor) -> None:
        k = x.shape[-1]
        if name not in self._sums:
            self._sums[name] = torch.zeros(k, k, dtype=torch.float32, device=x.device)
            self._tokens[name] = 0
        x = x.detach().flatten(0, -2)
        hessian_update(self._sums[name], x)
        self._tokens[name] += x.shape[0]
        if name in self._float_inputs:
            own, exact = multiplied(x), self._float_inputs[name][self._calls[name]].to(x.device)
            self._calls[name] += 1
            drift = self._drifts.setdefault(name, torch.zeros_like(self._sums[name]))
            drift += (exact.float() - own.float()).to(own.dtype).t() @ own


class Solver:
    """One Hessian's factor, and the solve of each weight that shares it."""

    def __init__(self, hessian: Tensor, config: QuantizeConfig, name: str, tokens: int = 0) -> None:
        """tokens: how many the Hessian was made of, 0 for one that is exact."""
        diagonal = hessian.diagonal()
        # A column's error costs in proportion to its input's energy: on SmolLM2-135M at W4 per-channel the clip search without these weights
        # makes perplexity worse than no search (61 against 52), with them far better (44).
        self.importance = diagonal / diagonal.mean()
        self.dead = diagonal == 0
        self.order = torch.argsort(diagonal, descending=True, stable=True) if config.act_order else None
        # Of T tokens, a Hessian of K inputs is known so well: with K / T more of damping GPTQ loses less on other text (docs/experiments.md), and an
        # expert's that few tokens reached does no harm.
        uncertain = len(hessian) / tokens if tokens else 0.0
        self.hinv = inverse_factor(hessian, config.damp_percent + uncertain, name, self.order)

    def divided(self, right: Tensor) -> Tensor:
        """right @ H^-1 of rows [N, K], H damped."""
        if self.order is None:
            return right @ self.hinv.t() @ self.hinv
        result = torch.empty_like(right)
        result[:, self.order] = right[:, self.order] @ self.hinv.t() @ self.hinv
        return result

    def quantize(self, weight: Tensor, config: QuantizeConfig) -> QuantizedWeight:
        """Codes of a weight [N, K] that minimise tr((W - Q) H (W - Q)^T), greedily. config: this weight's own."""
        weight = weight.detach().float()
        if self.dead.any():
            weight = weight.masked_fill(self.dead, 0.0)
        # Static groups: grids are found on the weights as they are, in their own order, so that a checkpoint needs no g_idx.
        scales, zeros = group_params(
            weight,
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
            clip_steps=config.clip_steps,
            importance=self.importance,
        )
        codes = gptq_solve(weight, self.hinv, scales, zeros, bits=config.bits, order=self.order, block_size=config.block_size)
        return QuantizedWeight(codes, scales.half(), None if config.symmetric else zeros, config.bits)


def inverse_factor(hessian: Tensor, damp_percent: float, name: str, order: Tensor | None = None) -> Tensor:
    """The upper triangular U with U^T U = (H + damp * mean(diag H) * I)^-1, float32 [K, K], H's rows and columns in `order`.

    An input that is always zero gets 1 on H's diagonal instead. When the factorisation fails the damping is raised tenfold and a
    warning says so. Raises ValueError when damping 1.0 doesn't help.
    """
    diagonal = hessian.diagonal()
    dead = (diagonal == 0).to(hessian.dtype)
    mean = (diagonal + dead).mean()
    while True:
        factor, found = inverse_cholesky(hessian, dead + damp_percent * mean, order=order)
        if found:
            return factor
        more = min(damp_percent * 10, 1.0)
        again = f"trying {more:g}" if damp_percent < 1.0 else "giving up"
        logger.warning("gptq: the Hessian of %s is not positive definite with damping %g; %s", name, damp_percent, again)
        if damp_percent >= 1.0:
            break
        damp_percent = more
    raise ValueError(f"gptq: the Hessian of {name} must be positive definite with damping up to 1.0, got one that isn't")
