"""GPTQ: column by column, each column's rounding error is passed on to the columns not yet rounded (arXiv 2210.17323)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from normtweak_kernels import QuantizedWeight

from ..config import QuantizeConfig
from ..folding import Fold
from ..inputs import HessianCollector, enough
from ..rounding import Solver
from . import Quantizer, Run

logger = logging.getLogger(__name__)


class GPTQ(Quantizer):
    """GPTQ with damping, activation order over static groups, and a clip search for the groups' ranges."""

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """See Quantizer. Linears that are handed the same tensor share one Hessian and its factor.

        An expert's linears that too few tokens were routed to are rounded to nearest; a warning names them.
        """
        configs = {name: own for name in linears if (own := config.for_module(name))}
        collector = HessianCollector({name: linears[name] for name in configs})
        with collector.attached():
            run()
        result: dict[str, QuantizedWeight] = {}
        starved: list[str] = []
        for names, hessian in collector.shared():
            if hessian is None:
                k = linears[names[0]].in_features
                starved += [f"{name} ({collector.tokens(name)} of {enough(k)})" for name in names]
                # Without a Hessian no error is passed on; without its diagonal the clip search would do harm.
                hessian = torch.eye(k, device=linears[names[0]].weight.device)
                configs |= {name: dataclasses.replace(configs[name], clip_steps=0) for name in names}
            solver = Solver(hessian, config, " ".join(names))
            result |= {name: solver.quantize(linears[name].weight, configs[name]) for name in names}
        if starved:
            logger.warning("gptq: too few calibration tokens (of how many needed) were routed to %s; rounded to nearest", ", ".join(starved))
        return {name: result[name] for name in configs}
