"""SmoothQuant: activations give part of their range to the weights, so that both can be rounded to integers (arXiv 2211.10438)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from normtweak_kernels import QuantizedWeight

from .. import losses
from ..config import QuantizeConfig
from ..folding import Fold, applied, balanced, floored
from ..inputs import RangeCollector
from ..linear import PackedLinear
from ..rounding import nearest
from . import Quantizer, Run
from .gptq import GPTQ

logger = logging.getLogger(__name__)

# Exponents tried beside no smoothing at all; the paper's own, for whole models, is 0.5 to 0.8.
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# So many sequences tell one exponent from another.
SEQUENCES = 4


class SmoothQuant(Quantizer):
    """s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) (eq. 4) for each input channel j, x / s in the norm or linear that makes it, W s in those that read it.

    alpha is one for the block, found on a grid by the error of the block's output with its linears packed as they will be, activations as integers and all: the mean over tokens
    of |error|^2 / |output|^2. Then the weights are rounded, with the clip search or with GPTQ.
    """

    def quantize_block(
        self, linears: Mapping[str, nn.Linear], run: Run, config: QuantizeConfig, folds: Sequence[Fold] = ()
    ) -> dict[str, QuantizedWeight]:
        """See Quantizer."""
        configs = {name: own for name in linears if (own := config.for_module(name))}
        chosen = {name: linears[name] for name in configs}
        ranges = RangeCollector(chosen)
        with ranges.attached():
            run()
        largest, squares = ranges.largest(), ranges.mean_square()
        folds = [fold for fold in folds if fold.readers.keys() & largest.keys()]
        scales = self._best_scales(chosen, largest, squares, run, configs, folds, config.packed_activations)
        for fold, scale in zip(folds, scales, strict=True):
            fold.apply(scale)
        if config.rounding == "gptq":
            return GPTQ().quantize_block(linears, run, config)
        return rounded(chosen, configs, moved(squares, folds, scales))

    def _best_scales(
        self,
        linears: Mapping[str, nn.Linear],
        largest: Mapping[str, Tensor],
        squares: Mapping[str, Tensor],
        run: Run,
        configs: Mapping[str, QuantizeConfig],
        folds: Sequence[Fold],
        activations: str,
    ) -> list[Tensor]:
        if not folds:
            return []
        target = run(SEQUENCES)
        candidates = {alpha: [smoothing(fold, largest, alpha) for fold in folds] for alpha in ALPHAS}
        candidates = {0.0: [torch.ones_like(scale) for scale in candidates[ALPHAS[0]]]} | candidates
        errors = {}
        for alpha, scales in candidates.items():
            with applied(folds, scales), packed(linears, rounded(linears, configs, moved(squares, folds, scales)), activations):
                errors[alpha] = output_error(run(SEQUENCES), target)
        best = min(errors, key=errors.__getitem__)
        logger.debug("smoothquant: alpha %g, error %.4g (without: %.4g)", best, errors[best], errors[0.0])
        return candidates[best]


def smoothing(fold: Fold, largest: Mapping[str, Tensor], alpha: float) -> Tensor:
    """max|x_j|^alpha / max|W_j|^(1 - alpha), geometric mean 1. largest: max|x_j| by linear; of a fold's readers those in it count."""
    names = [name for name in fold.readers if name in largest]
    inputs = torch.stack([largest[name] for name in names]).amax(0)
    weights = torch.stack([fold.readers[name].get_parameter("weight").detach().abs().amax(0) for name in names]).amax(0)
    return balanced(floored(inputs).pow(alpha) / floored(weights).pow(1 - alpha))


def moved(squares: Mapping[str, Tensor], folds: Sequence[Fold], scales: Sequence[Tensor]) -> dict[str, Tensor]:
    """The inputs' mean squares once the scales have moved."""
    result = dict(squares)
    for fold, scale in zip(folds, scales, strict=True):
        result |= {name: result[name] / scale.square() for name in fold.readers if name in result}
    return result


def rounded(linears: Mapping[str, nn.Linear], configs: Mapping[str, QuantizeConfig], squares: Mapping[str, Tensor]) -> dict[str, QuantizedWeight]:
    """Each linear's weight on its grid, as it is now; with plain min-max ranges where nothing is known of its input."""
    return {name: nearest(linear.weight, configs[name], squares.get(name)) for name, linear in linears.items()}


@contextmanager
def packed(linears: Mapping[str, nn.Linear], weights: Mapping[str, QuantizedWeight], activations: str) -> Iterator[None]:
    """The linears compute as the packed ones will while open."""
    for name, linear in linears.items():
        cast(Any, linear).forward = PackedLinear.from_weight(weights[name], linear.bias, activations=activations).forward
    try:
        yield
    finally:
        for linear in linears.values():
            del linear.forward


def output_error(output: Tensor, target: Tensor) -> float:
    """Mean over tokens of |output - target|^2 / |target|^2, both [S, L, H]; position 0, where models keep a massive activation, is left out."""
    mask = torch.ones(target.shape[:2], dtype=torch.bool)
    mask[:, 0] = False
    return losses.find("token_mse")(output, target, mask).item()
