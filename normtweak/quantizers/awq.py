"""AWQ: the input channels that matter get a larger scale before rounding, and give it back in the norm or linear that feeds them (arXiv 2306.00978)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight

from ..config import QuantizeConfig
from ..folding import Fold, balanced, floored
from ..inputs import HessianCollector, Inputs
from ..rounding import nearest
from . import Quantizer, Run
from .gptq import GPTQ

logger = logging.getLogger(__name__)

# Steps of the exponent's grid from 0 to 1 (the paper, section 3.2, has 20 of its one form).
STEPS = 10
# So many rows of a weight, evenly spaced, tell one exponent from another: rows are rounded independently of each other.
ROWS = 256


class AWQ(Quantizer):
    """s = rms(x)^alpha, or rms(x)^alpha / mean|W|^(1 - alpha), per input channel: form and alpha by the error of the linears' outputs on the calibration text.

    Then rounding, with the clip search or with GPTQ. The first form is the paper's (alpha = 0 is no scale at all), the second that of its successors (AutoAWQ): channels with large
    weights leave the others more levels. The paper measures the error at the output of the attention or MLP and takes mean |x|; here it is sum over the readers of
    tr(D H D^T) / tr(W H W^T), D = Q(W s) / s - W, the relative error of their outputs over all calibration tokens, which the Hessian gives without another pass;
    and its diagonal gives the root of the mean square.
    """

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """See Quantizer. An expert's linears that too few tokens were routed to are rounded with plain min-max ranges."""
        configs = {name: own for name in linears if (own := config.for_module(name))}
        collector = HessianCollector({name: linears[name] for name in configs})
        with collector.attached():
            run()
        inputs = list(collector.shared())
        for fold in folds:
            read = [given for given in inputs if given.hessian is not None and fold.readers.keys() & set(given.names)]
            scale = find_scale(read, linears, configs)
            if scale is not None:
                fold.apply(scale)
                for given in read:
                    hessian_of(given).div_(scale[:, None] * scale)
        if config.rounding == "gptq":
            return GPTQ().quantize_block(linears, run, config)
        importance = {name: None if given.hessian is None else given.hessian.diagonal().contiguous() for given in inputs for name in given.names}
        return {name: nearest(linears[name].weight, own, importance[name]) for name, own in configs.items()}


def hessian_of(given: Inputs) -> Tensor:
    """Of inputs that have one."""
    assert given.hessian is not None
    return given.hessian


def find_scale(inputs: Sequence[Inputs], linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantizeConfig]) -> Tensor | None:
    """The scale [K] with the least relative output error of the linears that read the channels; None when no scale does better than none."""
    if not inputs:
        return None
    magnitude = torch.stack([hessian_of(given).diagonal() * given.tokens for given in inputs]).sum(0).sqrt()
    if magnitude.max() == 0:
        return None
    weights = torch.cat([linears[name].weight.detach() for given in inputs for name in given.names]).abs().mean(0)
    magnitude, weights = (balanced(floored(values)) for values in (magnitude, weights))
    candidates = [magnitude.pow(step / STEPS) / (1 if paper else weights.pow(1 - step / STEPS)) for paper in (True, False) for step in range(STEPS)]
    errors = [sum(output_error(given, linears, configs, scale) * given.tokens for given in inputs) for scale in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    logger.debug("awq: candidate %d, error %.4g of %.4g, for %s", best, errors[best], errors[0], inputs[0].names[0])
    return candidates[best] if best else None


def output_error(given: Inputs, linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantizeConfig], scale: Tensor) -> float:
    """sum over the linears of tr(D H D^T) / tr(W H W^T) with D = Q(W s) / s - W, of some of their rows."""
    hessian = hessian_of(given)
    importance = hessian.diagonal() / scale.square()
    total = 0.0
    for name in given.names:
        weight = linears[name].weight.detach()
        weight = weight[:: max(1, len(weight) // ROWS)]
        difference = nearest(weight * scale, configs[name], importance).dequantize() / scale - weight
        energy = ((weight @ hessian) * weight).sum().clamp(min=torch.finfo(torch.float32).tiny)
        total += (((difference @ hessian) * difference).sum() / energy).item()
    return total
