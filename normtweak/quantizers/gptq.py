"""GPTQ: column by column, each column's rounding error is passed on to the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight

from ..activations import Passes
from ..config import QuantizeConfig
from ..folding import Fold
from ..inputs import HessianCollector, Inputs, enough, multiplied
from ..linear import RoutedLinear
from ..rounding import Solver
from . import Quantizer, Run

logger = logging.getLogger(__name__)


class GPTQ(Quantizer):
    """GPTQ with damping, activation order over static groups, and a clip search for the groups' ranges.

    Two things that the plain algorithm does without: linears are quantized in the order of their calls, each on the inputs that the ones before it give
    when quantized (`sequential`); and a share of what those inputs lack of the float model's own is made good first (`correction`).
    """

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """See Quantizer. Linears that are handed the same tensor share one Hessian and its factor.

        An expert's linears that too few tokens were routed to are rounded to nearest; a warning names them.
        """
        configs = {name: own for name in linears if (own := config.for_module(name))}
        chosen = {name: linears[name] for name in configs}
        stages, float_inputs, repeated = self._look(chosen, run, config)
        result: dict[str, QuantizedWeight] = {}
        starved: list[str] = []
        with restored(chosen):
            for stage in stages:
                collector = HessianCollector({name: linears[name] for name in stage}, float_inputs)
                with collector.attached():
                    if isinstance(run, Passes) and len(stages) > 1 and not any(repeated[name] for name in stage):
                        run.until([linears[name] for name in stage])
                    else:
                        run()
                for inputs in collector.shared():
                    found = _solve(inputs, chosen, configs, config)
                    if inputs.hessian is None:
                        wanted = enough(linears[inputs.names[0]].in_features)
                        starved += [f"{name} ({collector.tokens(name)} of {wanted})" for name in inputs.names]
                    for name, quantized in found.items() if len(stages) > 1 else ():
                        linears[name].weight.data = quantized.dequantize().to(linears[name].weight.dtype)
                    result |= found
        if starved:
            logger.warning("gptq: too few calibration tokens (of how many needed) were routed to %s; rounded to nearest", ", ".join(starved))
        return {name: result[name] for name in configs}

    def _look(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig
    ) -> tuple[list[list[str]], Mapping[str, list[Tensor]], Mapping[str, bool]]:
        """What is quantized together, in order; the linears' inputs in the float model where they are asked for; whether a linear is called repeatedly."""
        if not isinstance(run, Passes):  # a single linear, whose inputs nothing before it changes
            return [list(linears)], {}, {}
        corrected = config.correction > 0 and run.has_float
        if not corrected and not config.sequential:
            return [list(linears)], {}, {}
        leaders, inputs, calls = watch(linears, run.of_float if corrected else run, keep=corrected)
        if not config.sequential:
            return [list(linears)], inputs, {}
        stages: dict[str, list[str]] = {}
        for name in [*leaders, *(name for name in linears if name not in leaders)]:
            # experts' namesakes go together
            stages.setdefault(re.sub(r"\d+", "", leaders.get(name, name)), []).append(name)
        return list(stages.values()), inputs, {name: calls[name] > run.batches for name in linears}


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


def watch(linears: Mapping[str, nn.Linear], run: Callable[[], object], *, keep: bool) -> tuple[dict[str, str], dict[str, list[Tensor]], Counter[str]]:
    """For each linear in the order of its first call in a pass, the first one that is handed the same tensor; their inputs [T, K], call by call; how many calls.

    Inputs are kept (if `keep`) on the host, in the dtype that they are multiplied in, once for linears that are called one after the other with the same.
    """
    leaders: dict[str, str] = {}
    inputs: dict[str, list[Tensor]] = {}
    calls: Counter[str] = Counter()
    last: list[tuple[Tensor, str, Tensor | None]] = []

    def hook(name: str):
        def observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not last or last[0][0] is not args[0]:
                last[:] = [(args[0], name, multiplied(args[0]).cpu() if keep else None)]
            _, leader, x = last[0]
            leaders.setdefault(name, leader)
            calls[name] += 1
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
    return leaders, inputs, calls
